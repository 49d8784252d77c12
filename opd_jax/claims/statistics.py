"""Is a claim borne out? Differences paired by seed, their 95% intervals, and the verdicts.

A verdict is computed from an interval and from what was claimed, never from a p-value or by eye:

    reproduced     the interval excludes 0 in the claimed direction
    reversed       it excludes 0 in the other direction
    inconclusive   it holds 0 and the claimed effect: too few seeds to tell
    not seen       it holds 0, and the claimed effect lies beyond it

"reproduced" says further if the interval ends below the claimed effect. Values are by seed,
{seed: value}: the same seed is the same order of data and the same draws, so what two methods share
cancels in their difference. Methods that share nothing, SFT and one that samples from its student,
are compared without pairing (`welch`).
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

BySeed = Mapping[int, float]
SMALLER = ", smaller than claimed"


class Interval(NamedTuple):
  """A mean over n seeds and its 95% interval, which fewer than 2 seeds do not have (NaN)."""

  mean: float
  low: float
  high: float
  n: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
  """Mean with Student's t interval.

  Args:
    values: one a seed, any unit.
    level: coverage, in (0, 1).
  Returns: mean -+ t_{(1 + level) / 2, n - 1} s / sqrt(n), s with ddof=1; of no values all NaN.
  """
  x, n = np.asarray(values, float), len(values)
  mean = float(x.mean()) if n else math.nan
  if n < 2:
    return Interval(mean, math.nan, math.nan, n)
  half = float(stats.t.ppf((1 + level) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
  return Interval(mean, mean - half, mean + half, n)


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
  """Mean of a minus that of b, which have no seed in common, and Welch's t interval.

  Returns: n is that of the smaller; the interval needs 2 of each. Degrees of freedom are
    Welch and Satterthwaite's: variances are not taken to be equal.
  """
  one, other = interval(a), interval(b)
  n, mean = min(one.n, other.n), one.mean - other.mean
  if n < 2:
    return Interval(mean, math.nan, math.nan, n)
  parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
  if not sum(parts):
    return Interval(mean, mean, mean, n)
  freedom = sum(parts)**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b)))
  half = float(stats.t.ppf((1 + level) / 2, freedom) * math.sqrt(sum(parts)))
  return Interval(mean, mean - half, mean + half, n)


def widened(found: Interval, error: float, level: float = 0.95) -> Interval:
  """An interval with the standard error of an independent term added, in quadrature."""
  more = float(stats.norm.ppf((1 + level) / 2)) * error
  half = math.hypot((found.high - found.low) / 2, more)
  return Interval(found.mean, found.mean - half, found.mean + half, found.n)


def verdict(found: Interval, effect: float) -> str:
  """What an interval says of a claimed difference.

  Args:
    found: of the difference.
    effect: as claimed, in the same unit; its sign is the claimed direction, and it is not 0.
  Returns: one of the four at the head of this file, "reproduced, smaller than claimed" among
    them; "open" with fewer than 2 seeds.
  """
  if math.isnan(found.low):
    return "open"
  low, high = sorted(math.copysign(1.0, effect) * end for end in (found.low, found.high))
  if low > 0:
    return "reproduced" + SMALLER * (high < abs(effect))
  if high < 0:
    return "reversed"
  return "inconclusive" if high >= abs(effect) else "not seen"


def equivalence(found: Interval, expected: float, margin: float) -> str:
  """What an interval says of a claim that something equals `expected`, give or take `margin`.

  To be equal must be shown, as a difference must: it is "reproduced" if the whole interval lies
  within the margin, "not seen" if the whole interval lies outside, else "inconclusive".
  """
  if math.isnan(found.low):
    return "open"
  low, high = expected - margin, expected + margin
  if low <= found.low and found.high <= high:
    return "reproduced"
  return "not seen" if found.high < low or found.low > high else "inconclusive"


def difference(a: BySeed, b: BySeed) -> dict[int, float]:
  """a - b, of the seeds that both have."""
  return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def share(a: BySeed, b: BySeed) -> dict[int, float]:
  """a / b, of the seeds that both have: which part of b's gain a has made; no seed where b is 0."""
  return {seed: a[seed] / b[seed] for seed in sorted(a.keys() & b.keys()) if b[seed]}


def lead(student: BySeed, expert: float, error: float, level: float = 0.95) -> Interval:
  """The student minus an expert, with the interval of the student's seeds and the expert's error.

  Args:
    error: standard error of `expert`, which has been measured once.
  """
  return widened(interval([x - expert for x in student.values()], level), error, level)


def beats_all(student: Mapping[str, BySeed], experts: Mapping[str, tuple[float, float]],
              effect: float) -> str:
  """Whether a student beats every expert on that one's own domain.

  An intersection-union test: to beat all of k experts is shown by showing it of each, at 95% and
  uncorrected. (The smallest of k noisy leads is no measure of it: it lies below 0 for a student
  that equals all experts.) That it does *not* is shown by one domain, at 0.05 / k, as there are k
  to find it in.

  Args:
    student: domain -> accuracy by seed.
    experts: domain -> accuracy of its expert there, and the standard error of that.
    effect: the lead that is claimed, > 0.
  Returns: "reproduced" if every domain's interval lies above 0 (", smaller than claimed" if one
    ends below the effect); else "reversed" if some domain's lies below 0, "not seen" if some
    domain's ends below the effect, "inconclusive" if none does; "open" with fewer than 2 seeds.
  """
  if not experts:
    return "open"
  each, strict = ([lead(student[domain], *expert, level) for domain, expert in experts.items()]
                  for level in (0.95, 1 - 0.05 / len(experts)))
  if any(math.isnan(found.low) for found in each):
    return "open"
  if all(found.low > 0 for found in each):
    return "reproduced" + SMALLER * any(found.high < effect for found in each)
  if any(found.high < 0 for found in strict):
    return "reversed"
  return "not seen" if any(found.high < effect for found in strict) else "inconclusive"


class Trend(NamedTuple):
  """How a measure moves with a parameter."""

  rho: Interval                          # Spearman's rank correlation of each seed
  steps: list[tuple[int, Interval]]      # i: from point i to i + 1 it moves, beyond noise
  direction: str                         # rises, falls, turns, unclear; open


def trend(parameter: Sequence[float], curves: Sequence[BySeed]) -> Trend:
  """Whether a measure rises or falls with a parameter, and where it moves.

  Args:
    parameter: its values, ascending.
    curves: the measure by seed, at each of them.
  Returns: rank correlations of the seeds that every point has (0 for a measure that never
    changes), their interval within [-1, 1]; the steps between neighbors whose paired change has an
    interval that excludes 0, at 0.05 / k as there are k steps to find one in; "turns" if there are
    steps in both directions, or one against correlations whose interval excludes 0; else "rises"
    or "falls" by that interval, "unclear" if it holds 0 ("open" below 2 seeds).
  """
  seeds = sorted(set.intersection(*map(set, curves))) if curves else []
  rho = interval([spearman(parameter, [curve[seed] for curve in curves]) for seed in seeds])
  if math.isnan(rho.low):
    return Trend(rho, [], "open")
  rho = rho._replace(low=max(rho.low, -1.0), high=min(rho.high, 1.0))
  level = 1 - 0.05 / max(len(curves) - 1, 1)
  moves = [interval(list(difference(b, a).values()), level) for a, b in zip(curves, curves[1:])]
  steps = [(i, step) for i, step in enumerate(moves) if step.low > 0 or step.high < 0]
  up = rho.low > 0 or any(step.low > 0 for _, step in steps)
  down = rho.high < 0 or any(step.high < 0 for _, step in steps)
  if up and down:
    return Trend(rho, steps, "turns")
  return Trend(rho, steps, "rises" if rho.low > 0 else "falls" if rho.high < 0 else "unclear")


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
  """Rank correlation, ties averaged; 0 where either never changes."""
  if len(set(x)) < 2 or len(set(y)) < 2:
    return 0.0
  return float(stats.spearmanr(x, y).statistic)
