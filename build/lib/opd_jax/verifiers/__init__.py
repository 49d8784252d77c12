"""Verifiers: a response and the true answer -> a Verdict. No JAX here.

A verifier never raises on model text: what it cannot read earns 0 and a reason.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib

from opd_jax.verifiers import exact_match, math_answer
from opd_jax.verifiers.pool import Pool
from opd_jax.verifiers.verdict import Verdict

VERIFIERS = {"exact_match": exact_match.verify, "math_answer": math_answer.verify}

# Cheap and safe enough to run in this process, on this thread.
IN_PROCESS = ("exact_match",)

Verify = Callable[[Sequence[str], Sequence[str]], list[Verdict]]


@contextlib.contextmanager
def make(name: str, workers: int, timeout_s: float) -> Iterator[Verify]:
  """Yields a function from texts and answers to verdicts.

  Args:
    name: a key of `VERIFIERS`.
    workers: processes, for a verifier that needs them.
    timeout_s: hard limit for one text, seconds; beyond it the verdict is 0.
  Raises: ValueError for an unknown name.
  """
  if name not in VERIFIERS:
    raise ValueError(f"verifier.name is {name!r}; it must be one of {', '.join(VERIFIERS)}")
  verify = VERIFIERS[name]
  if name in IN_PROCESS:
    yield lambda texts, answers: [verify(t, a) for t, a in zip(texts, answers, strict=True)]
    return
  with Pool(verify, workers, timeout_s) as pool:
    yield pool
