"""Checkpoints of a run: training state and data iterator, whole or not at all.

The config lies beside them in the workdir; teachers are never saved, they are named there.
"""

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
    self._manager = ocp.CheckpointManager(
        (pathlib.Path(workdir) / "checkpoints").absolute(),
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
    Raises: OSError (from this or the next call) if the disk is full; the last whole
      checkpoint stays.
    """
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
    self._manager.wait_until_finished()
    self._manager.close()


def restore_params(workdir: str, like: Any) -> Any:
  """The newest checkpoint's parameters alone, laid out as `like`.

  Raises: ValueError if the workdir holds no checkpoint.
  """
  folder = (pathlib.Path(workdir) / "checkpoints").absolute()
  steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
  if not steps:
    raise ValueError(f"no checkpoint in {folder}; name the workdir of a run that saved one")
  abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.restore(folder / str(steps[-1]) / "state", args=ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)))
  return found["params"]
