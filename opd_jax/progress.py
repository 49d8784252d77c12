"""What a person sees of a run: notes, a live progress bar, tables, and report.png."""

from collections.abc import Sequence
import datetime
import pathlib
import time
from typing import Any

from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn)
from rich.table import Table

from opd_jax import writer

console = Console()


def note(text: str) -> None:
  """One line for the user."""
  console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bar:
  """A live line: step, chosen metrics, time left. Plain lines where there is no terminal."""

  def __init__(self, total: int, done: int):
    self._total, self._done, self._start = total, done, time.monotonic()
    self._live = console.is_terminal
    self._progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
        TimeRemainingColumn(), console=console, disable=not self._live)
    self._task = self._progress.add_task("", total=total, completed=done)

  def update(self, step: int, metrics: dict[str, float] | None = None) -> None:
    """Moves to `step`; new metrics, when there are any, replace those shown."""
    if metrics is None:
      self._progress.update(self._task, completed=step)
      return
    text = "  ".join(f"{name} {value:,.3g}" if abs(value) < 1000 else f"{name} {value:,.0f}"
                     for name, value in metrics.items())
    self._progress.update(self._task, completed=step, description=text)
    if not self._live:
      seconds = (time.monotonic() - self._start) / max(step - self._done, 1)
      left = datetime.timedelta(seconds=round(seconds * (self._total - step)))
      note(f"step {step}/{self._total}  {text}  left {left}")

  def __enter__(self) -> "Bar":
    self._progress.start()
    return self

  def __exit__(self, *error: Any) -> None:
    self._progress.stop()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a small table."""
  out = Table(*columns, title=title)
  for row in rows:
    out.add_row(*row)
  console.print(out)


CURVES = (
    ("accuracy on held-out prompts", ("eval/mean@", "eval/pass@")),
    ("reward of the training rollouts", ("rollout/reward",)),
    ("reverse KL, nats per token", ("teacher/reverse_kl", "eval/reverse_kl")),
    ("loss", ("loss/total",)),
    ("entropy of the student, nats per token", ("student/entropy",)),
    ("response length, tokens", ("rollout/length", "eval/length")),
    ("share of responses that never end", ("rollout/truncated", "eval/truncated")),
    ("tokens per second", ("time/tokens_per_s",)),
)


def report(workdir: str) -> None:
  """Draws the run's curves into `workdir/report.png` from metrics.jsonl."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  lines = writer.read(workdir)
  figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
  for axis, (title, prefixes) in zip(axes.flat, CURVES):
    names = sorted({name for line in lines for name in line
                    if name.startswith(prefixes) and "decile" not in name})
    for name in names:
      points = [(line["step"], line[name]) for line in lines if name in line]
      axis.plot(*zip(*points), label=name, marker="o" if name.startswith("eval/") else None,
                markersize=3, linewidth=1.2)
    axis.set(title=title, xlabel="updates")
    axis.grid(alpha=0.3)
    if names:
      axis.legend(fontsize=8, frameon=False)
    else:
      axis.set_visible(False)  # not a curve of this pipeline
  figure.savefig(pathlib.Path(workdir) / "report.png", dpi=110)
  plt.close(figure)
