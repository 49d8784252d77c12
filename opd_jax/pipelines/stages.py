"""Rows that a stage of a run leaves on disk as JSON Lines, so that nothing is sampled twice.

Several processes make the rows together, and the first one reads and writes them for all.
"""

from collections.abc import Callable, Iterable
import hashlib
import json
import os
import pathlib
from typing import Any

from opd_jax import distributed

Row = dict[str, Any]


def rows(path: pathlib.Path | None, total: int, block: int,
         make: Callable[[int, int], list[Row]]) -> list[Row]:
  """All rows of a stage: those that its file has, and the others, made and appended.

  A stage that was killed goes on behind its last whole block; what a block holds must depend on
  its place alone, so that it holds the same whenever it is made.

  Args:
    path: the file, one row a line; None to keep nothing, for guarded data.
    total: rows of the whole stage.
    block: rows made and written at a time, the last time fewer.
    make: (start, stop) -> the rows of these places.
  Raises: ValueError if the file has more rows than the stage, or is not JSON Lines.
  """
  if path is None:
    return [row for start in range(0, total, block)
            for row in make(start, min(start + block, total))]
  found = distributed.of_first(lambda: read(path))
  if len(found) > total:
    raise ValueError(f"{path} has {len(found)} rows, and this stage only {total}: it was left by "
                     "another config; remove it or choose another workdir")
  if len(found) == total:
    return found
  del found[len(found) // block * block:]
  distributed.of_first(lambda: _cut(path, len(found)))
  for start in range(len(found), total, block):
    made = make(start, min(start + block, total))
    distributed.of_first(lambda: _append(path, made))
    found += made
  return found


def _cut(path: pathlib.Path, count: int) -> None:
  """Leaves the first rows of a file; there is one from now on."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("ab") as file:
    file.truncate(sum(len(line) + 1 for line in _lines(path)[:count]))


def _append(path: pathlib.Path, made: Iterable[Row]) -> None:
  with path.open("ab") as file:
    file.write("".join(json.dumps(row) + "\n" for row in made).encode())
    file.flush()
    os.fsync(file.fileno())


def begin_with(folder: pathlib.Path, name: str, fingerprint: Callable[[], str]) -> None:
  """Remembers what the stages in a folder rest on beside the config: weights, a file's contents.

  Args:
    fingerprint: says it; called by the first process alone, as weights are read whole for it.
  Raises: ValueError if rows are there that were made with another one of this name.
  """
  distributed.of_first(lambda: _begin_with(folder, name, fingerprint()))


def _begin_with(folder: pathlib.Path, name: str, fingerprint: str) -> None:
  path = folder / "made_with.json"
  begun = any(file.stat().st_size for file in folder.rglob("*.jsonl"))
  known = json.loads(path.read_text()) if path.is_file() else {}
  if begun and known.get(name, fingerprint) != fingerprint:
    raise ValueError(f"the {name} changed since the rows in {folder} were begun; put back what was "
                     "there, or choose another workdir")
  folder.mkdir(parents=True, exist_ok=True)
  aside = path.with_suffix(".tmp")
  aside.write_text(json.dumps(known | {name: fingerprint}, indent=1))
  aside.rename(path)


def contents(rows: Iterable[Any]) -> str:
  """A hash of what stages are made of, for `begin_with`: rows, conversations."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps(row, sort_keys=True).encode())
  return digest.hexdigest()


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a file; a last line that was cut off is none. No file is no rows.

  Raises: ValueError naming a line that is not JSON.
  """
  found = []
  for number, line in enumerate(_lines(path), 1):
    try:
      found.append(json.loads(line))
    except ValueError as error:
      raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
  return found


def _lines(path: pathlib.Path) -> list[bytes]:
  """Those that are whole."""
  return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
