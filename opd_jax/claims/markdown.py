"""Tables and numbers as Markdown, and a file of sections of which each has one author."""

from collections.abc import Callable, Sequence
import math
import pathlib

from opd_jax.claims.statistics import Interval

# Metrics that are shares of something, shown in points.
SHARES = ("eval/mean@", "eval/pass@", "eval/truncated", "domain/", "gain/mean@", "gain/pass@",
          "curve/area", "curve/fall", "eval/accuracy", "rollout/reward", "rollout/truncated",
          "critique/kept", "refine/", "judge/yes")

Number = Callable[..., str]  # (x, sign=False) -> text; sign: a plus is written


def write_section(path: pathlib.Path, name: str, text: str) -> None:
  """Puts a section between its marks, in place of the one that is there; the others stay."""
  begin, end = (f"<!-- {name} {word}: opd_jax writes what lies between -->"
                for word in ("begins", "ends"))
  old = path.read_text() if path.is_file() else "# Results\n"
  before, _, rest = old.partition(begin)
  after = rest.partition(end)[2]
  parts = [before.strip("\n"), begin, text.strip("\n"), end, after.strip("\n")]
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_suffix(".tmp")
  aside.write_text("\n\n".join(part for part in parts if part) + "\n")
  aside.rename(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; rows that are too short are filled up."""
  line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ")
                                         for cell in cells) + " |"
  full = [[*row, *[""] * (len(header) - len(row))] for row in rows]
  return "\n".join([line(header), "|" + "---|" * len(header), *map(line, full)])


def in_points(metric: str) -> bool:
  """Whether a metric is a share of something, and shown in points."""
  return metric.startswith(SHARES)


def number_of(metric: str) -> Number:
  """How a metric's numbers are written."""
  return points if in_points(metric) else plain


def labeled(metric: str) -> str:
  """A metric's name, and its unit if that is points."""
  return metric + " (points)" * in_points(metric)


def points(x: float, sign: bool = False) -> str:
  """A share as points: 0.123 -> 12.3."""
  return f"{100 * x:{'+' if sign else ''}.1f}"


def plain(x: float, sign: bool = False) -> str:
  """A number with three decimals, a large one with one."""
  return f"{x:{'+' if sign else ''}.{1 if abs(x) >= 10 else 3}f}"


def within(x: Interval, number: Number, sign: bool = False) -> str:
  """A mean with its interval: "12.3 [10.1, 14.5]"; "-" of no seeds."""
  if not x.n:
    return "-"
  ends = "" if math.isnan(x.low) else f" [{number(x.low, sign)}, {number(x.high, sign)}]"
  return number(x.mean, sign) + ends


def span(values: Sequence[float]) -> str:
  """A mean, and from where to where the values lie if they differ: "1,020 (990 to 1,050)"."""
  if not values:
    return "-"
  mean, low, high = (f"{x:,.0f}" for x in (sum(values) / len(values), min(values), max(values)))
  return mean + (f" ({low} to {high})" if low != high else "")
