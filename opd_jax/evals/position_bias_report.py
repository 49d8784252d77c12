"""What a person sees of the study of position bias: three tables and a picture."""

from collections.abc import Sequence
import pathlib
from typing import Any

from opd_jax import progress

Results = dict[str, Any]  # position_bias.json; see pipelines/position_bias.py


def rescue(results: Results) -> None:
  """Who finishes the student's beginnings right, by how much of a response was kept."""
  names = ("student", "teacher", "difference", "student_of_wrong", "teacher_of_wrong")
  found = results["rescue"]
  progress.table(
      "right answers from a student's prefix, % [95% interval]",
      ["kept", "student", "teacher", "teacher -\nstudent", "student,\nof wrong*",
       "teacher,\nof wrong*"],
      [[f"{100 * fraction:g}%", *(_percent(found[name], i) for name in names)]
       for i, fraction in enumerate(results["fractions"])])
  progress.note(f"{results['responses']} responses to {results['prompts']} prompts, each prefix "
                f"finished {results['continuations']} times by each model; * of responses that the "
                "student had finished wrong")


def along(results: Results) -> None:
  """The gap by tenths of the responses, before training and after."""
  stages = [stage for stage in ("before", "after") if stage in results]
  places = [f"{10 * i}-{10 * (i + 1)}%" for i in range(10)] + ["all"]
  progress.table(
      "along the student's own responses, nats per token [95% interval]",
      ["tokens", *(f"KL\n{stage}" for stage in stages), *(f"sampled\n{stage}" for stage in stages)],
      [[place, *(_nats(results[stage]["reverse_kl"], i) for stage in stages),
        *(_bare(results[stage]["sampled_kl"], i) for stage in stages)]
       for i, place in enumerate(places)])
  progress.note("KL(student || teacher) over the vocabulary; sampled: of the tokens drawn")
  whose = [(stage, who) for stage in stages for who in ("student", "teacher")]
  progress.table(
      "log-probability, nats per token; of whole responses: nats [95% interval]",
      ["tokens", *(f"{who}\n{stage}" for stage, who in whose)],
      [*([place, *(_bare(results[stage][who], i) for stage, who in whose)]
         for i, place in enumerate(places)),
       ["whole", *(_nats(results[stage][f"{who}_prefix"], -1) for stage, who in whose)]])


def runs(results: Results) -> None:
  """What each part of the responses taught, if students were trained."""
  if "runs" not in results:
    return
  progress.table(
      "trained on parts of each response: accuracy, % [95% interval]",
      ["tokens\nlearned from", "share of\nthe KL", "before", "after", "change"],
      [[name, *(_percent(found[what], None) for what in ("share_of_kl", "before", "after",
                                                         "change"))]
       for name, found in results["runs"].items()])
  progress.note("one seed: the intervals are over prompts, and know nothing of other seeds")


def picture(results: Results, path: pathlib.Path) -> None:
  """Draws everything into one PNG; bands and bars are 95% intervals over prompts."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
  _draw_rescue(axes[0, 0], results)
  _draw_runs(axes[0, 1], results.get("runs", {}))
  middles = [10 * i + 5 for i in range(10)]
  for stage, style in (("before", "-"), ("after", "--")):
    if stage not in results:
      continue
    found = results[stage]
    _band(axes[1, 0], middles, found["reverse_kl"], stage + " training", "tab:red", style)
    for who, color in (("student", "tab:blue"), ("teacher", "tab:orange")):
      _band(axes[1, 1], [10 * (i + 1) for i in range(10)], found[f"{who}_prefix"],
            f"{who}, {stage} training", color, style)
  axes[1, 0].set(title="KL(student || teacher) along the student's responses",
                 xlabel="position, % of the response", ylabel="nats per token")
  axes[1, 1].set(title="log-probability of the student's prefixes",
                 xlabel="length of the prefix, % of the response", ylabel="nats")
  for axis in axes.flat:
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize=8, frameon=False)
    else:
      axis.set_visible(False)  # no student was trained
  figure.savefig(path, dpi=80)
  plt.close(figure)


def _draw_rescue(axis: Any, results: Results) -> None:
  x = [100 * fraction for fraction in results["fractions"]]
  for who, color in (("student", "tab:blue"), ("teacher", "tab:orange")):
    _band(axis, x, results["rescue"][who], who, color, "-")
    # At 100% these are 0 by definition: the student had finished them wrong.
    _band(axis, x, results["rescue"][f"{who}_of_wrong"], f"{who}, of wrong responses", color, ":")
  axis.set(title="right answers from a student's prefix", xlabel="kept, % of the response",
           ylabel="share", ylim=(0, 1))


def _draw_runs(axis: Any, found: dict[str, Any]) -> None:
  styles = {"all": "-", "first": "--", "last": ":"}
  for name, run in found.items():
    line, = axis.plot(*zip(*run["curve"]), styles[name.split()[0]], marker="o", markersize=3,
                      label=f"learning from {name}")
    axis.vlines(run["curve"][-1][0], run["after"]["low"], run["after"]["high"],
                color=line.get_color(), alpha=0.4)
  axis.set(title="accuracy while training on parts of each response", xlabel="updates",
           ylabel="accuracy on held-out prompts")


def _band(axis: Any, x: Sequence[float], found: dict[str, list[float | None]], label: str,
          color: str, style: str) -> None:
  points = [row for row in zip(x, found["mean"], found["low"], found["high"]) if None not in row]
  if points:
    places, mean, low, high = zip(*points)
    axis.plot(places, mean, style, color=color, label=label, marker="o", markersize=3)
    axis.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)


def _percent(found: dict[str, Any], place: int | None) -> str:
  return _cell(found, place, lambda x: f"{100 * x:.0f}")


def _nats(found: dict[str, Any], place: int) -> str:
  return _cell(found, place, lambda x: f"{x:.2f}")


def _bare(found: dict[str, Any], place: int) -> str:
  mean = found["mean"][place]
  return "-" if mean is None else f"{mean:.2f}"


def _cell(found: dict[str, Any], place: int | None, text: Any) -> str:
  mean, low, high = (found[name] if place is None else found[name][place]
                     for name in ("mean", "low", "high"))
  return "-" if mean is None else f"{text(mean)} [{text(low)}, {text(high)}]"
