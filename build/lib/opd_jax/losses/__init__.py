"""Pure kernels: arrays in, arrays out. No model, config, text or device code."""
