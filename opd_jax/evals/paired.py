"""Metrics of the same prompts under several conditions: means, what differs, how it is shown.

A metric may mean nothing for a prompt: there it is NaN, and the prompt is left out of that mean and
counted, never scored 0. Intervals are 95%, by a percentile bootstrap over prompts, and differences
are taken prompt by prompt, so that what makes a prompt hard cancels.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from opd_jax.evals import position_bias

Values = Mapping[str, np.ndarray]            # metric -> f64[P], NaN where it is undefined
Means = Mapping[str, Mapping[str, Any]]      # metric -> "mean", "low", "high", "prompts"


def over_prompts(values: Values, draws: np.ndarray) -> dict[str, dict[str, Any]]:
  """Means over the prompts where a metric is defined, and their intervals.

  Args:
    values: of the metrics.
    draws: from `position_bias.resample`.
  Returns: of each metric "prompts", how many it is defined for, "mean" (None if for none), and
    "low" and "high" (None if for fewer than 2: one prompt says nothing of others).
  """
  stacked = np.stack(list(values.values()))
  there = ~np.isnan(stacked)
  found = position_bias.interval(np.where(there, stacked, 0.0), there, draws)
  out = {}
  for i, (name, count) in enumerate(zip(values, there.sum(axis=1).tolist())):
    low, high = (found[end][i] if count > 1 else None for end in ("low", "high"))
    out[name] = {"mean": found["mean"][i], "low": low, "high": high, "prompts": count}
  return out


def compare(values: Mapping[str, Values], against: str, seed: int) -> dict[str, Any]:
  """Means under every condition, and differences from one of them.

  Args:
    values: condition -> metric -> f64[P]; the same metrics of the same prompts for all.
    against: the condition that is subtracted from the others.
    seed: of the bootstrap; all intervals use the same draws.
  Returns: fit for JSON: "means", condition -> what `over_prompts` returns; "against"; and
    "differences", the same of every other condition, over the prompts where both are defined.
  Raises: ValueError if there is no such condition, or no prompt.
  """
  if against not in values:
    raise ValueError(f"nothing is known of {against!r}, to compare with; there are "
                     f"{', '.join(map(repr, values))}")
  base = values[against]
  prompts = len(next(iter(base.values())))
  if not prompts:
    raise ValueError("there are no prompts to take means over")
  draws = position_bias.resample(prompts, seed)
  return {
      "means": {name: over_prompts(found, draws) for name, found in values.items()},
      "against": against,
      "differences": {name: over_prompts({metric: found[metric] - base[metric] for metric in base},
                                         draws)
                      for name, found in values.items() if name != against}}


def table(found: Mapping[str, Means], sign: bool = False) -> tuple[list[str], list[list[str]]]:
  """The header and rows of a table, for `markdown.table` and `progress.table`.

  Args:
    found: condition -> means or differences of the metrics.
    sign: whether a plus is written, as of differences.
  Returns: a row a metric, "0.617 [0.551, 0.689]" a condition, "-" where the metric is undefined
    for all prompts. The last column says how many prompts count, "31 to 37" if conditions differ.
  """
  metrics = next(iter(found.values()), {})
  rows = [[metric, *(_cell(each[metric], sign) for each in found.values()),
           _span([each[metric]["prompts"] for each in found.values()])] for metric in metrics]
  return ["metric", *found, "prompts"], rows


def picture(found: Mapping[str, Means], marks: Mapping[str, float]) -> Figure:
  """Draws a panel a metric, a line a condition: the mean and its interval.

  Args:
    found: condition -> means or differences of the metrics.
    marks: metric -> a value at which a dotted line is drawn.
  Returns: the figure, which `savefig` writes and a notebook shows.
  """
  metrics, names = list(next(iter(found.values()))), list(found)
  columns = min(4, len(metrics))
  rows = -(-len(metrics) // columns)
  figure = Figure(figsize=(3.2 * columns, rows * (1.0 + 0.25 * len(names))), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
  for axis, metric in zip(axes.flat, metrics):
    for place, name in enumerate(names):
      one = found[name][metric]
      if one["low"] is not None:
        axis.hlines(place, one["low"], one["high"], color="tab:blue", alpha=0.5)
      if one["mean"] is not None:
        axis.plot(one["mean"], place, "o", color="tab:blue", markersize=4)
    if metric in marks:
      axis.axvline(marks[metric], color="gray", linestyle=":", linewidth=1)
    axis.set_title(metric, fontsize=10)
    axis.grid(alpha=0.3)
  axes[0, 0].set_yticks(range(len(names)), names)
  axes[0, 0].set_ylim(len(names) - 0.5, -0.5)  # the first on top
  for axis in axes.flat[len(metrics):]:
    axis.set_visible(False)
  return figure


def _cell(one: Mapping[str, Any], sign: bool) -> str:
  if one["mean"] is None:
    return "-"
  mean, *ends = (f"{x:{'+' if sign else ''}.3f}" for x in (one["mean"], one["low"], one["high"])
                 if x is not None)
  return mean + (f" [{', '.join(ends)}]" if ends else "")


def _span(counts: list[int]) -> str:
  low, high = min(counts), max(counts)
  return f"{low}" if low == high else f"{low} to {high}"
