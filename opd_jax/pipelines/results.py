"""The section of a claims config in RESULTS.md, every number of it from the cells' JSON."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import ml_collections

from opd_jax import config as configs
from opd_jax.evals import claims as statistics
from opd_jax.pipelines import identity
from opd_jax.pipelines.markdown import (labeled, number_of, plain, points, span, table, within)

# An expert is one if it beats what it was made of by this much on its own domain.
EXPERT_LEAD = 0.15
VERDICTS = """\
Differences are paired by seed, with Student's t interval over the seeds. **reproduced**: it
excludes 0 in the claimed direction; **reversed**: in the other; **inconclusive**: it holds 0 and
the effect tested for; **not seen**: it holds 0 and not that effect. A claim that something equals
a value within a margin is **reproduced** if the interval lies within that margin, **not seen** if
it lies outside, else **inconclusive**. Intervals are not corrected for the number of rows: primary
rows were chosen beforehand and have the most seeds, the others are explorations."""
BUDGETS = """\
Student tokens are those that the student sampled for its updates; between methods with the same
number of updates and rows they differ by the length of its responses alone{spread}. SFT samples
none: it learns the teacher tokens. Seconds are a cell's own wall time, compilation and evaluations
included."""


class Measured(NamedTuple):
  """The results that hold."""

  stages: Mapping[str, dict[str, Any]]
  tuning: Mapping[str, Mapping[float, float]]           # tuned method -> value -> mean score
  values: Mapping[str, float | None]                    # method -> the value it is reported with
  methods: Mapping[str, Mapping[int, dict[str, Any]]]   # method -> seed -> result
  cells: Sequence[dict[str, Any]]                       # all of them


def render(config: ml_collections.ConfigDict, found: Measured, left: Sequence[str]) -> str:
  """The section of a claims config, as Markdown.

  Args:
    left: names of the cells that are open; the section says so.
  Raises: ValueError for a metric that the cells do not have.
  """
  parts = [f"## {config.title}", config.about.strip(), f"```\n{config.command}\n```",
           provenance(config, found)]
  if left:
    parts.append(f"**Not finished**: {len(left)} cells are open, and the tables are of the others. "
                 f"Open: {', '.join(left)}.")
  parts += ["### Claims", claims(config, found), VERDICTS]
  for claim in config.claims.values():
    if claim.kind == "experts":
      parts += [f"### `{claim.a}` and each expert on its own domain", experts_table(found, claim)]
  for sweep in config.sweeps.values():
    parts += [f"### {sweep.text}", *sweep_table(found, sweep)]
  parts += ["### Methods and budgets", methods(config, found),
            BUDGETS.format(spread=spread(found))]
  if config.tune.methods:
    parts += [f"### Tuning of `{config.tune.key}`", tuning(config, found)]
  if config.stages:
    parts += ["### Models to start from", stages(config, found)]
  return "\n\n".join(part for part in [*parts, config.notes.strip()] if part)


def provenance(config: ml_collections.ConfigDict, found: Measured) -> str:
  """From what, where and when."""
  if not found.cells:
    return ""
  every = lambda values: ", ".join(sorted(set(map(str, values))))
  machine = lambda key: every(cell["machine"][key] for cell in found.cells)
  minutes = sum(cell["wall_s"] for cell in found.cells) / 60
  here = sum(cell["wall_s"] / cell["machine"]["workers"] for cell in found.cells) / 60
  return (f"From {len(found.cells)} cells in `{config.results or 'results'}`, each with its config "
          f"and what it rests on: {every(cell['date'] for cell in found.cells)}; "
          f"{machine('cores')} cores of {machine('cpu')}, {machine('device')}, jax "
          f"{machine('jax')}; commit {every(cell['commit'] for cell in found.cells)}. The cells' "
          f"own wall times are {minutes:.0f} minutes in all, {machine('workers')} side by side: "
          f"{here:.0f} minutes.")


def claims(config: ml_collections.ConfigDict, found: Measured) -> str:
  """A row for each claim: what the paper says, what was run, our number, the verdict."""
  rows = []
  for claim in config.claims.values():
    ours = statistics.interval(list(contrast(found, claim).values()))
    number, sign = unit(claim), claim.kind != "share"
    tested = number(claim.effect, sign)
    if claim.margin:
      tested += f" -+ {number(claim.margin)}"
      verdict = statistics.equivalence(ours, claim.effect, claim.margin)
    else:
      verdict = statistics.verdict(ours, claim.effect)
    if experts(found, claim) and not counting(found, claim):
      verdict = "no expert"
    rows.append([claim.text, claim.paper, ran(found, claim), tested, within(ours, number, sign),
                 f"{ours.n}{', primary' * claim.primary}", f"**{verdict}**"])
  return table(("claim", "the paper", "what we ran", "tested for", "ours, 95%", "seeds", "verdict"),
               rows)


def unit(claim: ml_collections.ConfigDict) -> Any:
  """How a claim's numbers are written."""
  return {"share": plain, "experts": points, "difference": number_of(claim.metric)}[claim.kind]


def ran(found: Measured, claim: ml_collections.ConfigDict) -> str:
  """What a claim compares."""
  if claim.kind == "experts":
    none = [domain for domain in experts(found, claim) if domain not in counting(found, claim)]
    return (f"`{claim.a}` - the expert of each domain, there (points): the smallest of "
            + ", ".join(domain for domain in claim.experts if domain not in none)
            + (f"; without {', '.join(none)}, whose expert is none" if none else ""))
  if claim.kind == "share":
    return f"`{claim.a}` / `{claim.b}`, {claim.metric}"
  return f"`{claim.a}` - `{claim.b}`, {labeled(claim.metric)}"


def contrast(found: Measured, claim: ml_collections.ConfigDict) -> dict[int, float]:
  """The number that a claim is about, by seed."""
  if claim.kind == "experts":
    return statistics.smallest_lead(
        {domain: by_seed(found, claim.a, f"domain/{domain}") for domain in claim.experts},
        {domain: expert for domain, (_, expert) in counting(found, claim).items()})
  compare = {"difference": statistics.difference, "share": statistics.share}[claim.kind]
  a = by_seed(found, claim.a, claim.metric)
  return compare(a, by_seed(found, claim.b, claim.metric, tuple(a)))


def counting(found: Measured, claim: ml_collections.ConfigDict) -> dict[str, tuple[float, float]]:
  """The experts that are such: domain -> accuracy there of the base, and of the expert."""
  return {domain: pair for domain, pair in experts(found, claim).items()
          if pair[1] - pair[0] >= EXPERT_LEAD}


def experts(found: Measured, claim: ml_collections.ConfigDict) -> dict[str, tuple[float, float]]:
  """Domain -> accuracy there of the base, and of the expert; {} while one is not measured."""
  if not {claim.base, *claim.experts.values()} <= found.stages.keys():
    return {}
  return {domain: (metric(found.stages[claim.base], f"domain/{domain}"),
                   metric(found.stages[stage], f"domain/{domain}"))
          for domain, stage in claim.experts.items()}


def experts_table(found: Measured, claim: ml_collections.ConfigDict) -> str:
  """Base, expert and student on each domain."""
  rows, real = [], counting(found, claim)
  for domain, (base, expert) in experts(found, claim).items():
    student = by_seed(found, claim.a, f"domain/{domain}")
    lead = statistics.difference(student, dict.fromkeys(student, expert))
    rows.append([domain, points(base), points(expert),
                 f"{points(expert - base, sign=True)}: {'yes' if domain in real else '**no**'}",
                 within(statistics.interval(list(student.values())), points),
                 within(statistics.interval(list(lead.values())), points, sign=True)])
  return table(("domain", f"`{claim.base}`", "its expert",
                f"is it one (+{points(EXPERT_LEAD)} points)?", f"`{claim.a}`, 95%",
                f"`{claim.a}` - its expert, 95%"), rows)


def sweep_table(found: Measured, sweep: ml_collections.ConfigDict) -> list[str]:
  """A row for each value of the parameter; how monotone the measures are, and where they break."""
  rows, breaks = [], []
  curves = {name: [by_seed(found, method, name) for method in sweep.methods]
            for name in sweep.metrics}
  for i, (value, method) in enumerate(zip(sweep.points, sweep.methods)):
    rows.append([f"{value:g}", f"`{method}`", str(len(found.methods.get(method, {}))), *(
        within(statistics.interval(list(curve[i].values())), number_of(name))
        for name, curve in curves.items())])
  trends = {name: statistics.trend(sweep.points, curve) for name, curve in curves.items()}
  for name, trend in trends.items():
    breaks += [f"{labeled(name)} turns between {sweep.points[i]:g} and {sweep.points[i + 1]:g}, by "
               + within(step, number_of(name), sign=True) for i, step in trend.breaks]
  seeds = ", ".join(dict.fromkeys(str(trend.rho.n) for trend in trends.values()))
  rows.append(["rank correlation", "", seeds, *(within(t.rho, plain) for t in trends.values())])
  rows.append(["monotone?", "", "", *(f"**{trend.verdict}**" for trend in trends.values())])
  return [f"The paper: {sweep.paper}" if sweep.paper else "",
          table((sweep.parameter, "method", "seeds", *map(labeled, sweep.metrics)), rows),
          "Rank correlations (Spearman's) are those of each seed over all rows. **reproduced**: "
          "their interval excludes 0, and no step between neighbors goes the other way with an "
          "interval that excludes 0; such a step is a break, and gives **not seen**. Breaks: "
          f"{'; '.join(breaks) or 'none'}."]


def methods(config: ml_collections.ConfigDict, found: Measured) -> str:
  """What each method reached, and what it was given."""
  name, rows = config.tune.metric, []
  weighted = any("loss/weight" in cell["metrics"] for cell in found.cells)
  for method in config.methods:
    cells = list(found.methods.get(method, {}).values())
    broken = sum("diverged" in cell for cell in cells)
    value = found.values[method]
    weights = [cell["metrics"].get("loss/weight", 1.0) for cell in cells]
    rows.append([
        f"`{method}`", "" if value is None else f"{value:g}",
        within(statistics.interval(list(by_seed(found, method, name).values())), number_of(name)),
        *([plain(sum(weights) / len(weights)) if weights else "-"] if weighted else []),
        *(span([cell[key] for cell in cells])
          for key in ("updates", "rows", "student_tokens", "teacher_tokens", "wall_s")),
        ", ".join(map(str, found.methods.get(method, ())))
        + f" ({broken} diverged)" * bool(broken)])
  return table(("method", config.tune.key.split(".")[-1], f"{labeled(name)}, 95%",
                *["mean weight of a token"] * weighted, "updates", "rows an update",
                "student tokens", "teacher tokens", "seconds a cell", "seeds"), rows)


def spread(found: Measured) -> str:
  """By how much the methods' student tokens differ, of those that sample."""
  means = [sum(tokens) / len(tokens) for cells in found.methods.values()
           if (tokens := [cell["student_tokens"] for cell in cells.values()]) and any(tokens)]
  return f": by up to {100 * (max(means) / min(means) - 1):.0f}% here" if len(means) > 1 else ""


def tuning(config: ml_collections.ConfigDict, found: Measured) -> str:
  """The grid, what it gave, and what was taken."""
  tune, rows = config.tune, []
  show = number_of(tune.metric)
  for method in config.methods:
    value, who = found.values[method], tuned_as(config, method)
    taken = "open" if value is None else f"{value:g}"
    if who == method:
      means = found.tuning[method]
      if value in (min(tune.grid), max(tune.grid)):
        taken += ", **at the edge of the grid**: a better one may lie beyond"
      rows.append([f"`{method}`", *(show(means[x]) if x in means else "open" for x in tune.grid),
                   taken])
    else:
      rows.append([f"`{method}`", *[""] * len(tune.grid),
                   f"{taken}, that of `{who}`" if who else "not tuned: as in its config"])
  seeds = ", ".join(map(str, tune.seeds))
  return (f"By {labeled(tune.metric)}, of seed {seeds}, which is not among those reported.\n\n"
          + table(("method", *(f"{x:g}" for x in tune.grid), "taken"), rows))


def tuned_as(config: ml_collections.ConfigDict, method: str) -> str | None:
  """The tuned method whose value this one takes, which may be itself; None: as in its config."""
  if method in config.tune.methods:
    return method
  return config.tune.follows[method] if method in config.tune.follows else None


def stages(config: ml_collections.ConfigDict, found: Measured) -> str:
  """The models that the methods start from, and what they can do."""
  rows = []
  domains = {name for result in found.stages.values() for name in result["metrics"]
             if name.startswith("domain/")}
  names = [config.tune.metric, *sorted(domains)]
  for stage, section in config.stages.items():
    how = section.loss.signal if section.pipeline == "opd" else section.pipeline
    if result := found.stages.get(stage):
      scores = [number_of(name)(metric(result, name)) if name in result["metrics"] else ""
                for name in names]
      rows.append([f"`{stage}`", how, *scores, *(
          span([result[key]]) for key in ("updates", "student_tokens", "wall_s"))])
    else:
      rows.append([f"`{stage}`", how, "open"])
  return table(("stage", "how", *map(labeled, names), "updates", "student tokens", "seconds"), rows)


def by_seed(found: Measured, who: str, name: str, seeds: Sequence[int] = ()) -> dict[int, float]:
  """A metric of a method by seed, of the seeds where it is finite.

  Args:
    who: a method; or "stage:NAME", which is the same for all of `seeds`.
  """
  if who.startswith(identity.STAGE):
    stage = found.stages.get(who.removeprefix(identity.STAGE))
    values = dict.fromkeys(seeds, metric(stage, name)) if stage else {}
  else:
    values = {seed: metric(cell, name) for seed, cell in found.methods.get(who, {}).items()}
  return {seed: value for seed, value in values.items() if math.isfinite(value)}


def metric(result: Mapping[str, Any], name: str) -> float:
  """A number of a cell; NaN where it was not finite, or the run diverged.

  Raises: ValueError if it was not measured.
  """
  if "diverged" in result:
    return math.nan
  if name not in result["metrics"]:
    raise ValueError(f"{result['cell']} has no metric {name!r}."
                     + configs.nearest(name, result["metrics"])
                     + f" It has: {', '.join(result['metrics'])}")
  value = result["metrics"][name]
  return math.nan if value is None else value
