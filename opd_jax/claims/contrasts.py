"""What the claims of a config compare, and what the comparison says, from the cells' numbers."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import ml_collections

from opd_jax import config as configs
from opd_jax.claims import identity, statistics
from opd_jax.claims.markdown import Number, labeled, number_of, plain, points, within
from opd_jax.claims.statistics import Interval

# An expert is one if it beats what it was made of by this much on its own domain.
EXPERT_LEAD = 0.15
# A teacher has something to pass on if its training has gained this much on the task.
TEACHER_GAIN = 0.05
# Between floor and ceiling there is a gap to be recovered if it is so many times its own 95%
# half-interval over prompts.
GAP = 4.0


class Measured(NamedTuple):
  """The results that hold."""

  stages: Mapping[str, dict[str, Any]]
  tuning: Mapping[str, Mapping[float, float]]           # tuned method -> value -> mean score
  values: Mapping[str, float | None]                    # method -> the value it is reported with
  methods: Mapping[str, Mapping[int, dict[str, Any]]]   # method -> seed -> result
  cells: Sequence[dict[str, Any]]                       # all of them


class Scores(NamedTuple):
  """A metric by seed: of a method, or of a stage, which is the same for every seed."""

  values: dict[int, float]
  diverged: int              # seeds whose run diverged: what they started from is their value
  lost: int                  # seeds without a value: what they started from has not been measured


def judge(config: ml_collections.ConfigDict, found: Measured,
          claim: ml_collections.ConfigDict) -> tuple[str, str, str]:
  """Our numbers, the seeds that they are of, and the verdict, as text.

  A verdict is bold once all cells of the claim are there, and provisional before.
  """
  sides = compared(config, found, claim)
  lost, diverged = (sum(getattr(side, what) for side in sides) for what in ("lost", "diverged"))
  ours, seeds, word = {"experts": of_experts, "share": of_share, "difference": of_difference,
                       "recovered": of_recovered}[claim.kind](found, claim, sides)
  if gate := withheld(config, found, claim):
    word = gate
  elif lost:
    word = f"{lost} diverged"
  return (ours, f"{seeds}{f', {diverged} diverged' * bool(diverged)}{', primary' * claim.primary}",
          shown(word, missing(config, found, claim) or untuned(config, found, claim)))


def shown(word: str, still: str) -> str:
  """A verdict: bold if nothing is `still` open, else provisional and what is."""
  if word == "open":
    return f"open ({still})" if still else "open"
  return f"{word} (provisional: {still})" if still else f"**{word}**"


def compared(config: ml_collections.ConfigDict, found: Measured,
             claim: ml_collections.ConfigDict) -> list[Scores]:
  """Sides of a claim: a, b, c, d; of "experts" the student in each domain that counts."""
  if claim.kind == "experts":
    sides = [scores(config, found, claim.a, f"domain/{domain}", config.seeds[claim.a])
             for domain in counting(found, claim)]
    # A run that diverged did so in all domains: it is one.
    return [side._replace(diverged=side.diverged * (not i), lost=side.lost * (not i))
            for i, side in enumerate(sides)]
  seeds = wanted(config, claim)
  return [scores(config, found, who, claim.metric, seeds[who])
          for who in (claim.a, claim.b, *claim.over) if who]


def wanted(config: ml_collections.ConfigDict,
           claim: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
  """Side -> the seeds of it that count: if paired, those of both. A stage has those of a."""
  own = {who: config.seeds[who] if who in config.seeds else config.seeds[claim.a]
         for who in (claim.a, claim.b, *claim.over) if who}
  if not claim.paired:
    return own
  both = set.intersection(*map(set, own.values()))
  return {who: tuple(sorted(both)) for who in own}


def missing(config: ml_collections.ConfigDict, found: Measured,
            claim: ml_collections.ConfigDict) -> str:
  """How far a claim's cells are, "2 of 10 seeds"; "" once all are there."""
  sides = {who: seeds for who, seeds in wanted(config, claim).items()
           if not who.startswith(identity.STAGE)}
  there = {who: set(seeds) & found.methods.get(who, {}).keys() for who, seeds in sides.items()}
  if claim.paired:
    there = dict.fromkeys(there, set.intersection(*there.values()))
  parts = dict.fromkeys(f"{len(there[who])} of {len(seeds)}" for who, seeds in sides.items())
  done = all(len(there[who]) == len(seeds) for who, seeds in sides.items())
  return "" if done else f"{' and '.join(parts)} seeds"


def at_edge(config: ml_collections.ConfigDict, found: Measured, method: str) -> bool:
  """Whether the value that a method was tuned to is the first or the last of the grid."""
  return method in config.tune.methods and found.values.get(method) in (
      min(config.tune.grid), max(config.tune.grid))


def untuned(config: ml_collections.ConfigDict, found: Measured,
            claim: ml_collections.ConfigDict) -> str:
  """The sides of a claim for which a value beyond the grid may be better; "" if none."""
  sides = [who for who in (claim.a, claim.b, *claim.over) if at_edge(config, found, who)]
  names = " and ".join(f"`{who}`" for who in sides)
  return f"{names} tuned to the edge of the grid" if sides else ""


def withheld(config: ml_collections.ConfigDict, found: Measured,
             claim: ml_collections.ConfigDict) -> str:
  """What stands in place of a verdict that would say nothing; "" for nothing."""
  if claim.kind == "experts":
    if not leads(found, claim):
      return "open"
    if not counting(found, claim):
      return "no expert"
  if claim.after:
    if not {claim.before, claim.after} <= found.stages.keys():
      return "open"
    if claim.kind == "recovered":
      return "" if gap(found, claim) >= GAP * gap_error(found, claim) else "no gap"
    before, after = (of_stage(found.stages[stage], claim.metric)
                     for stage in (claim.before, claim.after))
    if not after - before >= TEACHER_GAIN:
      return "no gain of the teacher"
  if (claim.kind == "difference" and found.methods.get(claim.b) and not claim.over
      and not claim.may_fall):
    start = at_start(config, found, claim.b, claim.metric)
    if statistics.interval([value - start for value in
                            by_seed(found, claim.b, claim.metric).values()]).high < 0.0:
      return f"`{claim.b}` ends below its start"
  return ""


def of_difference(found: Measured, claim: ml_collections.ConfigDict,
                  sides: Sequence[Scores]) -> tuple[str, int, str]:
  """a - b, less c - d if there are such; or a alone if it is a gain."""
  a, b, *over = (*(side.values for side in sides), {}, {})
  if not claim.b:
    ours = statistics.interval(list(a.values()))
  elif claim.over:
    ours = statistics.interval(list(statistics.difference(
        statistics.difference(a, b), statistics.difference(*over[:2])).values()))
  elif claim.paired:
    ours = statistics.interval(list(statistics.difference(a, b).values()))
  else:
    ours = statistics.welch(list(a.values()), list(b.values()))
  text = within(ours, number_of(claim.metric), sign=True)
  return (text if claim.paired or not claim.b else f"{text}, unpaired"), ours.n, says(ours, claim)


def of_recovered(found: Measured, claim: ml_collections.ConfigDict,
                 sides: Sequence[Scores]) -> tuple[str, int, str]:
  """a - b as a share of the gap between two stages: by how much their PGRs differ."""
  whole = gap(found, claim)
  a, b = ({seed: value / whole for seed, value in side.values.items()} if whole > 0.0 else {}
          for side in sides)
  ours = (statistics.interval(list(statistics.difference(a, b).values())) if claim.paired
          else statistics.welch(list(a.values()), list(b.values())))
  return within(ours, points, sign=True), ours.n, says(ours, claim)


def gap(found: Measured, claim: ml_collections.ConfigDict) -> float:
  """By how much the stage `after` (the ceiling) is better than `before` (the floor); NaN: open."""
  if not {claim.before, claim.after} <= found.stages.keys():
    return math.nan
  floor, ceiling = (of_stage(found.stages[name], claim.metric)
                    for name in (claim.before, claim.after))
  return ceiling - floor


def recovered(found: Measured, claim: ml_collections.ConfigDict, method: str) -> list[float]:
  """PGR of a method by seed: which share of the gap of a claim it has closed; [] without a gap."""
  whole = gap(found, claim)
  if not whole > 0.0:
    return []
  floor = of_stage(found.stages[claim.before], claim.metric)
  return [(value - floor) / whole for value in by_seed(found, method, claim.metric).values()]


def gap_error(found: Measured, claim: ml_collections.ConfigDict) -> float:
  """The 95% half-interval of `gap` over the prompts of both evaluations."""
  return 1.96 * math.hypot(*(metric(found.stages[name], "eval/error")
                             for name in (claim.before, claim.after)))


def of_share(found: Measured, claim: ml_collections.ConfigDict,
             sides: Sequence[Scores]) -> tuple[str, int, str]:
  """a / b, which says nothing unless b has surely gained."""
  a, b = (side.values for side in sides)
  ours, gain = (statistics.interval(list(values.values()))
                for values in (statistics.share(a, b), b))
  both = len(a.keys() & b.keys())
  if both < 2:
    word = "open"
  elif gain.low > 0 and ours.n == both:
    word = says(ours, claim)
  else:
    word = f"no clear gain of `{claim.b}`"
  return within(ours, plain), ours.n, word


def of_experts(found: Measured, claim: ml_collections.ConfigDict,
               sides: Sequence[Scores]) -> tuple[str, int, str]:
  """a - each expert on its own domain, and whether all are beaten."""
  real = counting(found, claim)
  student = {domain: side.values for domain, side in zip(real, sides)}
  best = {domain: (expert, error_of(found.stages[claim.experts[domain]], domain))
          for domain, expert in real.items()}
  ours = {domain: statistics.lead(student[domain], *expert) for domain, expert in best.items()}
  text = "; ".join(f"{domain} {within(lead, points, sign=True)}" for domain, lead in ours.items())
  return (text or "-", min((lead.n for lead in ours.values()), default=0),
          statistics.beats_all(student, best, claim.effect))


def says(ours: Interval, claim: ml_collections.ConfigDict) -> str:
  """The verdict of an interval."""
  if claim.margin:
    return statistics.equivalence(ours, claim.effect, claim.margin)
  return statistics.verdict(ours, claim.effect)


def unit(claim: ml_collections.ConfigDict) -> Number:
  """How a claim's numbers are written."""
  return {"share": plain, "experts": points, "recovered": points,
          "difference": number_of(claim.metric)}[claim.kind]


def ran(found: Measured, claim: ml_collections.ConfigDict) -> str:
  """What a claim compares."""
  if claim.kind == "experts":
    none = [domain for domain in leads(found, claim) if domain not in counting(found, claim)]
    whose = "what is made of the expert" if claim.counting else "the expert"
    return (f"`{claim.a}` - {whose} of each domain, there (points)"
            + (f"; without {', '.join(none)}, whose expert is none" if none else ""))
  if claim.kind == "share":
    return f"`{claim.a}` / `{claim.b}`, {claim.metric}"
  if claim.kind == "recovered":
    return (f"`{claim.a}` - `{claim.b}`, points of PGR, from `{claim.before}` to "
            f"`{claim.after}`")
  both = f"`{claim.a}` - `{claim.b}`" if claim.b else f"`{claim.a}`"
  if claim.over:
    both = f"({both}) - (`{claim.over[0]}` - `{claim.over[1]}`)"
  return f"{both}, {labeled(claim.metric)}"


def counting(found: Measured, claim: ml_collections.ConfigDict) -> dict[str, float]:
  """Of the domains whose experts are such: domain -> accuracy there of who is to be beaten."""
  return {domain: metric(found.stages[claim.experts[domain]], f"domain/{domain}")
          for domain, lead in leads(found, claim).items() if lead >= EXPERT_LEAD}


def leads(found: Measured, claim: ml_collections.ConfigDict) -> dict[str, float]:
  """Domain -> by how much its expert beats the base there; {} while one is not measured."""
  whose = claim.counting or claim.experts
  if not {claim.base, *claim.experts.values(), *whose.values()} <= found.stages.keys():
    return {}
  return {domain: lead(found, claim, domain, stage) for domain, stage in sorted(whose.items())}


def lead(found: Measured, claim: ml_collections.ConfigDict, domain: str, stage: str) -> float:
  """By how much an expert beats the base in its domain.

  By its own training's account, if that was evaluated in this domain alone: before and after, on
  more of its prompts than there are where all domains are asked.
  """
  expert, base = found.stages[stage], found.stages[claim.base]
  made = found.stages.get(source(expert).removeprefix(identity.STAGE))
  if made and source(made) == source(base) and set(_domains(made)) == {domain}:
    gains = [name for name in made["metrics"] if name.startswith("gain/mean@")]
    if gains:
      return metric(made, gains[0])
  return metric(expert, f"domain/{domain}") - metric(base, f"domain/{domain}")


def source(result: Mapping[str, Any]) -> str:
  """What a stage started from, or what it has evaluated."""
  return result["config"].get("student", {}).get("source", "")


def _domains(result: Mapping[str, Any]) -> list[str]:
  return [name.removeprefix("domain/") for name in result["metrics"] if name.startswith("domain/")]


def error_of(result: Mapping[str, Any], domain: str) -> float:
  """Standard error of a model's accuracy in a domain, from one evaluation: binomial.

  Of its samples on the prompts of the domain; of cells that do not say how many those are, an
  equal part of all. That prompts differ makes it smaller, so this is its upper bound.
  """
  p, section = metric(result, f"domain/{domain}"), result["config"]["eval"]
  prompts = result["metrics"].get(f"asked/{domain}", section["prompts"] // len(_domains(result)))
  return math.sqrt(p * (1 - p) / (prompts * section["samples"]))


def scores(config: ml_collections.ConfigDict, found: Measured, who: str, name: str,
           seeds: Sequence[int]) -> Scores:
  """A metric by seed, a run that diverged with that of the model it started from.

  To leave it out would favor the method that diverges, as only its good runs would count.

  Args:
    who: a method, or "stage:NAME".
    seeds: those that count.
  """
  if who.startswith(identity.STAGE):
    result = found.stages.get(who.removeprefix(identity.STAGE))
    return Scores(dict.fromkeys(seeds, of_stage(result, name)) if result else {}, 0, 0)
  cells = {seed: cell for seed, cell in found.methods.get(who, {}).items() if seed in seeds}
  bad = [seed for seed, cell in cells.items() if "diverged" in cell]
  values = {seed: metric(cell, name) for seed, cell in cells.items()}
  values |= dict.fromkeys(bad, at_start(config, found, who, name) if bad else math.nan)
  finite = {seed: value for seed, value in values.items() if math.isfinite(value)}
  return Scores(finite, len(bad), len(cells) - len(finite))


def at_start(config: ml_collections.ConfigDict, found: Measured, method: str, name: str) -> float:
  """A metric of the model that a method starts from; NaN if it is not known."""
  if name.startswith("gain/"):
    return 0.0
  source = config.methods[method].student.source
  if result := found.stages.get(measuring(config, source)):
    if math.isfinite(value := of_stage(result, name)):
      return value
  mean = f"eval/mean@{config.methods[method].eval.samples}"
  for other, section in config.methods.items():  # evaluated before the first update
    if section.student.source == source and name in (mean, "curve/area"):
      for cell in found.methods.get(other, {}).values():
        if cell["curve"] and cell["curve"][0][0] == 0:
          return cell["curve"][0][1]
  return math.nan


def measuring(config: ml_collections.ConfigDict, source: str) -> str:
  """The stage that has measured a model: one that does nothing else, or that which made it."""
  for name, section in config.stages.items():
    if section.pipeline == "evaluate" and (section.student.source, section.student.base) == (
        source, ""):
      return name
  return source.removeprefix(identity.STAGE)


def of_stage(result: Mapping[str, Any], name: str) -> float:
  """A metric of a stage, which may have been evaluated with more samples than a method.

  mean@k is the mean of k samples: it means the same for every k. NaN if it was not measured.
  """
  names = [name, *(other for other in result["metrics"]
                   if name.startswith("eval/mean@") and other.startswith("eval/mean@"))]
  return next((metric(result, other) for other in names if other in result["metrics"]), math.nan)


def by_seed(found: Measured, method: str, name: str) -> dict[int, float]:
  """A metric of a method by seed, of the seeds where it is finite."""
  values = {seed: metric(cell, name) for seed, cell in found.methods.get(method, {}).items()}
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
