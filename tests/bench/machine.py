"""What the machine allows: matrix products a second and bytes a second, in the forms we use.

    python tests/bench/machine.py            # a minute
    python tests/bench/machine.py --quick    # small, to try the script

Square products bound training and prefill; skinny ones, a few rows against a matrix that is not
in a cache, bound decoding: they do as many bytes as they read. Medians of 5.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import host_memory

REPEATS = 5


def seconds(f, *args) -> tuple[float, float]:
  """Median and spread (largest less smallest) of a call, after one to compile."""
  jax.block_until_ready(f(*args))
  found = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    found.append(time.perf_counter() - start)
  return float(np.median(found)), max(found) - min(found)


def product(dtype: str, out: str):
  """a @ b with its result asked for in `out`."""
  return jax.jit(lambda a, b: jnp.matmul(a.astype(dtype), b.astype(dtype),
                                         preferred_element_type=jnp.dtype(out)))


def chain(out: str):
  """x times each of many matrices: together more bytes than any cache holds."""
  @jax.jit
  def f(x, matrices):
    return sum(jnp.matmul(x, w, preferred_element_type=jnp.dtype(out)) for w in matrices)
  return f


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true")
  quick = parser.parse_args().quick
  size, count, mega = (256, 4, 4) if quick else (2048, 48, 256)
  print(f"{jax.devices()[0].device_kind} x {jax.device_count()}, jax {jax.__version__}\n")
  print("| what | form | rate | median ms | spread ms |\n|---|---|---|---|---|")

  def line(what, form, rate, unit, found):
    print(f"| {what} | {form} | {rate / found[0] / 1e9:.4g} {unit} | {1e3 * found[0]:.3g} | "
          f"{1e3 * found[1]:.2g} |", flush=True)

  forms = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
  for dtype, out in forms:
    square = jnp.ones((size, size), dtype)
    line(f"{size} cubed", f"{dtype} -> {out}", 2 * size**3, "GFLOP/s",
         seconds(product(dtype, out), square, square))
  for rows in (8, 32):
    for dtype, out in forms:
      matrices = [jnp.full((576, 1536), i, dtype) for i in range(count)]
      line(f"{rows} rows x [576, 1536]", f"{dtype} -> {out}",
           sum(w.nbytes for w in matrices), "GB/s of weights",
           seconds(chain(out), jnp.ones((rows, 576), dtype), matrices))
  x = jnp.ones((mega * 1_000_000 // 4,), jnp.float32)
  line(f"read {mega} MB", "sum of float32", x.nbytes, "GB/s", seconds(jax.jit(jnp.sum), x))
  line(f"copy {mega} MB", "x + 1, read and written", 2 * x.nbytes, "GB/s",
       seconds(jax.jit(lambda x: x + 1), x))


if __name__ == "__main__":
  host_memory.ensure()
  main()
