"""Checkpoints of a run: training state and data iterator, whole or not at all.

The config lies beside them in the workdir; teachers are never saved, they are named there.
"""

from collections.abc import Iterator
import contextlib
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
    policies = [managers.LatestN(config.keep_last)]
    if config.keep_best:
      policies.append(managers.BestN(
          get_metric_fn=lambda metrics: metrics.get(config.best_metric, float("-inf")),
          n=config.keep_best, keep_checkpoints_without_metrics=False))
    self._folder = (pathlib.Path(workdir) / "checkpoints").absolute()
    self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True))

  def save(self, step: int, state: Any, data: dict[str, Any], metrics: dict[str, float]) -> None:
    """Saves after `step` updates.

    Args:
      step: updates done.
      state: pytree of arrays.
      data: state of the data iterator, JSON.
      metrics: of the last evaluation, for `keep_best`.
    Raises: OSError if this checkpoint, or the one before it that was still being written,
      does not reach the disk; the last whole checkpoint stays.
    """
    with self._clear_errors():
      self._manager.save(step, metrics=metrics or None, force=True, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)))

  def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint: (updates done, state laid out as `like`, data state), or None."""
    step = self._manager.latest_step()
    if step is None:
      return None
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


def restore_params(workdir: str, like: Any) -> Any:
  """The newest checkpoint's parameters alone, laid out as `like`.

  Raises: ValueError if the workdir holds no checkpoint.
  """
  folder = (pathlib.Path(workdir) / "checkpoints").absolute()
  steps = _steps(folder)
  if not steps:
    raise ValueError(f"no checkpoint in {folder}; name the workdir of a run that saved one")
  abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.restore(folder / str(steps[-1]) / "state", args=ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)))
  return found["params"]


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps of the whole checkpoints, ascending: unfinished ones have another name."""
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
