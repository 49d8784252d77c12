"""Is a claim borne out? Differences paired by seed, their 95% intervals, and the verdicts.

A verdict is computed from an interval and from what was claimed, never from a p-value or by eye:

    reproduced     the interval excludes 0 in the claimed direction
    reversed       it excludes 0 in the other direction
    inconclusive   it holds 0 and the claimed effect: too few seeds to tell
    not seen       it holds 0, and the claimed effect lies beyond it

Values are by seed, {seed: value}: the same seed is the same order of data and the same draws, so
what two methods share cancels in their difference.
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

BySeed = Mapping[int, float]


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


def verdict(found: Interval, effect: float) -> str:
  """What an interval says of a claimed difference.

  Args:
    found: of the difference.
    effect: as claimed, in the same unit; its sign is the claimed direction, and it is not 0.
  Returns: one of the four at the head of this file; "open" with fewer than 2 seeds.
  """
  if math.isnan(found.low):
    return "open"
  low, high = sorted(math.copysign(1.0, effect) * end for end in (found.low, found.high))
  if low > 0:
    return "reproduced"
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


def smallest_lead(student: Mapping[str, BySeed], experts: Mapping[str, float]) -> dict[int, float]:
  """The student minus each expert on that one's own domain: the smallest of these, by seed.

  Positive is "beats every expert"; a student that loses in one domain does not, whatever its
  average. The smallest of several noisy differences lies below the smallest true one: the error
  is against the claim.

  Args:
    student: domain -> accuracy by seed.
    experts: domain -> accuracy of its expert there.
  """
  if not experts:
    return {}
  seeds = set.intersection(*(set(student[domain]) for domain in experts))
  return {seed: min(student[domain][seed] - expert for domain, expert in experts.items())
          for seed in sorted(seeds)}


class Trend(NamedTuple):
  """How a measure moves with a parameter."""

  rho: Interval                          # Spearman's rank correlation of each seed
  breaks: list[tuple[int, Interval]]     # i: from point i to i + 1 it turns, beyond noise
  verdict: str


def trend(parameter: Sequence[float], curves: Sequence[BySeed]) -> Trend:
  """Whether a measure is monotone in a parameter, and where not.

  Args:
    parameter: its values, ascending.
    curves: the measure by seed, at each of them.
  Returns: rank correlations of the seeds that every point has (0 for a measure that never
    changes); the steps between neighbors whose paired change goes against the trend with an
    interval that excludes 0; and "reproduced" if the correlation's interval excludes 0 and there
    is no such step, "not seen" if there is one, else "inconclusive" ("open" below 2 seeds).
  """
  seeds = sorted(set.intersection(*map(set, curves))) if curves else []
  found = interval([spearman(parameter, [curve[seed] for curve in curves]) for seed in seeds])
  if math.isnan(found.low):
    return Trend(found, [], "open")
  steps = [interval(list(difference(b, a).values())) for a, b in zip(curves, curves[1:])]
  up = math.copysign(1.0, found.mean)
  breaks = [(i, step) for i, step in enumerate(steps) if max(up * step.low, up * step.high) < 0]
  if breaks:
    return Trend(found, breaks, "not seen")
  sure = found.low > 0 or found.high < 0
  return Trend(found, [], "reproduced" if sure else "inconclusive")


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
  """Rank correlation, ties averaged; 0 where either never changes."""
  if len(set(x)) < 2 or len(set(y)) < 2:
    return 0.0
  return float(stats.spearmanr(x, y).statistic)


def area(curve: Sequence[tuple[int, float]]) -> float:
  """Mean height of a curve of (step, value), by trapezoids: higher is faster at an equal end.

  Returns: NaN of fewer than two points.
  """
  if len(curve) < 2:
    return math.nan
  steps, values = np.asarray(curve, float).T
  return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
