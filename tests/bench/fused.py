"""Memory and time of the fused divergence against the naive one, forward and backward.

    python tests/bench/fused.py            # V=151,936, D=1024, T=1024 and 4096; half an hour
    python tests/bench/fused.py --forms reverse_kl --lengths 4096
    python tests/bench/fused.py --quick    # small, to try the script; asserts nothing

Naive is the textbook formula on whole [1, T, V] log-softmaxes, without our kernels' care for banned
tokens, which costs memory. Hidden states and the teacher's head are bfloat16; the student's head is
the float32 master that the optimizer keeps, so its gradient is float32. Every case runs in its own
process. Memory is what is taken beyond arguments and results (the head's gradient alone is 0.62 GB,
the same for both): XLA's temporary memory, and how far the process's resident peak (on a GPU the
device's) rose above what it held before, what the compiler leaves behind included. A form is compiled everywhere but run only where its memory fits. Exits with 1 if a
goal is missed: at most 5% of the naive memory at the largest T, by both measures; at most 1.1 times
its time where it runs.
"""

import argparse
import ctypes
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, fused, masked

MEMORY_GOAL, TIME_GOAL = 0.05, 1.1
SIZES = {"full": (151_936, 1024, (1024, 4096)), "quick": (16_384, 256, (256, 1024))}
REPEATS = 2
TOP = 100
CASES = (*divergences.KINDS, "jsd_top")
WIDE = 8192  # of the square product whose speed counts as the peak


def naive(student, head, teacher, teacher_head, mask, case):
  """The textbook formula on whole log-softmaxes."""
  scores = lambda hidden, head: jax.nn.log_softmax(jnp.einsum(
      "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32))
  kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  p, q = scores(student, head), scores(teacher, teacher_head)
  if case == "jsd_top":
    ids = jax.lax.top_k(jax.lax.stop_gradient(p), TOP)[1]
    p, q = (jnp.take_along_axis(x, ids, axis=-1) for x in (p, q))
    rest = lambda x: jnp.log1p(-jnp.minimum(jnp.sum(jnp.exp(x), -1, keepdims=True), 1 - 1e-7))
    p, q = (jnp.concatenate([x, rest(x)], axis=-1) for x in (p, q))
  m = jnp.logaddexp(p, q) - jnp.log(2.0)
  values = {"forward_kl": lambda: kl(q, p), "reverse_kl": lambda: kl(p, q),
            "jsd": lambda: 0.5 * kl(p, m) + 0.5 * kl(q, m)}[case.removesuffix("_top")]()
  return masked.token_mean(values, mask)


def tiled(student, head, teacher, teacher_head, mask, case):
  """The same by `fused`, with its own choice of tiles."""
  return fused.fused_divergence(student, head, teacher, teacher_head, mask,
                                case.removesuffix("_top"),
                                top_k=TOP if case == "jsd_top" else 0)[0]


FORMS = {"naive": naive, "fused": tiled}


def shapes(length: int, vocabulary: int, width: int) -> list[jax.ShapeDtypeStruct]:
  """States and head of the student, then the teacher's; the mask."""
  states = jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16)
  head = lambda dtype: jax.ShapeDtypeStruct((width, vocabulary), dtype)
  return [states, head(jnp.float32), states, head(jnp.bfloat16),
          jax.ShapeDtypeStruct((1, length), jnp.bool_)]


def operands(of: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
  """Random states and heads whose logits have a standard deviation of about one.

  Made row by row in place, so that making them leaves no memory behind.
  """
  rng, made = np.random.default_rng(0), []
  for x in of[:-1]:
    array = np.empty(x.shape, x.dtype)
    for row in array.reshape(-1, x.shape[-1]):
      row[:] = rng.standard_normal(x.shape[-1], np.float32) / x.shape[0] ** 0.5
    made.append(jnp.asarray(array))
  return [*made, jnp.ones(of[-1].shape, bool)]


def seconds(function, *arguments) -> float:
  """The fastest of a few calls."""
  taken = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    taken.append(time.perf_counter() - start)
  return min(taken)


def read_bytes(file: str, name: str) -> int:
  """A field of a file in /proc that counts in kB."""
  lines = pathlib.Path("/proc", file).read_text().splitlines()
  return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def resident(of_device: str, of_process: str) -> int:
  """Bytes in use now, or at the peak, by an accelerator or else by this process."""
  stats = jax.local_devices()[0].memory_stats()
  return stats[of_device] if stats else read_bytes("self/status", of_process)


def available() -> int:
  """Bytes that XLA's temporaries may take without thrashing, of the device or the machine."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return read_bytes("meminfo", "MemAvailable") // 2  # matrix libraries pack copies of their own


def measure(form: str, kind: str, length: int, vocabulary: int, width: int) -> dict:
  """One case: bytes from the compiler, then bytes and seconds from running it if it fits."""
  before, of = resident("bytes_in_use", "VmRSS"), shapes(length, vocabulary, width)
  step = jax.jit(jax.value_and_grad(
      lambda *x: FORMS[form](*x, kind), argnums=(0, 1))).lower(*of).compile()
  memory = step.memory_analysis()
  found = dict(temp=memory.temp_size_in_bytes, peak=None, seconds=None, matmul=None)
  if memory.temp_size_in_bytes + memory.output_size_in_bytes > available():
    return found
  print(json.dumps(found), flush=True)  # all there is if the system kills what follows
  ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed
  arrays = operands(of)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
  jax.block_until_ready(step(*arrays))
  found["peak"] = (resident("peak_bytes_in_use", "VmHWM") - before - sum(x.nbytes for x in arrays)
                   - memory.output_size_in_bytes)
  found["seconds"] = seconds(step, *arrays)
  if jax.default_backend() == "gpu":
    square = jnp.ones((WIDE, WIDE), jnp.bfloat16)
    square_product = jax.jit(jnp.matmul).lower(square, square).compile()
    jax.block_until_ready(square_product(square, square))
    found["matmul"] = 2 * WIDE**3 / seconds(square_product, square, square)
  return found


def in_own_process(*case) -> dict:
  """`measure`, where nothing else has raised the resident peak, and nobody else is killed."""
  child = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)],
                         stdout=subprocess.PIPE, text=True)
  if child.returncode not in (0, -signal.SIGKILL):
    raise RuntimeError(f"the case {case} failed; its message is above")
  return json.loads(child.stdout.splitlines()[-1])


def row(kind: str, length: int, form: str, found: dict, base: dict, flops: float) -> str:
  """One line of the table; GB are 10^9 bytes."""
  show = lambda x, unit=1e9: "does not fit" if x is None else f"{x / unit:.3g}"
  ratio = lambda name: ("" if found[name] is None or base[name] is None
                        else f"{found[name] / base[name]:.3f}")
  cells = [kind, f"{length}", form, show(found["temp"]), ratio("temp"), show(found["peak"]),
           ratio("peak"), show(found["seconds"], 1), ratio("seconds"), "", ""]
  if found["seconds"]:
    cells[-2] = f"{flops / found['seconds'] / 1e12:.3g}"
  if found["matmul"]:
    cells[-1] = f"{flops / found['seconds'] / found['matmul']:.2f}"
  return "| " + " | ".join(cells) + " |"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--forms", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--lengths", nargs="+", type=int)
  parser.add_argument("--case", type=json.loads, help="for the script's own children")
  options = parser.parse_args()
  if options.case:
    print(json.dumps(measure(*options.case)))
    return 0

  vocabulary, width, lengths = SIZES["quick" if options.quick else "full"]
  lengths = options.lengths or lengths
  print(f"V={vocabulary}, D={width}, B=1, forward + backward; GB and s, ratios to naive\n")
  print("| divergence | T | form | XLA temp GB | ratio | process peak GB | ratio | s | ratio | "
        "TFLOP/s | of matmul peak (GPU) |\n" + 11 * "|---" + "|")
  missed = []
  for kind in options.forms:
    for length in lengths:
      found = {form: in_own_process(form, kind, length, vocabulary, width) for form in FORMS}
      base, ours = found["naive"], found["fused"]
      flops = 4 * 2 * length * width * vocabulary  # two readouts, two gradients of one of them
      for form in FORMS:
        print(row(kind, length, form, found[form], base, flops), flush=True)
      for measure_of in ("temp", "peak"):
        if length == max(lengths) and base[measure_of] and (
            ours[measure_of] > MEMORY_GOAL * base[measure_of]):
          missed.append(f"{measure_of} memory of {kind}, T={length}: "
                        f"{ours[measure_of] / base[measure_of]:.3f} of naive")
      if base["seconds"] and ours["seconds"] > TIME_GOAL * base["seconds"]:
        missed.append(
            f"time of {kind}, T={length}: {ours['seconds'] / base['seconds']:.2f} x naive")
  if options.quick:
    return 0
  print("\n" + ("\n".join(f"MISSED {line}" for line in missed) or
                f"goals met: memory <= {MEMORY_GOAL:.0%} at T={max(lengths)}, "
                f"time <= {TIME_GOAL} x naive where naive fits"))
  return bool(missed)


if __name__ == "__main__":
  sys.exit(main())
