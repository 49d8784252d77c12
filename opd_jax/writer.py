"""Metrics to the log, to metrics.jsonl, and to TensorBoard or W&B. None is computed here."""

import json
import math
import pathlib
from typing import Any
import uuid

import ml_collections

from opd_jax import distributed

WRITERS = ("jsonl", "tensorboard", "wandb")


class Writer:
  """Writes flat dicts of scalars by step; a context manager.

  A resumed run first removes what was written after the checkpoint it goes on from, so
  metrics.jsonl reads as if the run had never been broken.

  Args:
    workdir: where metrics.jsonl and tensorboard/ go.
    config: the whole config; reads `writers`.
    first_step: updates already done; 0 starts the files anew.
  Raises: ValueError for a writer that does not exist or is not installed.
  """

  def __init__(self, workdir: str, config: ml_collections.ConfigDict, first_step: int):
    if unknown := set(config.writers) - set(WRITERS):
      raise ValueError(f"writers has {sorted(unknown)}; it may hold {', '.join(WRITERS)}")
    folder = pathlib.Path(workdir)
    self._jsonl = self._tensorboard = self._wandb = None
    if not distributed.is_first():  # all processes have the same metrics
      return
    if "jsonl" in config.writers:
      path = folder / "metrics.jsonl"
      # Without a checkpoint the run begins again, and its first evaluation with it.
      kept = [line for line in read_lines(path)
              if first_step and json.loads(line)["step"] <= first_step]
      aside = path.with_suffix(".tmp")  # a kill in between loses nothing
      aside.write_text("".join(kept))
      aside.rename(path)
      self._jsonl = path.open("a", buffering=1)
    if "tensorboard" in config.writers:
      import tensorboardX
      self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"),
                                                     purge_step=first_step + 1)
    if "wandb" in config.writers:
      self._wandb = _wandb(workdir, config)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes metrics after `step` updates; names are `section/name`.

    JSON knows no NaN and no infinity: metrics.jsonl has null, TensorBoard no point.
    """
    metrics = {name: float(value) for name, value in metrics.items()}
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if self._jsonl:
      line = {"step": step, **{name: finite.get(name) for name in metrics}}
      self._jsonl.write(json.dumps(line, allow_nan=False) + "\n")
    if self._tensorboard:
      for name, value in finite.items():
        self._tensorboard.add_scalar(name, value, step)
      self._tensorboard.flush()
    if self._wandb:
      self._wandb.log(metrics, step=step)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *error: Any) -> None:
    if self._jsonl:
      self._jsonl.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()


def read_lines(path: pathlib.Path) -> list[str]:
  """The whole lines of metrics.jsonl; a line cut off by a kill is not one."""
  if not path.is_file():
    return []
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read(workdir: str) -> list[dict[str, float]]:
  """What a run has written so far, one dict a line, "step" among its keys; null is NaN."""
  lines = map(json.loads, read_lines(pathlib.Path(workdir) / "metrics.jsonl"))
  return [{name: math.nan if value is None else value for name, value in line.items()}
          for line in lines]


def _wandb(workdir: str, config: ml_collections.ConfigDict) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ValueError("writers names 'wandb', which is not installed; install it with "
                     "EXTRAS=wandb bash launch/env.sh") from error
  # The id stays with the workdir, so a resumed run goes on in its own W&B run. The steps it
  # repeats have the values they had; W&B keeps the first.
  kept = pathlib.Path(workdir) / "wandb_id"
  if not kept.is_file():
    kept.write_text(uuid.uuid4().hex[:12])
  return wandb.init(dir=workdir, id=kept.read_text(), resume="allow", config=config.to_dict(),
                    allow_val_change=True)  # total_steps, for one, may grow
