"""Which of two responses does a judge prefer, how often, and would it if both were as long?

Of every pair of responses to one prompt, a's and b's, the judge prefers a (1), b (0) or neither
(1/2). What it did not say, or not so that it can be read, is left out and counted.

    win rate                    mean preference, prompt by prompt
    length-controlled win rate  the same, were all pairs of one length: see `length_controlled`
    shown first preferred       how often the response shown first won, whichever it was: 0.5 for a
                                judge that does not look at the place. The order is drawn, so a
                                judge that looks at nothing else leaves the win rate near 0.5

95% intervals are a percentile bootstrap over prompts (evals/paired.py).

Source: AlpacaEval 2 (2404.04475).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from opd_jax import progress
from opd_jax.evals import paired, position_bias

Rows = Sequence[Mapping[str, Any]]  # judgements, see pipelines/judged.py
Results = dict[str, Any]            # judged.json

PREFERENCE = {"a": 1.0, "tie": 0.5, "b": 0.0, None: np.nan}
RIDGE = 0.01  # on the coefficients, in units of one pair's loss: C = 100, AlpacaEval's without CV


def length_controlled(preference: np.ndarray, difference: np.ndarray,
                      counts: np.ndarray | None = None) -> float:
  """The win rate that a logistic regression expects where both responses are of one length.

      P(a preferred) = sigmoid(model + length tanh(difference / std(difference)))

  is fitted to the pairs, and sigmoid(model) is returned. A preference of 1/2 is half of each.

  This is AlpacaEval 2's generalized linear model without its third term, an interaction of the
  model with each instruction's difficulty: difficulties come from a fit over the many models of a
  leaderboard to the same 805 instructions, and here are two models and other instructions. (Theirs
  calls what is left "length_controlled_minimal".) Without it all instructions have one
  expectation, and their mean is that. Nor are there their answers of models told to be brief or
  verbose, which they mix in at a weight of 0.2. Theirs is shrunk by L1 at a strength chosen by
  cross-validation; ours by a small fixed L2, which changes nothing but that the fit is finite
  where one side or the longer response always wins.

  Args:
    preference: f64[P] in [0, 1], of a over b.
    difference: f64[P], length of a's response less that of b's, characters.
    counts: how often each pair is there, as in a draw of the bootstrap; None: once.
  Returns: the win rate; NaN without pairs, or where all differ by one length that is not 0:
    nothing can be told from those.
  """
  counts = np.ones(len(preference)) if counts is None else np.asarray(counts, float)
  there = counts > 0
  preference, difference, counts = preference[there], difference[there], counts[there]
  if not len(preference):
    return np.nan
  if (difference == difference[0]).all():
    x = np.zeros(len(difference))
    if difference[0]:
      return np.nan
  else:
    mean = np.average(difference, weights=counts)
    x = np.tanh(difference / np.sqrt(counts @ (difference - mean) ** 2 / (counts.sum() - 1)))
  design = np.stack([np.ones(len(x)), x])

  def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
    z = theta @ design
    value = counts @ (np.logaddexp(0.0, z) - preference * z) + 0.5 * RIDGE * theta @ theta
    return value, design @ (counts * (special.expit(z) - preference)) + RIDGE * theta

  def curvature(theta: np.ndarray) -> np.ndarray:
    p = special.expit(theta @ design)
    return design * (counts * p * (1 - p)) @ design.T + RIDGE * np.eye(2)

  found = optimize.minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact",
                            options=dict(gtol=1e-6))
  return float(special.expit(found.x[0]))


def study(rows: Rows, seed: int) -> Results:
  """What the judgements say, from their rows alone.

  Args:
    rows: one a prompt: "prompt", "a", "b" (the texts), "flipped" (b was shown first), "preferred"
      ("a", "b", "tie", or None) and "how" that came about.
    seed: of the bootstrap.
  Returns: fit for JSON: "prompts"; "means", metric -> what `paired.over_prompts` says; "preferred"
    and "how", counts; "characters", mean length of a's and b's responses; "unread", the prompts of
    which there is no preference and why.
  """
  preference = np.array([PREFERENCE[row["preferred"]] for row in rows])
  flipped = np.array([row["flipped"] for row in rows])
  asked = np.array([row["how"] != "same" for row in rows])
  draws = position_bias.resample(len(rows), seed)
  means = paired.over_prompts({
      "win rate": preference,
      "shown first preferred": np.where(asked, np.where(flipped, 1 - preference, preference),
                                        np.nan)}, draws)
  difference = np.array([len(row["a"]) - len(row["b"]) for row in rows], float)
  known = ~np.isnan(preference)
  fit = lambda counts: length_controlled(preference[known], difference[known], counts[known])
  again = np.array([fit(counts) for counts in draws]) if known.sum() > 1 else np.array([np.nan])
  mean = fit(np.ones(len(rows)))
  low, high = np.nanquantile(again, (0.025, 0.975)) if not np.isnan(again).all() else (None, None)
  means["length-controlled win rate"] = {
      "mean": None if np.isnan(mean) else mean, "low": low, "high": high,
      "prompts": int(known.sum())}
  return {
      "prompts": len(rows),
      "means": {name: means[name] for name in ("win rate", "length-controlled win rate",
                                               "shown first preferred")},
      "preferred": Counter(row["preferred"] or "unread" for row in rows),
      "how": Counter(row["how"] for row in rows),
      "characters": {side: float(np.mean([len(row[side]) for row in rows])) for side in "ab"},
      "unread": [{"prompt": row["prompt"], "how": row["how"]} for row in rows
                 if row["preferred"] is None]}


def report(results: Results) -> None:
  """Prints the table, and notes on what is behind its numbers."""
  progress.table("a against b, [95% interval over prompts]",
                 *paired.table({"": results["means"]}))
  for line in notes(results):
    progress.note(line)


def notes(results: Results) -> list[str]:
  """Lines to be read with the table."""
  characters = results["characters"]
  lines = ["preferred: " + ", ".join(f"{name} {count}"
                                     for name, count in sorted(results["preferred"].items())),
           f"characters, mean: a {characters['a']:.0f}, b {characters['b']:.0f}"]
  if same := results["how"].get("same"):
    lines.append(f"{same} pairs are of one text: ties, and the judge was not asked")
  if unread := results["unread"]:
    counts = Counter(one["how"] for one in unread)
    lines.append(f"no preference of {len(unread)} of {results['prompts']} prompts: " + "; ".join(
        f"{count} {how} (" + ", ".join([one["prompt"] for one in unread if one["how"] == how][:3])
        + (", ..." if count > 3 else "") + ")" for how, count in sorted(counts.items())))
  if results["means"]["length-controlled win rate"]["mean"] is None:
    lines.append("no length-controlled win rate: " + (
        "nothing was preferred" if len(unread) == results["prompts"] else
        "a's and b's responses differ by the same length at every prompt"))
  return lines
