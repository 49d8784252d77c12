"""The section of a claims config in RESULTS.md, every number of it from the cells' JSON."""

from collections.abc import Sequence
import math

import ml_collections

from opd_jax.claims import contrasts, statistics
from opd_jax.claims.contrasts import Measured, by_seed
from opd_jax.claims.markdown import labeled, number_of, plain, points, span, table, within

VERDICTS = """\
Differences are paired by seed, with Student's t interval over the seeds; "unpaired" ones, between
methods that do not see the same rows, have Welch's. **reproduced**: the interval excludes 0 in the
claimed direction, and is **smaller than claimed** if it ends below the effect tested for;
**reversed**: it excludes 0 in the other direction; **inconclusive**: it holds 0 and that effect;
**not seen**: it holds 0 and not that effect. Something equal to a value within a margin is
**reproduced** if the interval lies within that margin, **not seen** if outside, else
**inconclusive**; a share of a gain has no verdict unless that gain's interval lies above 0. A run
that diverged counts, and with what it started from; if that was not measured there is no verdict.
There is no verdict if what is compared with **ends below its start**: leaving the model alone would
beat it too. Verdicts are provisional while cells are open, and where a side was tuned to the edge
of the grid, beyond which it may be better."""
EXPERTS = f"""\
Every expert is beaten (**reproduced**) if each domain's interval lies above 0. It is **reversed**
if some domain's lies below 0, and **not seen** if some domain's ends below the effect, both at 0.05
over the number of domains, as each is a chance to find one; else **inconclusive**. These intervals
hold the student's seeds and, in quadrature, the binomial error of the expert's own evaluation. An
expert counts if its training has gained {points(contrasts.EXPERT_LEAD)} points on its domain, of
which no interval is taken: on all prompts of that domain which were asked before and after it. "On
these prompts" is what it has gained on those that the student is asked as well, of all domains."""
TEACHERS = f"""\
Strong to weak: there is no verdict if the teacher's training has gained less than
{points(contrasts.TEACHER_GAIN)} points on the task (**no gain of the teacher**)."""
RECOVERED = f"""\
PGR, the performance gap recovered, is (method - floor) / (ceiling - floor). There is no verdict if
the gap is less than {contrasts.GAP:g} times its own 95% half-interval over prompts (**no gap**)."""
CONDITIONS = """\
All intervals are over the seeds of the methods, which their evaluations draw by too: they are
conditional on one model to start from, one set of teachers or experts, and one set of held-out
prompts, on which rates were tuned as well (by other seeds), and say nothing of how others would
turn out. They are not corrected for the number of rows: primary rows were chosen beforehand and
have the most seeds, the others are explorations."""
SWEEP = """\
All is of the seeds that every row has. Rank correlations (Spearman's) are those of each seed over
all rows. **rises**, **falls**: their interval excludes 0; **turns**: steps between neighbors go
both ways, or one goes the other way than these; **unclear**: neither. A step counts if the interval
of its paired change excludes 0, at 5% over the number of steps. Steps: {steps}."""
BUDGETS = """\
Student tokens are those that the student sampled for its updates; between methods with the same
number of updates and rows they differ by the length of its responses alone{spread}. SFT on given
responses samples none: it learns the teacher tokens. Seconds are a cell's own wall time, compilation and evaluations
included."""


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
  of_experts = [claim for claim in config.claims.values() if claim.kind == "experts"]
  parts += ["### Claims", claims(config, found), VERDICTS, EXPERTS if of_experts else "",
            RECOVERED if any(claim.kind == "recovered" for claim in config.claims.values()) else "",
            TEACHERS if any(claim.after and claim.kind != "recovered"
                            for claim in config.claims.values()) else "", CONDITIONS]
  for claim in of_experts:
    parts += [f"### {claim.text}: domain by domain", experts_table(config, found, claim)]
  for sweep in config.sweeps.values():
    parts += [f"### {sweep.text}", *sweep_table(config, found, sweep)]
  for metric in config.curves.metrics:
    parts += [f"### {labeled(metric)} over training", curves(config, found, metric)]
  for name, section in config.methods.items():
    if section.pipeline == "critique_refine":
      parts += [f"### `{name}`: any of the first k chains right (points)",
                study(config, found, name)]
  parts += ["### Methods and budgets", methods(config, found),
            BUDGETS.format(spread=spread(config, found))]
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
  again = {cell["again"] for cell in found.cells if "again" in cell}
  here = sum(cell["wall_s"] / cell["machine"]["workers"] for cell in found.cells) / 60
  return (f"From {len(found.cells)} cells in `{config.results or 'results'}`, each with its config "
          f"and what it rests on: {every(cell['date'] for cell in found.cells)}; "
          f"{machine('cores')} cores of {machine('cpu')}, {machine('device')}, jax "
          f"{machine('jax')}; commit {every(cell['commit'] for cell in found.cells)}"
          f"{f'; others hold at {every(again)}, where one of their method repeats' * bool(again)}. "
          f"The cells' own wall times are {minutes:.0f} minutes in all, {machine('workers')} side "
          f"by side: {here:.0f} minutes.")


def claims(config: ml_collections.ConfigDict, found: Measured) -> str:
  """A row for each claim: what the paper says, what was run, our number, the verdict."""
  rows = []
  for claim in config.claims.values():
    number = contrasts.unit(claim)
    tested = number(claim.effect, claim.kind != "share")
    if claim.margin:
      tested += f" -+ {number(claim.margin)}"
    rows.append([claim.text, claim.paper, contrasts.ran(found, claim), tested,
                 *contrasts.judge(config, found, claim)])
  return table(("claim", "the paper", "what we ran", "tested for", "ours, 95%", "seeds", "verdict"),
               rows)


def experts_table(config: ml_collections.ConfigDict, found: Measured,
                  claim: ml_collections.ConfigDict) -> str:
  """Base, who is to be beaten, and student on each domain."""
  rows, real = [], contrasts.counting(found, claim)
  for domain, lead in contrasts.leads(found, claim).items():
    student = contrasts.scores(config, found, claim.a, f"domain/{domain}",
                               config.seeds[claim.a]).values
    other = found.stages[claim.experts[domain]]
    value, error = contrasts.metric(other, f"domain/{domain}"), contrasts.error_of(other, domain)
    base, expert = (contrasts.metric(found.stages[stage], f"domain/{domain}") for stage in (
        claim.base, (claim.counting or claim.experts)[domain]))
    rows.append([domain, points(base),
                 f"{points(lead, sign=True)}: {'yes' if domain in real else '**no**'}",
                 points(expert - base, sign=True),
                 f"`{claim.experts[domain]}`", f"{points(value)} -+ {points(error)}",
                 within(statistics.interval(list(student.values())), points),
                 within(statistics.lead(student, value, error), points, sign=True)])
  return table(("domain", f"`{claim.base}`",
                f"its expert beats that by {points(contrasts.EXPERT_LEAD)}?", "on these prompts",
                "to be beaten", "standard error", f"`{claim.a}`, 95%", "difference, 95%"), rows)


def sweep_table(config: ml_collections.ConfigDict, found: Measured,
                sweep: ml_collections.ConfigDict) -> list[str]:
  """A row for each value of the parameter; which way the measures go, and where they move."""
  rows, steps = [], []
  sides = {name: [contrasts.scores(config, found, method, name, config.seeds[method])
                  for method in sweep.methods] for name in sweep.metrics}
  curves = {name: shared([side.values for side in row]) for name, row in sides.items()}
  if sweep.base and (start := found.stages.get(sweep.base)):
    values = {name: contrasts.of_stage(start, name) for name in sweep.metrics}
    rows.append(["at the start", f"`{sweep.base}`", "", *(
        number_of(name)(x) if math.isfinite(x) else "-" for name, x in values.items())])
  for i, (value, method) in enumerate(zip(sweep.points, sweep.methods)):
    diverged = max(row[i].diverged for row in sides.values())
    rows.append([f"{value:g}", f"`{method}`", str(max(len(curve[i]) for curve in curves.values()))
                 + f", {diverged} diverged" * bool(diverged), *(
        within(statistics.interval(list(curve[i].values())), number_of(name))
        for name, curve in curves.items())])
  trends = {name: statistics.trend(sweep.points, curve) for name, curve in curves.items()}
  for name, trend in trends.items():
    steps += [f"{labeled(name)} between {sweep.points[i]:g} and {sweep.points[i + 1]:g}, by "
              + within(step, number_of(name), sign=True) for i, step in trend.steps]
  seeds = ", ".join(dict.fromkeys(str(trend.rho.n) for trend in trends.values()))
  there, wanted = (sum(len(seeds.get(method, ())) for method in sweep.methods)
                   for seeds in (found.methods, config.seeds))
  still = f"{there} of {wanted} cells" if there < wanted else ""
  rows.append(["rank correlation", "", seeds, *(within(t.rho, plain) for t in trends.values())])
  rows.append(["direction", "", "", *(contrasts.shown(trend.direction, still)
                                      for trend in trends.values())])
  return [f"The paper: {sweep.paper}" if sweep.paper else "",
          table((sweep.parameter, "method", "seeds", *map(labeled, sweep.metrics)), rows),
          SWEEP.format(steps="; ".join(steps) or "none")]


def curves(config: ml_collections.ConfigDict, found: Measured, metric: str) -> str:
  """A metric at each evaluation of the methods that have it, and after which its mean is highest.
  """
  rows, steps = [], []
  for method in config.curves.methods:
    there = found.methods.get(method, {})
    cells = {seed: cell for seed, cell in there.items() if metric in cell.get("curves", {})}
    if there and not cells:
      continue
    by_step: dict[int, dict[int, float]] = {}
    for seed, cell in cells.items():
      for step, value in zip(cell["curves"]["step"], cell["curves"][metric]):
        by_step.setdefault(step, {})[seed] = math.nan if value is None else value
    # Before the first step there is an evaluation, but nothing that has led to it.
    means = {step: statistics.interval(list(values.values())) for step, values in by_step.items()
             if not all(map(math.isnan, values.values()))}
    steps = sorted(set(steps) | means.keys())
    rows.append((method, str(len(cells)), means))
  return table(("method", "seeds", *(f"after {step}" for step in steps), "peak"), [
      [f"`{method}`", seeds, *(within(means[step], number_of(metric)) if step in means else ""
                               for step in steps),
       f"after {max(means, key=lambda step: means[step].mean)}" if means else ""]
      for method, seeds, means in rows])


def study(config: ml_collections.ConfigDict, found: Measured, method: str) -> str:
  """pass@k of every way to use a critic: OPCD's Table 1."""
  cells, ks = found.methods.get(method, {}), sorted(set(config.methods[method].eval.ks))
  begin = f"eval/pass@{ks[0]} "
  ways = dict.fromkeys(name.removeprefix(begin) for cell in cells.values()
                       for name in cell["metrics"] if name.startswith(begin))
  return table(("", "seeds", *(f"pass@{k}" for k in ks)), [
      [way, str(len(cells)), *(within(statistics.interval(
          [contrasts.metric(cell, f"eval/pass@{k} {way}") for cell in cells.values()]), points)
                               for k in ks)] for way in ways])


def shared(curve: Sequence[statistics.BySeed]) -> list[statistics.BySeed]:
  """The points of a curve, each by the seeds that all have: points of other seeds differ by luck.

  While some points have no seeds, the others keep theirs.
  """
  there = [point.keys() for point in curve if point]
  both = set.intersection(*map(set, there)) if there else set()
  return [{seed: value for seed, value in point.items() if seed in both} for point in curve]


def methods(config: ml_collections.ConfigDict, found: Measured) -> str:
  """What each method reached, and what it was given."""
  name, rows = config.tune.metric, []
  weighted = any("loss/weight" in cell["metrics"] for cell in found.cells)
  ends = next((claim for claim in config.claims.values() if claim.kind == "recovered"), None)
  for method in config.methods:
    cells = list(found.methods.get(method, {}).values())
    there = not cells or any(name in cell["metrics"] for cell in cells)  # or it is a study
    broken = sum("diverged" in cell for cell in cells)
    value = found.values[method]
    weights = [cell["metrics"].get("loss/weight", 1.0) for cell in cells]
    rows.append([
        f"`{method}`", "" if value is None else f"{value:g}",
        within(statistics.interval(list(by_seed(found, method, name).values())),
               number_of(name)) if there else "-",
        *([within(statistics.interval(contrasts.recovered(found, ends, method)), points)]
          if ends else []),
        *([plain(sum(weights) / len(weights)) if weights else "-"] if weighted else []),
        *(span([cell[key] for cell in cells])
          for key in ("updates", "rows", "student_tokens", "teacher_tokens", "wall_s")),
        ", ".join(map(str, found.methods.get(method, ())))
        + f" ({broken} diverged)" * bool(broken)])
  return table(("method", config.tune.key.split(".")[-1], f"{labeled(name)}, 95%",
                *["PGR (points), 95%"] * bool(ends), *["mean weight of a token"] * weighted,
                "updates", "rows an update",
                "student tokens", "teacher tokens", "seconds a cell", "seeds"), rows)


def spread(config: ml_collections.ConfigDict, found: Measured) -> str:
  """By how much the student tokens of methods differ that are compared, of those that sample."""
  means = {method: sum(tokens) / len(tokens) for method, cells in found.methods.items()
           if (tokens := [cell["student_tokens"] for cell in cells.values()]) and any(tokens)}

  def most(groups: Sequence[Sequence[str]]) -> float:
    sampling = [[means[who] for who in group if who in means] for group in groups]
    return max((100 * (max(each) / min(each) - 1) for each in sampling if len(each) > 1),
               default=math.nan)

  claimed = most([(claim.a, claim.b) for claim in config.claims.values()])
  swept = most([sweep.methods for sweep in config.sweeps.values()])
  parts = [f"by up to {x:.0f}% {where}" for x, where in (
      (claimed, "in a claim here"), (swept, "in a sweep")) if math.isfinite(x)]
  return f": {', '.join(parts)}" if parts else ""


def tuning(config: ml_collections.ConfigDict, found: Measured) -> str:
  """The grid, what it gave, and what was taken."""
  tune, rows = config.tune, []
  show = number_of(tune.metric)
  for method in config.methods:
    value, who = found.values[method], tuned_as(config, method)
    taken = "open" if value is None else f"{value:g}"
    if who == method:
      means = found.tuning[method]
      if contrasts.at_edge(config, found, method):
        taken += ", **at the edge of the grid**: a better one may lie beyond"
      rows.append([f"`{method}`", *(show(means[x]) if x in means else "open" for x in tune.grid),
                   taken])
    else:
      rows.append([f"`{method}`", *[""] * len(tune.grid),
                   f"{taken}, that of `{who}`" if who else "not tuned: as in its config"])
  seeds = ", ".join(map(str, tune.seeds))
  return (f"By {labeled(tune.metric)}, the mean over seeds that are not among those reported: "
          f"{seeds}.\n\n"
          + table(("method", *(f"{x:g}" for x in tune.grid), "taken"), rows))


def tuned_as(config: ml_collections.ConfigDict, method: str) -> str | None:
  """The tuned method whose value this one takes, which may be itself; None: as in its config."""
  if method in config.tune.methods:
    return method
  return config.tune.follows[method] if method in config.tune.follows else None


def stages(config: ml_collections.ConfigDict, found: Measured) -> str:
  """The models that the methods start from, and what they can do; of one domain once."""
  rows = []
  measured = set().union(*(result["metrics"] for result in found.stages.values()))
  domains = sorted(name for name in measured if name.startswith("domain/"))
  names = [config.tune.metric, *(name for name in ("eval/accuracy",) if name in measured),
           *(domains if len(domains) > 1 else ())]
  for stage, section in config.stages.items():
    how = section.loss.signal if section.pipeline == "opd" else section.pipeline
    if result := found.stages.get(stage):
      scores = [number_of(name)(x) if math.isfinite(x := contrasts.of_stage(result, name)) else ""
                for name in names]
      rows.append([f"`{stage}`", how, *scores, *(
          span([result[key]]) for key in ("updates", "student_tokens", "wall_s"))])
    else:
      rows.append([f"`{stage}`", how, "open"])
  return table(("stage", "how", *map(labeled, names), "updates", "student tokens", "seconds"), rows)
