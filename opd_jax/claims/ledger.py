"""The cells of a claims config: what has been measured, and whether it still holds.

Hours of measurements do not end with a change of code that changes no number: cells of a method run
again until the numbers of one are what they were, but for rounding; then its others hold as well.
(It need not be the first: at a large learning rate rounding alone leads a run elsewhere. What shows
at large rates alone, a cell at a small one does not see.) A setting is changed for the numbers'
sake, so that one of another value always runs again. A model that is kept is what it is, whatever
code made it: its stage runs again for another setting, or another model to start from, and for
nothing else.
"""

from collections.abc import Mapping
import datetime
import json
import pathlib
import shutil
import subprocess
from typing import Any, NamedTuple

import ml_collections

from opd_jax import pipelines
from opd_jax.claims import identity, measured
from opd_jax.data.builders import rows

Result = dict[str, Any]

# Numbers that differ by less, relative to 1 + |x|, are equal: another machine rounds otherwise. Far
# below what one other response of a cell's hundreds would change; tokens are counted exactly.
ROUNDING = 1e-4
# What a run says of itself, and not of what it has measured.
ASIDE = ("identity", "commit", "again", "date", "machine", "wall_s", "config")


class Cell(NamedTuple):
  """One run. Its name is that of its JSON, and of its folder in the workdir."""

  name: str                            # "stages/base", "tune/opd-0.001-s1000", "methods/opd-s0"
  who: str                             # the stage or method
  config: ml_collections.ConfigDict    # complete, but for where "stage:NAME" lies
  seed: int = 0
  value: float | None = None           # of tune.key, where it is tuned
  waits: bool = False                  # for the tuning that says the value

  @property
  def stage(self) -> bool:
    return self.name.startswith("stages/")


class Ledger:
  """Results by cell, on disk as one JSON file each.

  A model that a stage leaves is kept beside its JSON, and comes back from there: another machine's
  would differ in its last bits, and cells that start from it would not join.

  Args:
    stages: name -> config.
    folder: of the JSON files.
    workdir: of the runs; it has the stages' weights.
    machine: what cells are run on, from a worker.
  Raises: ValueError for a file that is not whole.
  """

  def __init__(self, stages: Mapping[str, ml_collections.ConfigDict], folder: pathlib.Path,
               workdir: pathlib.Path, machine: Mapping[str, Any]):
    self.stages = {name: Cell(f"stages/{name}", name, section, section.seed)
                   for name, section in stages.items()}
    self._folder, self._workdir, self._machine = folder, workdir, dict(machine)
    self._commit, self._identities, self._harmless = commit(), {}, {}
    self._found = {path.relative_to(folder).as_posix().removesuffix(".json"): _read(path)
                   for path in sorted(folder.glob("*/*.json"))}
    for stage in self.stages.values():
      kept, model = folder / stage.name, workdir / stage.name / measured.EXPORT
      if kept.is_dir() and not model.exists():
        _copy(kept, model)

  def current(self, cell: Cell) -> Result | None:
    """The result of a cell, unless there is none or it is stale."""
    found = self._found.get(cell.name)
    if not found or cell.waits or not (now := self._identity(cell)):
      return None
    if found["identity"] != now and not self._is_kept(cell, found, now):
      if "diverged" in found or not self._harmless.get(_since(cell, found, now)):
        return None
      self._write(cell, {**found, "identity": now, "config": json.loads(cell.config.to_json()),
                         "again": self._commit})
    return self._found[cell.name]

  def _is_kept(self, cell: Cell, found: Result, now: Mapping[str, Any]) -> bool:
    """Whether a stage's model is kept, of these settings and of these models to start from."""
    return ((self._folder / cell.name).is_dir() and found["identity"]["models"] == now["models"]
            and not _otherwise_set(cell, found)[1])

  def is_stale(self, cell: Cell) -> bool:
    """Whether there is a result of a cell that no longer holds, or not yet."""
    return cell.name in self._found and not self.current(cell)

  def question(self, cell: Cell) -> str:
    """What a cell that runs again will answer for others: whether what has changed does harm.

    "" of one that is not stale, of one that has diverged, and where the answer is known.
    """
    found = self._found.get(cell.name)
    if not found or "diverged" in found or cell.waits or not (now := self._identity(cell)):
      return ""
    since = _since(cell, found, now)
    return "" if found["identity"] == now or since in self._harmless else since

  def has_left(self, stage: str) -> bool:
    """Whether a stage's result holds, and what it leaves for others is in the workdir."""
    cell = self.stages[stage]
    result = self.current(cell)
    return bool(result and result["left"]) and result["left"] == measured.left(
        cell.config, self.folder(cell))

  def resolved(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A cell's config as it is to be run: with the places where its stages have left things."""
    places = {path: self._place(self.stages[value.removeprefix(identity.STAGE)])
              for path, value in identity.leaves(config)
              if isinstance(value, str) and value.startswith(identity.STAGE)}
    return changed(config, places)

  def rests_on(self, cell: Cell) -> str:
    """All that the numbers of a cell depend on, whose stages are there."""
    return json.dumps(self._identity(cell), sort_keys=True)

  def folder(self, cell: Cell) -> str:
    """Where a cell is run."""
    return str(self._workdir / cell.name)

  def add(self, cell: Cell, result: Result) -> None:
    """Writes down what a cell has measured. If it says what it said before, so would its others."""
    now, before = self._identity(cell), self._found.get(cell.name)
    model = pathlib.Path(self.folder(cell), measured.EXPORT)
    if cell.stage and model.is_dir():
      _copy(model, self._folder / cell.name)
    self._write(cell, {
        "cell": cell.name, "who": cell.who, "seed": cell.seed, "value": cell.value,
        "identity": now, "commit": self._commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": self._machine, **result, "config": json.loads(cell.config.to_json())})
    if before and "diverged" not in before:
      since = _since(cell, before, now)
      self._harmless[since] = (self._harmless.get(since, False)
                               or _repeats(before, self._found[cell.name]))

  def _write(self, cell: Cell, result: Result) -> None:
    """Whole or not at all."""
    path = self._folder / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    aside.rename(path)
    self._found[cell.name] = _read(path)  # as a later sitting will see it

  def _place(self, stage: Cell) -> str:
    """How a config names what a stage has left: rows, a reward model, or a model."""
    folder = self.folder(stage)
    return {"responses": f"{folder}/{rows.FILE}", "reward_model": folder}.get(
        stage.config.pipeline, f"hf:{folder}/{measured.EXPORT}")

  def _identity(self, cell: Cell) -> dict[str, Any] | None:
    """What a cell rests on; None if a stage of it has yet to be run."""
    stages = {}
    for name in identity.asks(cell.config):
      if not (result := self.current(self.stages[name])):
        return None
      stages[name] = result["left"]
    key = (cell.name, cell.value, *stages.values())
    if key not in self._identities:
      self._identities[key] = identity.of(
          cell.config, pipelines.PIPELINES[cell.config.pipeline], stages)
      self._identities[key] |= {name: self._machine[name] for name in ("device", "jax")}
    return self._identities[key]


def _copy(model: pathlib.Path, place: pathlib.Path) -> None:
  """A copy of a folder in the place of another, whole or not at all."""
  aside = place.with_name(f"{place.name}.tmp")
  shutil.rmtree(aside, ignore_errors=True)  # what a sitting that was killed has left
  shutil.copytree(model, aside)
  shutil.rmtree(place, ignore_errors=True)
  aside.rename(place)


def _repeats(before: Any, after: Any) -> bool:
  """Whether numbers say all that earlier ones did; later code may measure more."""
  if isinstance(before, dict) and isinstance(after, dict):
    return all(_repeats(before[name], after.get(name)) for name in before.keys() - set(ASIDE))
  if isinstance(before, list) and isinstance(after, list):
    return len(before) == len(after) and all(map(_repeats, before, after))
  if isinstance(before, float) and isinstance(after, float):
    return abs(after - before) <= ROUNDING * (1 + abs(before))
  return before == after


def _since(cell: Cell, found: Result, now: Mapping[str, Any]) -> str:
  """What has changed since a result was made, in words that are the same for a method's others.

  Settings that only the earlier or the later code knows are the code's; one of another value is
  the cell's own, of which no other says anything.
  """
  unknown, own = _otherwise_set(cell, found)
  rest = [{name: value for name, value in rests.items() if name != "config"}
          for rests in (found["identity"], now)]
  return json.dumps([cell.stage, cell.who, *rest, unknown, own and cell.name], sort_keys=True)


def _otherwise_set(cell: Cell, found: Result) -> tuple[dict[str, Any], bool]:
  """Settings that only the earlier or the later code knows; whether another has another value."""
  before, after = (identity.counting(config) for config in (
      ml_collections.ConfigDict(found["config"]), cell.config))
  unknown = {path: (before | after)[path] for path in before.keys() ^ after.keys()}
  return unknown, any(before[path] != after[path] for path in before.keys() & after.keys())


def changed(config: ml_collections.ConfigDict, values: Mapping[str, Any]
            ) -> ml_collections.ConfigDict:
  """A copy of a config with other values, {"optimizer.learning_rate": 1e-3}."""
  copy = config.copy_and_resolve_references()
  copy.update_from_flattened_dict(dict(values))
  return copy


def commit() -> str:
  """Of the code, short; with a "+" if it has changed since, "" outside of a git repository."""
  def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=identity.PACKAGE.parent, capture_output=True,
                          text=True, check=True).stdout.strip()
  try:
    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(
        git("status", "--porcelain", "--", "opd_jax", "configs"))
  except (OSError, subprocess.CalledProcessError):
    return ""


def _read(path: pathlib.Path) -> Result:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); remove it, and its cell runs again") from error
