"""Verifiers: a response and the true answer -> a Verdict. No JAX here.

A verifier never raises on model text: what it cannot read earns 0 and a reason.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import math

from opd_jax.verifiers import (
    exact_match, instructions, math_answer, multiple_choice, notes, sandbox, tool_calls, unit_tests)
from opd_jax.verifiers.pool import Pool
from opd_jax.verifiers.verdict import Verdict

VERIFIERS = {"exact_match": exact_match.verify, "math_answer": math_answer.verify,
             "multiple_choice": multiple_choice.verify, "notes": notes.verify,
             "tool_calls": tool_calls.verify, "unit_tests": unit_tests.verify,
             "instructions": instructions.verify, "instructions_loose": instructions.verify_loose,
             "instructions_share": instructions.verify_share,
             "instructions_share_loose": instructions.verify_share_loose}

# Cheap and safe enough to run in this process, on this thread.
IN_PROCESS = ("exact_match", "multiple_choice", "notes", "tool_calls")

# Run code that a model wrote. The pool's workers start the sandboxes: they bring as many at a
# time as the config allows, a last limit should a sandbox fail to keep its own, and processes
# without JAX, which are small to start others from.
RUN_CODE = ("unit_tests",)

Verify = Callable[[Sequence[str], Sequence[str]], list[Verdict]]


@contextlib.contextmanager
def make(name: str, workers: int, timeout_s: float,
         allow_unsafe_code: bool = False) -> Iterator[Verify]:
  """Yields a function from texts and answers to verdicts.

  Args:
    name: a key of `VERIFIERS`.
    workers: processes, for a verifier that needs them.
    timeout_s: hard limit for one text, seconds; beyond it the verdict is 0. Of code's processor
      time, rounded up; code that waits may do so four times as long.
    allow_unsafe_code: whether a model's code may run where it cannot be isolated.
  Raises: ValueError for an unknown name, where a package is missing that the verifier needs, or
    where a model's code can neither be isolated nor is allowed to run without.
  """
  if name not in VERIFIERS:
    raise ValueError(f"verifier.name is {name!r}; it must be one of {', '.join(VERIFIERS)}")
  verify = VERIFIERS[name]
  if name in IN_PROCESS:
    yield lambda texts, answers: [verify(t, a) for t, a in zip(texts, answers, strict=True)]
    return
  if name.startswith("instructions"):
    instructions.check_installed()  # its workers could not say so
  patience_s = timeout_s
  if name in RUN_CODE:
    isolated = sandbox.is_isolated(allow_unsafe_code)
    limits = sandbox.Limits(cpu_s=math.ceil(timeout_s), wall_s=4 * timeout_s)
    verify = functools.partial(verify, limits=limits, isolated=isolated)
    # The right solution may have to run first.
    patience_s = unit_tests.PATIENCE_S + limits.wall_s + 2 * sandbox.SLACK_S
  with Pool(verify, workers, patience_s) as pool:
    yield pool
