"""Rotary positions and the ways public configs stretch them to longer contexts.

Frequencies are computed by numpy while a function is traced, so they are constants of the
compiled program; the order of operations in float32 follows transformers'
`modeling_rope_utils.py`.

Two kinds, `dynamic` and `longrope`, depend on the sequence length. Here that is the *static*
length of the call: the slots of the cache, or S without one. A length that changed while a
response grows would rotate its first keys by one set of angles and its last by another, and
the scorer, which sees the whole response, would disagree with the sampler about all of them.
So sampler and scorer agree if they are compiled for the same prompt + response.
"""

import math

from jax import Array
import jax.numpy as jnp
import numpy as np

from opd_jax.models.configs import ModelConfig


def _plain(dim: int, theta: float) -> np.ndarray:
  """theta^(-2i/dim) for i < dim/2, in radians per position."""
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return np.float32(1.0) / np.float32(theta) ** exponent


def _linear(config: ModelConfig) -> np.ndarray:
  """Positions divided by the factor."""
  return _plain(config.rotary_dim, config.rope_theta) / np.float32(config.rope_scaling.factor)


def _dynamic(config: ModelConfig, length: int) -> np.ndarray:
  """NTK-aware: the base grows with the length, beyond the pre-training length only."""
  scaling, dim = config.rope_scaling, config.rotary_dim
  ratio = max(length, scaling.original_positions) / scaling.original_positions
  grown = scaling.factor * ratio - (scaling.factor - 1)
  return _plain(dim, config.rope_theta * grown ** (dim / (dim - 2)))


def _llama3(config: ModelConfig) -> np.ndarray:
  """Long wavelengths divided by the factor, short ones kept, a ramp in between."""
  scaling = config.rope_scaling
  plain = _plain(config.rotary_dim, config.rope_theta)
  turns = scaling.original_positions * plain / np.float32(2 * math.pi)
  ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  ramp = np.clip(ramp, 0.0, 1.0).astype(np.float32)
  return (1 - ramp) * plain / np.float32(scaling.factor) + ramp * plain


def _yarn(config: ModelConfig) -> np.ndarray:
  """Dimensions that turn less than `beta_slow` times are divided, above `beta_fast` kept."""
  scaling, dim = config.rope_scaling, config.rotary_dim
  plain = _plain(dim, config.rope_theta)

  def dimension(turns):
    return (dim * math.log(scaling.original_positions / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta)))

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  high += 0.001 if low == high else 0.0
  kept = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
  return (plain / np.float32(scaling.factor) * (1 - kept) + plain * kept).astype(np.float32)


def _longrope(config: ModelConfig, length: int) -> np.ndarray:
  """Each dimension has its own divisor: one list up to the original length, one beyond."""
  scaling = config.rope_scaling
  divisors = scaling.short_factor if length <= scaling.original_positions else scaling.long_factor
  return _plain(config.rotary_dim, config.rope_theta) / np.asarray(divisors, np.float32)


FREQUENCIES = {
    "none": lambda config, length: _plain(config.rotary_dim, config.rope_theta),
    "linear": lambda config, length: _linear(config),
    "dynamic": _dynamic,
    "llama3": lambda config, length: _llama3(config),
    "yarn": lambda config, length: _yarn(config),
    "longrope": _longrope,
}


def angles(config: ModelConfig, positions: Array, length: int) -> tuple[Array, Array]:
  """cos and sin of the rotary angles.

  Args:
    config: names the scaling, a key of `FREQUENCIES`.
    positions: i32[B, S].
    length: tokens that this call is compiled for, prompt and response together.
  Returns: two f32[B, S, rotary_dim / 2], already times the scaling's attention factor.
  """
  frequency = FREQUENCIES[config.rope_scaling.kind](config, length)
  angle = positions.astype(jnp.float32)[..., None] * frequency
  factor = config.rope_scaling.attention_factor
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the first rotary_dim elements of each head of [B, S, heads, head_dim].

  Element i pairs with i + rotary_dim/2 ("rotate half"); the rest passes unchanged.
  """
  dim = 2 * cos.shape[-1]
  a, b = jnp.split(x[..., :dim].astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)
