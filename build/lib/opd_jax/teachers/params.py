"""Whose parameters a teacher has: functions from the training state to parameters."""

from collections.abc import Callable
from typing import Any

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
