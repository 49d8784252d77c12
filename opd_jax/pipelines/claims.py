"""A paper's claims, measured: cells of method x setting x seed, and the tables that they give.

    stages (models to start from) -> tuning on seeds of its own -> every method and seed -> tables

Each cell leaves a small JSON, kept under version control, and is not run again while what it rests
on (`identity`) is what it was, or has changed in a way that changes no number, as one cell of the
method shows. A model to start from is kept, and a given until its settings change. So a
sitting may end at any time, and the next one goes on.
"""

from collections.abc import Callable
import math
import os
import pathlib
import re
import time
from typing import Any

import ml_collections
import numpy as np

from opd_jax import preemption, progress
from opd_jax.claims import contrasts, crew, identity, markdown, results
from opd_jax.claims.ledger import Cell, Ledger, changed


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the cells that are open, as long as `minutes` allow, and writes the tables.

  Raises:
    ValueError: the config names something that there is not.
    ChildProcessError: cells have failed; the others, and the tables, are there.
  """
  check(config)
  end = time.monotonic() + 60.0 * config.minutes
  folder = pathlib.Path(config.results or f"{workdir}/results")
  table = pathlib.Path(config.table or f"{workdir}/RESULTS.md")
  shares = crew.shares(config.workers)
  workers = [crew.Worker(cores) for cores in shares]
  try:
    machine = [worker.take() for worker in workers][0]
    ledger = Ledger(config.stages, folder, pathlib.Path(workdir),
                    machine | {"cores": os.cpu_count(), "workers": config.workers})
    with preemption.guard() as stop:
      failed = work(config, ledger, workers, shares, stop, end)
  finally:
    for worker in workers:
      worker.kill()
  cells = plan(config, ledger)
  left = [cell.name for cell in cells if not ledger.current(cell)]
  if config.table and (stale := sum(map(ledger.is_stale, cells))):
    progress.note(f"{stale} cells in {folder} were made by other code, settings or models, and "
                  f"{table} may be theirs: it stays as it is until they have run again (or are "
                  f"removed); to add to theirs, check out the commit that they name")
    table = pathlib.Path(workdir, "RESULTS.md")
  markdown.write_section(table, config.name, results.render(config, holding(config, ledger), left))
  progress.note(f"{len(cells) - len(left)} of {len(cells)} cells are in {folder}, and the tables "
                f"in {table}")
  if left:
    progress.note(f"open, for the same command to go on with: {', '.join(left)}")
  if failed:
    raise ChildProcessError(f"{len(failed)} cells failed: " + "; ".join(
        f"{cell.name} ({why}; see {ledger.folder(cell)}/{crew.LOG})" for cell, why in failed))


def work(config: ml_collections.ConfigDict, ledger: Ledger, workers: list[crew.Worker],
         shares: list[list[int]], stop: Callable[[], bool], end: float) -> list[tuple[Cell, str]]:
  """Hands open cells to whoever is idle, until there are none or the time is up.

  Args:
    workers: one that dies is replaced.
    shares: of the cores, by worker.
    stop: whether SIGTERM has come: what is under way is given up.
    end: when no further cell begins, on time.monotonic()'s clock.
  Returns: the cells that failed, and why.
  """
  begun: set[str] = set()
  failed, busy = [], {}
  while not stop():
    for worker in workers:
      if worker not in busy and time.monotonic() < end:
        if cell := upcoming(config, ledger, begun, list(busy.values())):
          begun.add(cell.name)
          worker.give(ledger.resolved(cell.config), ledger.folder(cell), ledger.rests_on(cell))
          busy[worker] = cell
    if not busy:
      break
    while not (done := crew.ready(list(busy), timeout_s=1.0)) and not stop():
      pass
    for worker in done:
      cell = busy.pop(worker)
      try:
        result = worker.take()
        if "diverged" in result and cell.stage:
          raise RuntimeError(result["diverged"])
      except RuntimeError as error:
        failed.append((cell, str(error)))
        progress.note(f"{cell.name} failed: {error}")
        if not worker.alive:
          place = workers.index(worker)
          workers[place] = crew.Worker(shares[place])
          workers[place].take()
        continue
      ledger.add(cell, result)
      score = result["metrics"].get(config.tune.metric)
      progress.note(f"{cell.name}: {result['wall_s']:.0f} s"
                    + ("" if score is None else f", {config.tune.metric} {score:.3f}")
                    + ", diverged" * ("diverged" in result))
  return failed


def upcoming(config: ml_collections.ConfigDict, ledger: Ledger, begun: set[str],
             busy: list[Cell]) -> Cell | None:
  """The first open cell whose stages are there, leaving out those already begun.

  A stage that still holds runs again if what it left is gone and an open cell starts from it. A
  stale cell waits while one that is `busy` will show whether it holds.
  """
  cells = plan(config, ledger)
  wanted = {cell.name for cell in cells if not ledger.current(cell)}
  for cell in reversed(cells):  # stages come first, each after those that it starts from
    if cell.name in wanted:
      wanted |= {ledger.stages[name].name for name in identity.asks(cell.config)
                 if not ledger.has_left(name)}
  asked = {ledger.question(cell) for cell in busy} - {""}
  for cell in cells:
    if (cell.name in wanted and cell.name not in begun and not cell.waits
        and ledger.question(cell) not in asked
        and all(map(ledger.has_left, identity.asks(cell.config)))):
      return cell
  return None


def plan(config: ml_collections.ConfigDict, ledger: Ledger) -> list[Cell]:
  """Every cell, in the order in which they run.

  Seed by seed, each with every method: a sitting that is broken off leaves pairs.
  """
  tune, cells = config.tune, list(ledger.stages.values())
  cells += [tuning(config, method, value, seed)
            for seed in tune.seeds for value in tune.grid for method in tune.methods]
  values = {method: choice(config, ledger, method) for method in config.methods}
  for seed in sorted(set().union(*config.seeds.values())):
    for method, value in values.items():
      if seed in config.seeds[method]:
        waits = value is None and results.tuned_as(config, method) is not None
        cells.append(Cell(f"methods/{method}-s{seed}", method,
                          with_value(config, method, value, seed), seed, value, waits))
  return cells


def tuning(config: ml_collections.ConfigDict, method: str, value: float, seed: int) -> Cell:
  """A cell of the search for tune.key."""
  return Cell(f"tune/{method}-{value:g}-s{seed}", method,
              with_value(config, method, value, seed), seed, value)


def with_value(config: ml_collections.ConfigDict, method: str, value: float | None,
               seed: int) -> ml_collections.ConfigDict:
  """A method's config with a seed, and with a value of tune.key if it is tuned.

  The seed is that of its evaluations too: with one for all, the luck of their draws would be in
  every cell and in no interval. Methods of the same seed draw the same numbers.
  """
  tuned = {} if value is None else {config.tune.key: value}
  return changed(config.methods[method], {"seed": seed, "eval.seed": 1 + seed} | tuned)


def choice(config: ml_collections.ConfigDict, ledger: Ledger, method: str) -> float | None:
  """The value of tune.key that a method is reported with: the best, the smallest of equals.

  None if it is not tuned, or not yet.
  """
  if not (who := results.tuned_as(config, method)):
    return None
  found = scores(config, ledger, who)
  if len(found) < len(config.tune.grid):
    return None
  return max(sorted(found), key=lambda value: -math.inf if math.isnan(found[value])
             else found[value])


def scores(config: ml_collections.ConfigDict, ledger: Ledger, method: str) -> dict[float, float]:
  """Mean of tune.metric by value, of those that every tuning seed has; NaN where one diverged."""
  tune, out = config.tune, {}
  for value in tune.grid:
    found = [ledger.current(tuning(config, method, value, seed)) for seed in tune.seeds]
    if all(found):
      out[value] = float(np.mean([contrasts.metric(result, tune.metric) for result in found]))
  return out


def holding(config: ml_collections.ConfigDict, ledger: Ledger) -> contrasts.Measured:
  """All results that hold, for the tables."""
  found = {cell.name: (cell, result) for cell in plan(config, ledger)
           if (result := ledger.current(cell))}
  methods = {method: {cell.seed: result for name, (cell, result) in found.items()
                      if name.startswith("methods/") and cell.who == method}
             for method in config.methods}
  return contrasts.Measured(
      stages={cell.who: result for cell, result in found.values() if cell.stage},
      tuning={method: scores(config, ledger, method) for method in config.tune.methods},
      values={method: choice(config, ledger, method) for method in config.methods},
      methods=methods, cells=[result for _, result in found.values()])


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that names what there is not, before anything is run.

  Raises: ValueError naming the key.
  """
  stages, methods, tune = list(config.stages), list(config.methods), config.tune

  def known(key: str, names: Any, among: Any) -> None:
    for name in names:
      if name not in among:
        raise ValueError(f"{key} names {name!r}; there is {', '.join(among) or 'nothing'}")

  def refuse(bad: Any, message: str) -> None:
    if bad:
      raise ValueError(message)

  refuse(not re.fullmatch(r"[\w-]+", config.name),
         f"name is {config.name!r}; a section of the table needs one, of letters, digits, '_', '-'")
  for i, (name, section) in enumerate(config.stages.items()):
    known(f"stages.{name}", identity.asks(section),
          [x for x in stages[:i] if config.stages[x].pipeline != "evaluate"])
  for name, section in config.methods.items():
    known(f"methods.{name}", identity.asks(section),
          [x for x in stages if config.stages[x].pipeline != "evaluate"])
    refuse(not config.seeds.get(name, ()), f"seeds.{name} is missing: which seeds are reported?")
    taken = set(config.seeds[name]) & set(tune.seeds)
    refuse(taken, f"seeds.{name} and tune.seeds share {sorted(taken)}; tune on others")
    tuned = results.tuned_as(config, name)
    refuse(tuned and tune.key not in dict(identity.leaves(section)),
           f"methods.{name} is tuned, but has no key {tune.key}")
  for name, section in [*config.stages.items(), *config.methods.items()]:
    refuse(section.pipeline in ("opd", "rewarded") and section.log_every != 1,
           f"{name} has log_every={section.get('log_every')}; tokens are counted at every step, so "
           "set it to 1")
  known("seeds", config.seeds, methods)
  known("tune.methods", tune.methods, methods)
  known("tune.follows", tune.follows, methods)
  known("tune.follows", tune.follows.values(), tune.methods)
  refuse(tune.methods and not (tune.grid and tune.seeds), "tune.grid and tune.seeds are needed")
  for name, claim in config.claims.items():
    known(f"claims.{name}.kind", [claim.kind],
          ("difference", "share", "experts", "recovered"))
    known(f"claims.{name}.a", [claim.a], methods)
    if claim.kind == "experts":
      known(f"claims.{name}.experts", [*claim.experts.values(), claim.base], stages)
      known(f"claims.{name}.counting", claim.counting.values(), stages)
    elif claim.b or claim.kind != "difference" or not claim.metric.startswith("gain/"):
      known(f"claims.{name}.b", [claim.b], methods + [f"{identity.STAGE}{x}" for x in stages])
    known(f"claims.{name}.over", claim.over, methods)
    refuse(claim.over and (len(claim.over) != 2 or claim.kind != "difference" or not claim.b
                           or not claim.paired),
           f"claims.{name}.over is {tuple(claim.over)}; it must be two methods, beside a paired "
           "difference of two")
    refuse(claim.counting and set(claim.counting) != set(claim.experts),
           f"claims.{name}.counting is of {list(claim.counting)}, its experts of "
           f"{list(claim.experts)}: it must say of each domain whose expert counts")
    refuse(not claim.effect and not claim.margin,
           f"claims.{name} has neither an effect nor a margin: no verdict can be computed")
    known(f"claims.{name}.before", [x for x in (claim.before, claim.after) if x], stages)
    refuse(bool(claim.before) != bool(claim.after),
           f"claims.{name} has one of `before` and `after`; a gain needs both")
    refuse(not claim.paired and claim.kind not in ("difference", "recovered"),
           f"claims.{name} is not paired; only a difference can be that")
    refuse(claim.kind == "recovered" and not claim.after,
           f"claims.{name} recovers a gap; say from which stage `before` to which `after`")
    refuse(claim.kind == "experts" and claim.effect <= 0,
           f"claims.{name}.effect is {claim.effect:g}; a lead over experts is above 0")
  known("curves.methods", config.curves.methods, methods)
  for name, sweep in config.sweeps.items():
    known(f"sweeps.{name}.methods", sweep.methods, methods)
    known(f"sweeps.{name}.base", [sweep.base] if sweep.base else [], stages)
    refuse(len(sweep.points) != len(sweep.methods) or list(sweep.points) != sorted(sweep.points),
           f"sweeps.{name}.points must be ascending, and as many as its methods")
