"""Whose parameters a teacher has: functions from the training state to parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.train_state import TrainState

TeacherParams = Callable[[TrainState], Any]


def frozen(params: Any) -> TeacherParams:
  """A teacher that never changes: another model, or the student as it was at the start."""
  return lambda state: params


def current(state: TrainState) -> Any:
  """The student itself, as it is now."""
  return state.params


def ema(state: TrainState) -> Any:
  """The student's exponential moving average.

  Raises: ValueError if the run keeps none.
  """
  if state.ema is None:
    raise ValueError("an EMA teacher needs ema.rate > 0, found 0; set --config.ema.rate=0.05")
  return state.ema


def anchored(params: Any) -> TeacherParams:
  """A trust region: fixed parameters and the student's, whose logits a `scorer.Mixture` adds up."""
  return lambda state: (params, state.params)


def of_student(kind: str, params: Any) -> TeacherParams:
  """Whose parameters the student's own teacher has.

  Args:
    kind: "current", "frozen", "ema" or "trust_region".
    params: the student's at the start of a run; they are copied where they are kept, as training
      donates them.
  Raises: ValueError for another kind.
  """
  if kind not in KINDS:
    raise ValueError(f"teacher_params is {kind!r}; it must be one of {', '.join(KINDS)}")
  return KINDS[kind](params)


_kept = lambda params: jax.tree.map(jnp.copy, params)
KINDS = {
    "current": lambda params: current,
    "frozen": lambda params: frozen(_kept(params)),
    "ema": lambda params: ema,
    "trust_region": lambda params: anchored(_kept(params)),
}
