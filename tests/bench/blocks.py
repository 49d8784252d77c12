"""What a scan over layers, or over blocks of them, costs a decoding step on a CPU.

    python tests/bench/blocks.py    # seconds

The MLPs of SmolLM2-135M's shape, 8 rows, bfloat16, 16 steps in a loop: unrolled, and as scans whose
weights are stacked. A scan slices what it scans over, and on CPUs a slice is a copy.
"""

import time

import jax
import jax.numpy as jnp

LAYERS, WIDTH, HIDDEN, ROWS, STEPS, REPEATS = 30, 576, 1536, 8, 16, 7


def product(x, kernel):
  return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def layer(x, kernels):
  gate, up, down = kernels
  y = jax.nn.silu(product(x, gate)) * product(x, up)
  return x + product(y.astype(x.dtype), down).astype(x.dtype)


def unrolled(x, layers):
  for kernels in layers:
    x = layer(x, kernels)
  return x


def scanned(x, blocks):
  """blocks: kernels [number of blocks, layers a block, ...]."""
  def block(x, kernels):
    for i in range(kernels[0].shape[0]):
      x = layer(x, jax.tree.map(lambda a: a[i], kernels))
    return x, None
  return jax.lax.scan(block, x, blocks)[0]


def main():
  draw = lambda *shape: (0.03 * jax.random.normal(jax.random.key(0), shape)).astype(jnp.bfloat16)
  layers = [(draw(WIDTH, HIDDEN), draw(WIDTH, HIDDEN), draw(HIDDEN, WIDTH)) for _ in range(LAYERS)]
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  runs = {"unrolled": (unrolled, layers)}
  for size in (1, 6, 15):
    runs[f"{LAYERS // size} blocks of {size}"] = scanned, jax.tree.map(
        lambda a: a.reshape(LAYERS // size, size, *a.shape[1:]), stacked)
  x, times, compiled = draw(ROWS, WIDTH), {name: [] for name in runs}, {}
  for name, (form, kernels) in runs.items():
    steps = jax.jit(lambda x, kernels: jax.lax.fori_loop(
        0, STEPS, lambda _, x: form(x, kernels), x))
    compiled[name] = steps.lower(x, kernels).compile()
    jax.block_until_ready(compiled[name](x, kernels))
  for _ in range(REPEATS):
    for name, (_, kernels) in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(compiled[name](x, kernels))
      times[name].append(1e3 * (time.perf_counter() - start) / STEPS)
  print("| layers | ms a step | spread |\n|---|---|---|")
  for name, found in times.items():
    found.sort()
    print(f"| {name} | {found[REPEATS // 2]:.1f} | {found[0]:.1f} to {found[-1]:.1f} |")


if __name__ == "__main__":
  main()
