"""EVE's figures, of the cells that a run of configs/claims/eve.py has left.

    cells (JSON) -> PGR, rewards, divergences and win rates by method, seed and share of training

Thin lines are seeds, thick ones their mean; a panel of which nothing has been measured says so.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from opd_jax.evals import metrics, paired, position_bias

Cell = dict[str, Any]
FLOOR, CEILING = "weak", "ceiling"  # the stages between which there is a gap to be recovered
# The other measures of a sample that cells keep; see pipelines/sample_scores.py.
STUDENT, WEAK, REFERENCE = (f"eval/logprob/{who}" for who in ("student", "weak", "weak_reference"))
KL, WINS = "eval/k3/base", "eval/win_rate"


class Study(NamedTuple):
  """What has been measured; cells of which the code has changed since are there too."""

  stages: Mapping[str, Cell]
  methods: Mapping[str, Mapping[int, Cell]]  # by name and seed


def read(folder: str | pathlib.Path) -> Study:
  """The cells in a results folder: results/eve, or `results` in the workdir of a smaller form.

  Raises: ValueError if floor, ceiling or methods are not there.
  """
  found = [json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).glob("*/*.json"))]
  stages = {cell["who"]: cell for cell in found if cell["cell"].startswith("stages/")}
  methods: dict[str, dict[int, Cell]] = {}
  for cell in found:
    if cell["cell"].startswith("methods/") and "diverged" not in cell:
      methods.setdefault(cell["who"], {})[cell["seed"]] = cell
  if not {FLOOR, CEILING} <= stages.keys() or not methods:
    raise ValueError(f"{folder} has the stages {', '.join(stages) or '(none)'} and the methods "
                     f"{', '.join(methods) or '(none)'}; PGR needs {FLOOR}, {CEILING} "
                     "and a method: run configs/claims/eve.py to its end")
  return Study(stages, methods)


def mean_reward(cell: Cell) -> str:
  """The name of the metric that is a cell's mean gold reward."""
  return f"eval/mean@{cell['config']['eval']['samples']}"


def pgr(study: Study, rewards: Any) -> np.ndarray:
  """The performance gap recovered, (reward - floor) / (ceiling - floor), in percent.

  Returns: of the shape of `rewards`; NaN where the ceiling does not exceed the floor.
  Source: EVE, appendix 9.5.
  """
  floor, ceiling = (study.stages[name]["metrics"][mean_reward(study.stages[name])]
                    for name in (FLOOR, CEILING))
  rewards = np.asarray(rewards, float)
  if not ceiling > floor:
    return np.full_like(rewards, math.nan)
  return 100.0 * metrics.performance_gap_recovered(floor, rewards, ceiling)


def ends(study: Study, method: str) -> np.ndarray:
  """PGR of a method at the end of its training, percent, by seed."""
  return pgr(study, [cell["metrics"][mean_reward(cell)]
                     for cell in study.methods.get(method, {}).values()])


def shares(cell: Cell) -> np.ndarray:
  """How much of its training a cell has behind it at each of its evaluations, percent."""
  return 100.0 * np.array(cell["curves"]["step"]) / cell["config"]["total_steps"]


def column(cell: Cell, name: str) -> np.ndarray:
  """A metric at each evaluation of a cell; NaN where there is none."""
  steps = cell["curves"]["step"]
  return np.array([math.nan if x is None else x
                   for x in cell["curves"].get(name, [None] * len(steps))])


def implicit_reward(study: Study, methods: Sequence[str] = ("sft", "eve")) -> Figure:
  """Figure 2: weak reward of the student's samples, KL to the weak reference, and PGR."""
  panels = {
      "implicit weak reward, nats": lambda cell: column(cell, WEAK) - column(cell, REFERENCE),
      "KL(student || weak reference), nats":
          lambda cell: column(cell, STUDENT) - column(cell, REFERENCE),
      "PGR, %": lambda cell: pgr(study, column(cell, mean_reward(cell)))}
  return _over_training(study, methods, panels)


def overfitting(study: Study, methods: Sequence[str] = ("sft", "refinement", "eve")) -> Figure:
  """Figure 3, and with `weighted_labels` Figure 8: PGR over training."""
  return _over_training(study, methods, {
      "PGR, %": lambda cell: pgr(study, column(cell, mean_reward(cell)))})


def recovered(study: Study) -> Figure:
  """Figure 4: PGR of every method that is no point of a sweep, at the end of training."""
  names = [name for name in study.methods if not re.search(r"_(x|k|0p)?\d", name)]
  figure = Figure(figsize=(1.5 + 0.9 * len(names), 3.4), layout="constrained")
  _bars(figure.subplots(), {name: ends(study, name) for name in names}, "PGR, %")
  return figure


def ratios(study: Study) -> Figure:
  """Figure 5: PGR by beta / lambda, of the methods that differ from `eve` in it alone."""
  points = {}
  for name, cells in study.methods.items():
    config = next(iter(cells.values()))["config"]
    if _weighed(config) == _weighed(next(iter(study.methods["eve"].values()))["config"]):
      points[config["loss"]["eve"]["ratio"]] = ends(study, name)
  figure = Figure(figsize=(5.0, 3.4), layout="constrained")
  _by_parameter(figure.subplots(), {"eve": points}, "beta / lambda", "PGR, %")
  return figure


def scaling(study: Study) -> Figure:
  """Figure 6: PGR by the number of prompts, each for one epoch, and by the samples of a prompt."""
  figure = Figure(figsize=(10.0, 3.4), layout="constrained")
  for axis, mark, key, parameter in zip(figure.subplots(1, 2), "xk", ("rows", "responses"),
                                        ("prompts", "samples a prompt")):
    found: dict[str, dict[float, np.ndarray]] = {}
    for name, cells in study.methods.items():
      if match := re.fullmatch(rf"(sft|eve)(_{mark}\d+)?", name):
        data = next(iter(cells.values()))["config"]["data"]["builder_kw"]
        found.setdefault(match[1], {})[data[key]] = ends(study, name)
    if mark == "k":
      found.pop("sft", None)
    _by_parameter(axis, found, parameter, "PGR, %")
  return figure


def instructions(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
  """Figure 7: benchmarks of instruction following, with 95% intervals over prompts.

  Args:
    scores: benchmark -> method -> what `following` says.
  """
  figure = Figure(figsize=(4.2 * max(len(scores), 1), 3.4), layout="constrained")
  axes = figure.subplots(1, max(len(scores), 1), squeeze=False)[0]
  for axis, (name, found) in zip(axes, scores.items()):
    for place, mean in enumerate(found.values()):
      if mean["mean"] is None:
        continue
      axis.bar(place, 100.0 * mean["mean"], color=f"C{place % 10}", alpha=0.6)
      if mean["low"] is not None:
        axis.vlines(place, 100.0 * mean["low"], 100.0 * mean["high"], color="black")
    _named(axis, list(found), "%")
    axis.set_title(name)
  return _empty(figure, [axis for axis in axes if not axis.patches])


def following(workdir: str | pathlib.Path) -> Mapping[str, Any]:
  """How well a model follows instructions, as a benchmark's run says.

  Args:
    workdir: of configs/eval.py:ifeval or :ifbench, or of configs/judged.py.
  Returns: "mean", "low" and "high" (paired.over_prompts) of the share of prompts whose
    instructions are all followed; of the judged the length-controlled win rate of `a`, AlpacaEval
    2's measure.
  """
  judged = pathlib.Path(workdir, "judged.json")
  if judged.exists():
    return json.loads(judged.read_text())["means"]["length-controlled win rate"]
  records = json.loads(pathlib.Path(workdir, "eval", "eval.json").read_text())["records"]
  followed = np.array([np.mean(record["rewards"]) for record in records])
  return paired.over_prompts({"followed": followed}, position_bias.resample(len(followed), 0))[
      "followed"]


def over_optimization(study: Study) -> Figure:
  """Figure 9: win rate over the weak teacher by KL(student || base), at every evaluation.

  A line is a method with its regularization, the darker the larger, from the start of training,
  which is on the left, to its end, which is marked; seeds are averaged.
  """
  figure = Figure(figsize=(8.0, 4.2), layout="constrained")
  axis = figure.subplots()
  regularized = {
      "Reds": ("beta", lambda loss: loss["dpo"]["beta"], r"dpo(_0p\d+)?"),
      "Blues": ("beta / lambda", lambda loss: loss["eve"]["ratio"], r"eve|ratio_\w+"),
      "Greys": ("", lambda loss: 1.0, "sft")}
  for colors, (label, of, names) in regularized.items():
    found = sorted((of(next(iter(cells.values()))["config"]["loss"]), name)
                   for name, cells in study.methods.items() if re.fullmatch(names, name))
    for i, (value, name) in enumerate(found):
      x, y = (np.mean([column(cell, metric) for cell in study.methods[name].values()], axis=0)
              for metric in (KL, WINS))
      if np.isfinite(x * y).any():
        axis.plot(x, 100.0 * y, "o-", linewidth=1, markersize=5, markevery=[-1],
                  color=matplotlib.colormaps[colors](0.4 + 0.6 * (i + 1) / len(found)),
                  label=f"{name} ({label} {value:g})" if label else name)
  axis.axhline(50.0, color="gray", linestyle=":", linewidth=1)
  axis.set(xlabel="KL(student || base), nats a response (k3)", ylabel="wins over the weak, %")
  if axis.get_legend_handles_labels()[0]:
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
  return _empty(figure, [axis])


def _weighed(config: Mapping[str, Any]) -> Any:
  """What two points of the sweep of ratios share: the rows, and the numbers they are weighed by.

  Without weights (ratio 0) no numbers are read.
  """
  data, eve = config.get("data", {}), config["loss"].get("eve", {})
  return (config["loss"].get("objective"), data.get("builder_kw"), tuple(eve.get("fields", ())))


def _over_training(study: Study, methods: Sequence[str],
                   panels: Mapping[str, Callable[[Cell], np.ndarray]]) -> Figure:
  """A panel a measure, by the share of training; thin lines are seeds."""
  figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (label, of) in zip(axes, panels.items()):
    for i, method in enumerate(methods):
      cells = list(study.methods.get(method, {}).values())
      lines = [of(cell) for cell in cells]
      if not lines or not np.isfinite(lines).any():
        continue
      for line in lines:
        axis.plot(shares(cells[0]), line, color=f"C{i}", alpha=0.25, linewidth=0.8)
      axis.plot(shares(cells[0]), np.mean(lines, axis=0), ".-", color=f"C{i}", label=method)
    axis.set(xlabel="share of the training, %", ylabel=label)
    axis.set_xscale("symlog", linthresh=1.0)  # the first tenth is what the paper looks at
    axis.set_xticks([0, 1, 2, 5, 10, 20, 50, 100], [0, 1, 2, 5, 10, 20, 50, 100])
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(fontsize=8)
  return _empty(figure, [axis for axis in axes if not axis.lines])


def _by_parameter(axis: Axes, found: Mapping[str, Mapping[float, np.ndarray]], parameter: str,
                  label: str) -> None:
  """A line a method along a parameter: the mean over seeds, and each seed."""
  for i, (name, points) in enumerate(found.items()):
    order = sorted(points)
    axis.plot(range(len(order)), [np.mean(points[x]) for x in order], "o-", color=f"C{i}",
              label=name)
    for place, x in enumerate(order):
      axis.plot([place] * len(points[x]), points[x], "_", color=f"C{i}", alpha=0.6)
    axis.set_xticks(range(len(order)), [f"{x:g}" for x in order])
  axis.set(xlabel=parameter, ylabel=label)
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)


def _bars(axis: Axes, values: Mapping[str, np.ndarray], label: str) -> None:
  """A bar each, with the single values on it."""
  for place, each in enumerate(values.values()):
    axis.bar(place, np.mean(each), color=f"C{place % 10}", alpha=0.6)
    axis.plot([place] * len(each), each, "_", color="black")
  _named(axis, list(values), label)


def _named(axis: Axes, names: Sequence[str], label: str) -> None:
  axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
  axis.set_ylabel(label)
  axis.grid(alpha=0.3, axis="y")


def _empty(figure: Figure, axes: Sequence[Axes]) -> Figure:
  for axis in axes:
    axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
  return figure
