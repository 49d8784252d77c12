"""Checkpoints of a run: training state and data iterator, whole or not at all.

The config lies beside them in the workdir; teachers are never saved, they are named there.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as managers


class Checkpoints:
  """The numbered checkpoints in `workdir/checkpoints`; a context manager.

  Saving is asynchronous: the state is copied to the host before `save` returns (so it may
  be donated at once) and written behind the run's back. A checkpoint becomes visible by a
  rename when it is complete, so a run killed at any moment resumes from a whole one.
  """

  def __init__(self, workdir: str, config: ml_collections.ConfigDict):
    merit = lambda metrics: _merit(config, metrics)
    policies = [managers.LatestN(config.keep_last)]
    if config.keep_best:
      policies.append(managers.BestN(get_metric_fn=merit, n=config.keep_best))
    self._folder = (pathlib.Path(workdir) / "checkpoints").absolute()
    self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=merit,  # without it no metrics are written, and a restart forgets the best
            enable_async_checkpointing=True))

  def save(self, step: int, state: Any, data: dict[str, Any], metrics: dict[str, float]) -> None:
    """Saves after `step` updates.

    Args:
      step: updates done.
      state: pytree of arrays.
      data: state of the data iterator, JSON.
      metrics: of the evaluation of this very state, for `keep_best`; empty if there was none.
    Raises: OSError if this checkpoint, or the one before it that was still being written,
      does not reach the disk; the last whole checkpoint stays.
    """
    with self._clear_errors():
      self._manager.save(step, metrics=metrics, force=True, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)))

  def restore(self, like: Any, total_steps: int) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint: (updates done, state laid out as `like`, data state), or None.

    Raises: ValueError if it is beyond `total_steps`.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    if step > total_steps:
      raise ValueError(f"total_steps is {total_steps}, but {self._folder} already holds {step} "
                       f"updates; set total_steps to {step} or more, or choose another --workdir")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()))
    return step, found["state"], found["data"]

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error: Any) -> None:
    with self._clear_errors():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()

  @contextlib.contextmanager
  def _clear_errors(self) -> Iterator[None]:
    try:
      yield
    except (ValueError, OSError) as error:  # tensorstore says ValueError of a full disk
      whole = _steps(self._folder)
      reason = "".join(str(error).rpartition("Failed ")[1:])  # after paths and settings
      raise OSError(
          f"a checkpoint could not be written to {self._folder}; "
          + (f"that of step {whole[-1]} is whole and a restart goes on from it"
             if whole else "there is no earlier one")
          + f". The reason: {reason[:300]}") from error


def restore_params(workdir: str, like: Any, best: bool = False) -> Any:
  """A checkpoint's parameters alone, laid out as `like`, as `chosen` finds it."""
  abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.restore(chosen(workdir, best), args=ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)))
  return found["params"]


def chosen(workdir: str, best: bool = False) -> pathlib.Path:
  """The folder of a checkpoint's training state: the newest, or the best.

  Raises: ValueError if the workdir holds no checkpoint, or no evaluated one to be the best.
  """
  folder = (pathlib.Path(workdir) / "checkpoints").absolute()
  steps = _steps(folder)
  if not steps:
    raise ValueError(f"no checkpoint in {folder}; name the workdir of a run that saved one")
  return folder / str(best_step(workdir) if best else steps[-1]) / "state"


def latest(workdir: str) -> int:
  """Updates of the newest checkpoint, 0 if there is none."""
  return max(_steps(pathlib.Path(workdir, "checkpoints")), default=0)


def best_step(workdir: str) -> int:
  """The checkpoint that `checkpoint.best_metric` of the workdir's config ranks first.

  Raises: ValueError if there is no config, or no checkpoint with that metric.
  """
  folder, config = pathlib.Path(workdir) / "checkpoints", pathlib.Path(workdir) / "config.json"
  if not config.is_file():
    raise ValueError(f"{workdir} has no config.json to say which measure makes a checkpoint the "
                     "best; leave out @best for the newest")
  section = ml_collections.ConfigDict(json.loads(config.read_text())["checkpoint"])
  merit, step = max(
      (_merit(section, json.loads((folder / str(step) / "metrics" / "metrics").read_text())), step)
      for step in _steps(folder))
  if merit == -math.inf:
    raise ValueError(f"no checkpoint in {folder.absolute()} has a finite {section.best_metric}, so "
                     "none is the best; leave out @best for the newest")
  return step


def _merit(config: ml_collections.ConfigDict, metrics: dict[str, float]) -> float:
  """What ranks checkpoints, greatest first; one without a finite measure comes last."""
  value = metrics.get(config.best_metric, math.nan)
  if not math.isfinite(value):
    return -math.inf
  return value if config.best_mode == "max" else -value


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps of the whole checkpoints, ascending: unfinished ones have another name."""
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
