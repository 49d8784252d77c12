"""The report as a person reads it: memory, work, what bounds the step, what would still fit."""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any

import jax
import ml_collections

from opd_jax import config as configs
from opd_jax import sharding
from opd_jax.aot import chips, programs
from opd_jax.aot.report import DoesNotFit, Report, Row
from opd_jax.claims import markdown
from opd_jax.models.transformer import REMAT

GIB = chips.GIB


def run(config: ml_collections.ConfigDict, topology: str, sweep: bool = False,
        largest: bool = False, scaling: Sequence[str] = ()) -> bool:
  """Prints the report of a config on a topology; whether all of it fits.

  Args:
    sweep: also tries other meshes and remat policies, and ranks them.
    largest: also says how many slots and rows of a micro-batch would fit.
    scaling: topologies; if there are any, only compares these (`scaled`).
  Raises: ValueError for a config or a topology that is none, or that do not go together.
  """
  configs.validate(config)
  if config.pipeline not in programs.PIPELINES:
    raise ValueError(f"pipeline is {config.pipeline!r}; its functions are not known here, only "
                     f"those of {', '.join(programs.PIPELINES)}")
  if scaling:
    print("\n".join(scaled(config, scaling)), flush=True)
    return True
  report = compiled(config, topology)
  print("\n".join(lines(config, topology, report)), flush=True)
  if largest:
    print("\n" + "\n".join(beyond(config, topology)), flush=True)
  if sweep:
    print("\n" + "\n".join(swept(config, topology)), flush=True)
  return all(map(report.fits, report.rows))


def report_of(config: ml_collections.ConfigDict, topology: str) -> Report:
  """An empty report on the config's mesh."""
  devices, chip = chips.devices(topology)
  return Report(sharding.make_mesh(**config.mesh, devices=devices), chip)


def compiled(config: ml_collections.ConfigDict, topology: str,
             functions: Callable[..., None] = programs.compile_all) -> Report:
  """Compiles the functions of a run, until one does not fit.

  Args:
    functions: (config, report) -> None, which of them.
  """
  report = report_of(config, topology)
  with jax.set_mesh(report.mesh):
    try:
      functions(config, report)
    except DoesNotFit:
      pass  # the last row says what
  return report


def changed(config: ml_collections.ConfigDict,
            changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """The config with other values at some dotted keys."""
  other = config.copy_and_resolve_references()
  with other.unlocked():
    other.update_from_flattened_dict(changes)
  return other


def partly(config: ml_collections.ConfigDict, topology: str, part: str,
           changes: dict[str, Any]) -> Report:
  """One part of a run, of the names in programs.Parts, with a changed config."""
  parts = programs.PIPELINES[config.pipeline]
  return compiled(changed(config, changes), topology, lambda config, report: getattr(parts, part)(
      config, parts.begin(config, report), report))


def named(mesh: Any) -> str:
  """The axes of a mesh and their sizes; copies of the weights only if there are several."""
  return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()
                    if axis != "replica" or size > 1)


def lines(config: ml_collections.ConfigDict, topology: str, report: Report) -> list[str]:
  """The report as Markdown."""
  mesh, chip = report.mesh, report.chip
  out = [f"## {topology}, mesh {named(mesh)}, remat={config.model.remat}", ""]
  held: dict[str, float] = {}
  for row in report.rows:
    for name, size in row.held.items():
      held[name] = max(held.get(name, 0.0), size)
  out += ["GiB a chip of what lies there: "
          + ", ".join(f"{name} {size / GIB:.3g}" for name, size in held.items()) + ".", ""]
  limit = chip.memory
  out.append(markdown.table(
      ["function", "held", "other arguments", "temporaries", "results", "GiB at its peak",
       f"fits in {limit / GIB:.4g} GiB" if limit else "of"],
      [[row.name, *(f"{x / GIB:.3g}" for x in (
          sum(row.held.values()), row.inputs, row.temporaries, row.outputs, row.total)),
        row.problem or ("yes" if report.fits(row) else "no")] for row in report.rows]))
  out += ["", markdown.table(
      ["function", "calls a step", "TFLOP", "HBM GB", "sent GB", "sent by", "compute ms", "HBM ms",
       "links ms", "bound by", "s a step"], [work(report, row) for row in report.rows])]
  whole = step(report)
  out += ["", "A call is one chip's. A step: "
          f"{whole['flops'] / 1e12:,.4g} TFLOP and {whole['sent'] / 1e9:,.4g} GB sent a chip"
          + (f", as compiled about {whole['seconds']:,.4g} s" if whole["seconds"] else "")
          + (", with every response as long as it may be." if config.pipeline != "sft" else ".")]
  unknown: set[str] = set()
  for row in (row for row in report.rows if row.costs):
    labels = [label for label, turns in row.costs.loops if turns is None]
    unknown |= set(labels[1:] if "decode" in row.name else labels)  # how long it decodes is known
  if unknown:
    out += ["", f"Loops whose turns are not known count once: {', '.join(sorted(unknown))}."]
  if report.rows[-1].problem or not all(map(report.fits, report.rows)):
    out += ["", "It does not fit. " + advice(report)]
  return out


def work(report: Report, row: Row) -> list[str]:
  """A line about what a call costs."""
  if row.costs is None:
    return [row.name, f"{row.times:g}", *[""] * 9]
  kinds: dict[str, float] = {}
  for each, times in row.costs.collectives:
    kinds[each.kind] = kinds.get(each.kind, 0.0) + each.sent * times
  by = ", ".join(f"{kind} {size / 1e9:.2g}" for kind, size in sorted(
      kinds.items(), key=lambda item: -item[1]) if size >= 1e6)
  seconds = report.seconds(row)
  longest = max(seconds, key=seconds.get) if seconds else ""
  return [row.name, f"{row.times:g}", f"{row.costs.flops / 1e12:.4g}", f"{row.costs.hbm / 1e9:.4g}",
          f"{row.costs.sent / 1e9:.3g}", by, *(f"{1e3 * x:.3g}" for x in seconds.values()),
          *[""] * (3 - len(seconds)), longest,
          f"{row.times * seconds[longest]:.4g}" if seconds else ""]


def step(report: Report) -> dict[str, float]:
  """FLOPs and bytes sent of a step on a chip, and the seconds that it takes at the least."""
  rows = [row for row in report.rows if row.costs]
  return {"flops": sum(row.times * row.costs.flops for row in rows),
          "sent": sum(row.times * row.costs.sent for row in rows),
          "seconds": sum(row.times * max(report.seconds(row).values(), default=0.0)
                         for row in rows)}


def advice(report: Report) -> str:
  """What to change when a function does not fit."""
  row = next(row for row in report.rows if not report.fits(row))
  least = f"{row.name} needs {row.total / GIB:.4g} GiB of {report.chip.memory / GIB:.4g}"
  if "update" in row.name:
    return (f"{least}: raise loss.micro_batches, as far as every chip has a row; then "
            "model.remat='full'; then mesh.model, which also splits a row's activations")
  if any(word in row.name for word in ("score", "reads", "judge", "KL from")):
    return (f"{least}: raise loss.micro_batches (context.tokens lower, for OPCD), then mesh.model; "
            "teacher_memory='host' keeps one teacher at a time")
  return (f"{least}: lower rollout.slots, set rollout.kv_dtype='int8', or raise mesh.model, which "
          "splits the weights for decoding and the heads of the cache")


def beyond(config: ml_collections.ConfigDict, topology: str) -> list[str]:
  """How many slots of the engine, and rows of a micro-batch, fit: by compiling for them."""
  if chips.devices(topology)[1].memory is None:
    return ["Largest batch: only on chips of known memory."]
  data = sharding.ways("batch", report_of(config, topology).mesh)
  # Of a chip, as many as divide its rows: a last part that is not full costs as much.
  sizes = lambda rows: [n for n in range(1, rows // data + 1) if rows // data % n == 0]
  out = []
  if config.pipeline != "sft":  # whose steps do not sample
    most, found = largest(lambda count: partly(
        config, topology, "sample", {"rollout.slots": count * data}),
        sizes(config.rollout.prompts * config.rollout.group_size))
    out.append(f"Slots of the engine that fit: {most * data}, {most} a chip that has its own, "
               f"{found / GIB:.4g} GiB at the peak (rollout.slots={most * data}).")
  rows, group = programs.learned(config)
  tried = []

  def learn(count: int) -> Report:
    tried.append(partly(config, topology, "learn", {"loss.micro_batches": rows // (count * data)}))
    return tried[-1]

  parts, found = largest(learn, sizes(rows))
  whose = f" of {group} responses each" if group > 1 else ""
  kept = max(row.held.get("batch", 0.0) for report in tried for row in report.rows)
  return [*out, (
      f"Rows{whose} of a micro-batch that fit: {parts * data}, {parts} a chip that has its own, "
      f"{found / GIB:.4g} GiB at the peak (loss.micro_batches="
      f"{rows // (parts * data) if parts else 0}). A batch of more rows has more micro-batches: "
      f"what it keeps itself is {kept * data / (rows * group) / 2**20:.3g} MiB a response.")]


def largest(trial: Callable[[int], Report], sizes: Sequence[int]) -> tuple[int, float]:
  """The largest of `sizes` that fits, and its bytes at the peak; 0 if none does.

  Memory is nearly a straight line in the size: two trials foretell where it ends, others make sure.
  """
  tried: dict[int, float] = {}
  limit, low, high = math.inf, 0, len(sizes)  # low - 1 fits, high does not
  at = 0
  while low < high:
    report = trial(sizes[at])
    limit = report.chip.memory
    tried[sizes[at]] = max(row.total for row in report.rows)
    if all(map(report.fits, report.rows)):
      low = at + 1
    else:
      high = at
    at = low
    if len(tried) > 1:
      (a, x), (b, y) = sorted(tried.items())[:2]
      slope = (y - x) / (b - a)
      ends = a + (limit - x) / slope if slope > 0 else math.inf
      at = max(low, min(high - 1, sum(size <= ends for size in sizes) - 1))
  return (sizes[low - 1], tried[sizes[low - 1]]) if low else (0, tried[sizes[0]])


def scaled(config: ml_collections.ConfigDict, topologies: Sequence[str]) -> list[str]:
  """A step's sampling, scoring and updates of the same batch on pods of several sizes.

  Scored and learned are a row a chip at a time; slots are the config's, on all chips together. On n
  chips a chip's FLOPs should be 1/n of the whole. A micro-batch gathers all weights and spreads all
  gradients, so what a chip sends should be that of a micro-batch times their number, which is
  rows / n: it falls as 1/n too, but for the factor (d - 1) / d of a gather among the d chips of
  the data axis. The sum of gradients over copies of the weights, 2 / d of them, is left out.
  Sampling gathers all weights once a rollout, on however many chips: that does not fall.

  Raises: ValueError for rows that a pod does not divide.
  """
  rows, _ = programs.learned(config)
  table, first = [], {}
  for topology in topologies:
    mesh = report_of(config, topology).mesh
    parts = max(rows // sharding.ways("batch", mesh), 1)
    for part in ("sample", "learn") if config.pipeline != "sft" else ("learn",):
      report = partly(config, topology, part, {"loss.micro_batches": parts})
      whole, peak = step(report), max(row.total for row in report.rows)
      gathers = mesh.size if part == "sample" else 1
      now = {name: whole[name] * mesh.size for name in ("flops", "sent")}
      now["gathered"] = gathers * (1 - 1 / mesh.shape["data"])
      before = first.setdefault(part, now)
      share = lambda name: f"{now[name] / before[name]:.3f}" if before[name] else ""
      table.append([
          topology, f"{mesh.size}", {"sample": "sampling", "learn": "scores and updates"}[part],
          f"{parts}" if part == "learn" else "", f"{whole['flops'] / 1e12:,.5g}", share("flops"),
          f"{whole['sent'] / 1e9:,.4g}", share("sent"), share("gathered"), f"{peak / GIB:.4g}",
          "yes" if all(map(report.fits, report.rows)) else "no"])
  return ["## The same batch on more chips", "", markdown.table(
      ["topology", "chips", "what", "micro-batches", "TFLOP a chip", "x chips, of the first's",
       "GB sent a chip", "x chips, of the first's", "as gathers would", "GiB at the peak", "fits"],
      table)]


def meshes(count: int) -> Iterable[int]:
  """Sizes of the model axis that are tried."""
  return (model for model in (1, 2, 4, 8) if count % model == 0)


def swept(config: ml_collections.ConfigDict, topology: str) -> list[str]:
  """Meshes and remat policies, ranked by the seconds of a step; those that do not fit last."""
  devices, _ = chips.devices(topology)
  tried = []
  for model in meshes(len(devices)):
    for remat in REMAT:
      rest = "replica" if config.mesh.replica == -1 else "data"
      tuned = changed(config, {f"mesh.{rest}": -1, "mesh.model": model, "model.remat": remat})
      label = [f"model={model}", remat]
      try:
        label[0] = named(report_of(tuned, topology).mesh)
        report = compiled(tuned, topology)
      except ValueError as error:
        tried.append((math.inf, [*label, "", "", "", str(error)]))
        continue
      fits = all(map(report.fits, report.rows))
      whole, peak = step(report), max(report.rows, key=lambda row: row.total)
      problem = "" if fits else advice(report)
      tried.append((whole["seconds"] if fits else math.inf, [
          *label, f"{peak.total / GIB:.3g} ({peak.name})", f"{whole['flops'] / 1e12:.4g}",
          f"{whole['seconds']:.4g}" if fits else "", "fits" if fits else problem]))
  tried.sort(key=lambda each: each[0])
  return ["## Meshes and remat policies, the fastest first", "", markdown.table(
      ["mesh", "remat", "GiB at the peak", "TFLOP a step and chip", "s a step", ""],
      [line for _, line in tried])]

