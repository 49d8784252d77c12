"""Does a weak model's critique help a strong one, and does it matter which critique?

A chain is an answer of S, the strong model, W's critique of it, and S's refinement given both.
pass@k asks whether any of the first k chains ends right, under six methods:

    S only              answers of S
    W only              answers of W
    S + W critic        refinements, each answer with the critique of it
    S + best critic     the first k answers, refined anew with one critique of the first k chains:
    S + random critic   one that had turned wrong into right, any, or one that had turned right
    S + worst critic    into wrong

Where no chain is of the wanted kind, any critique is taken, and the prompt counted: for k = 1 the
last three are one method, and more is to be expected of best than of worst only for k > 1. A
chain's own refinement is not used again for its answer: that it came out right is why its
critique was selected.

Right is a reward of 1. 95% intervals are a percentile bootstrap over prompts (evals/paired.py).

Source: OPCD (2606.00424), section 3 and Table 1; METHODS 5.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
import numpy as np

from opd_jax import progress
from opd_jax.evals import paired, position_bias

Rows = Sequence[Mapping[str, Any]]  # of a stage, see pipelines/critique_refine.py
Results = dict[str, Any]            # critique_refine.json

KINDS = ("random", "best", "worst")

# Each method's stage, whose rows hold what a chain ends with.
METHODS = {"S only": "answers", "W only": "weak_answers", "S + W critic": "refinements",
           "S + best critic": "selected_best", "S + random critic": "selected_random",
           "S + worst critic": "selected_worst"}

DIFFERENCES = (("S + W critic", "S only"), ("S + best critic", "S + random critic"),
               ("S + random critic", "S + worst critic"), ("S + worst critic", "S only"),
               ("S only", "W only"))


class Choice(NamedTuple):
  chain: int        # whose critique it is
  fell_back: bool   # there was none of the wanted kind


def select(before: np.ndarray, after: np.ndarray, k: int, kind: str,
           seed: Sequence[int]) -> Choice:
  """One critique of a prompt's first k chains, by what it did to its own answer.

  The chains are looked at in a random order, and the first of the kind is taken; if there is none,
  the first of all, which is what "random" takes. So with one seed the kinds differ only where they
  must, and each critique of a kind is equally likely.

  Args:
    before, after: f64[chains], rewards of the answers and of their refinements.
    k: how many chains to look at.
    kind: "best": turned wrong into right; "worst": right into wrong; "random": any.
    seed: of the order; whole numbers, at least 0.
  Raises: ValueError for another kind, or for more chains than there are.
  """
  if kind not in KINDS:
    raise ValueError(f"a critique is selected as one of {', '.join(KINDS)}, found {kind!r}")
  if not 1 <= k <= len(before):
    raise ValueError(f"of {len(before)} chains the first {k} cannot be looked at")
  was, now = np.asarray(before) >= 1.0, np.asarray(after) >= 1.0
  wanted = {"best": ~was & now, "worst": was & ~now, "random": np.ones(len(was), bool)}[kind]
  order = np.random.default_rng(list(seed)).permutation(k)
  found = order[wanted[order]]
  return Choice(int(found[0] if len(found) else order[0]), not len(found))


def pass_at(right: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
  """Whether any of the first k is right: bool[P, chains] -> "pass@k" -> f64[P], 0 or 1.

  It is the paper's measure, not the mean over all choices of k that `metrics.pass_at_k` is.
  """
  return {f"pass@{k}": right[:, :k].any(axis=1).astype(float) for k in ks}


def rewards(rows: Rows) -> np.ndarray:
  """Of the rows of a stage: f64[P, rows of a prompt]."""
  prompts = len({row["prompt"] for row in rows})
  return np.array([row["reward"] for row in rows], float).reshape(prompts, -1)


def values(rows: Rows, ks: Sequence[int]) -> dict[str, np.ndarray]:
  """pass@k of one method, f64[P] each, from the rows of its stage.

  Those of a selected critique have been made anew for each k, which they name.
  """
  if "k" not in rows[0]:
    return pass_at(rewards(rows) >= 1.0, ks)
  return {name: value for k in ks for name, value in pass_at(
      rewards([row for row in rows if row["k"] == k]) >= 1.0, [k]).items()}


def study(stages: Mapping[str, Rows], ks: Sequence[int], seed: int) -> Results:
  """What the chains say, from their rows alone.

  Args:
    stages: name -> rows; those of the selected critiques may be missing.
    ks: of pass@k, at most the number of chains.
    seed: of the bootstrap.
  Returns: fit for JSON: "prompts", "chains", "ks"; "means" and "differences", method -> "pass@k" ->
    what `paired.over_prompts` says; "chains_right", the share of all a method's chains, of those
    that have one critique each; "turned", what critiques did to their answers; "tokens", mean of a
    stage's rows; "how", stage -> how its rows came to an end -> their number; "fell_back", kind ->
    k -> prompts without a critique of the kind.
  """
  before, after = rewards(stages["answers"]), rewards(stages["refinements"])
  draws = position_bias.resample(len(before), seed)
  found = {method: values(stages[name], ks) for method, name in METHODS.items() if name in stages}
  was, now = before >= 1.0, after >= 1.0
  turned = {"wrong to right": ~was & now, "right to wrong": was & ~now,
            "right to right": was & now, "wrong to wrong": ~was & ~now}
  alone = {method: stages[name] for method, name in METHODS.items()
           if name in stages and "k" not in stages[name][0]}
  return {
      "prompts": len(before), "chains": before.shape[1], "ks": list(ks),
      "means": {method: paired.over_prompts(each, draws) for method, each in found.items()},
      "differences": {f"{a} - {b}": paired.over_prompts(
          {name: found[a][name] - found[b][name] for name in found[a]}, draws)
                      for a, b in DIFFERENCES if a in found and b in found},
      "chains_right": paired.over_prompts(
          {method: (rewards(rows) >= 1.0).mean(axis=1) for method, rows in alone.items()}, draws),
      "turned": {name: float(where.mean()) for name, where in turned.items()},
      "tokens": {name: float(np.mean([row["tokens"] for row in rows]))
                 for name, rows in stages.items()},
      "how": {name: dict(Counter(row["how"] for row in rows)) for name, rows in stages.items()},
      "fell_back": {kind: fallbacks(stages[f"selected_{kind}"], ks) for kind in ("best", "worst")
                    if f"selected_{kind}" in stages}}


def fallbacks(rows: Rows, ks: Sequence[int]) -> dict[str, int]:
  """k -> how many prompts had no critique of the kind among their first k."""
  found = Counter(row["k"] for row in rows if row["fell_back"] and row["chain"] == 0)
  return {str(k): found[k] for k in ks}


def report(results: Results) -> None:
  """Prints the tables, and notes on what is behind their numbers."""
  names = [f"pass@{k}" for k in results["ks"]]
  for title, what, sign in (
      ("any of the first k chains right, % [95% interval]", "means", ""),
      ("differences, points [95% interval]", "differences", "+")):
    progress.table(title, ["", *names], [
        [_label(method), *(_cell(found[name], sign) for name in names)]
        for method, found in results[what].items()])
  for line in notes(results):
    progress.note(line)


def notes(results: Results) -> list[str]:
  """Lines to be read with the tables."""
  share = lambda x: f"{100 * x:.1f}%"
  turned, how = results["turned"], results["how"]
  lines = [
      f"{results['prompts']} prompts, {results['chains']} chains each; right of all chains: "
      + ", ".join(f"{method} {share(found['mean'])}"
                  for method, found in results["chains_right"].items()),
      f"critiques turned {share(turned['wrong to right'])} of the answers from wrong to right, "
      f"{share(turned['right to wrong'])} from right to wrong",
      "tokens sampled, mean: " + ", ".join(f"{name} {x:.0f}" for name, x in
                                           results["tokens"].items() if "selected" not in name)]
  for kind, found in results["fell_back"].items():
    lines.append(f"no {kind} critique among the first k, so any: " + ", ".join(
        f"{count} of {results['prompts']} prompts at k={k}" for k, count in found.items()))
  for stage, found in how.items():
    if odd := {name: count for name, count in found.items() if name != "ended"}:
      lines.append(f"{stage}: " + ", ".join(f"{count} of {sum(found.values())} {name}"
                                            for name, count in sorted(odd.items())))
  return lines


def picture(results: Results) -> Figure:
  """Draws pass@k against k, with bars that are 95% intervals; W's gain for S is shaded."""
  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axis = figure.subplots()
  ks = results["ks"]
  styles = {"S only": ("black", "-"), "W only": ("gray", ":"), "S + W critic": ("tab:blue", "-"),
            "S + best critic": ("tab:green", "--"), "S + random critic": ("tab:olive", "--"),
            "S + worst critic": ("tab:red", "--")}
  line = lambda method: [100 * results["means"][method][f"pass@{k}"]["mean"] for k in ks]
  for place, method in enumerate(results["means"]):
    color, style = styles[method]
    axis.plot(ks, line(method), style, color=color, marker="o", markersize=4, label=method)
    for k in ks:
      one = results["means"][method][f"pass@{k}"]
      if one["low"] is not None:  # a little aside, so that bars do not hide each other
        axis.vlines(k * 1.02 ** (place - 2.5), 100 * one["low"], 100 * one["high"], color=color,
                    alpha=0.3)
  axis.fill_between(ks, line("S only"), line("S + W critic"), color="tab:blue", alpha=0.15,
                    linewidth=0)
  axis.set_xscale("log", base=2)
  axis.set_xticks(ks, [str(k) for k in ks])
  axis.set(title=f"{results['prompts']} prompts; shaded: S + W critic against S only",
           xlabel="k, chains", ylabel="pass@k, %")
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8, frameon=False)
  return figure


def transcript(stages: Mapping[str, Rows], place: int) -> str:
  """One chain as text: its answer, critique and refinement, with their rewards.

  Args:
    stages: name -> rows.
    place: of the chain among all rows of a stage.
  Raises: ValueError if the rows have no texts.
  """
  parts = []
  if "text" not in stages["answers"][place]:
    raise ValueError("these chains have no texts; those of guarded data are not kept")
  for name in ("answers", "critiques", "refinements"):
    row = stages[name][place]
    reward = f", reward {row['reward']:g}" if "reward" in row else ""
    parts.append(f"--- {name}, {row['how']}{reward}\n{row['text']}")
  return "\n".join(parts)


def _label(name: str) -> str:
  """A method as it is; a difference on two lines, without what both sides share."""
  return name.replace("S + ", "").replace(" - ", "\n- ") if " - " in name else name


def _cell(one: Mapping[str, Any], sign: str) -> str:
  if one["low"] is None:
    return f"{100 * one['mean']:{sign}.1f}"
  return (f"{100 * one['mean']:{sign}.1f}\n"
          f"[{100 * one['low']:{sign}.0f},{100 * one['high']:{sign}.0f}]")
