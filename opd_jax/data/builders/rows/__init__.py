"""Rows as a run of ours left them, in JSON Lines: they are canonical rows already.

`pipelines/responses.py` makes them.
"""

from collections.abc import Iterator
import itertools
import json
from typing import Any

from opd_jax.data.builders import jsonl

FILE = "rows.jsonl"  # in the workdir of a run that makes some
FIELDS = dict(id=str, task=str, level=int, messages=str, answer=str, response=str, teacher=str,
              group=str)


def splits(*, train: str = "", test: str = "", skip: int = 0, rows: int = 0,
           responses: int = 0) -> jsonl.Splits:
  """Splits over files of rows, rows.jsonl in the workdirs of the runs that made them.

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    skip: how many of each split are left out, the first.
    rows: how many are taken, the first of the others; 0: all.
    responses: how many of a row's `group` are taken, the first; 0: all.
  Raises: ValueError, when read, naming file, line and field of what is no row.
  """
  def row(record: dict[str, Any], file: Any, number: int) -> dict[str, Any]:
    for name, kind in FIELDS.items():
      if type(record.get(name)) is not kind:
        raise ValueError(f"{file}, line {number}: {name!r} is {record.get(name)!r}; a row of ours "
                         f"has {', '.join(FIELDS)}. For other JSON Lines use data.builder='jsonl'")
    made = {name: record[name] for name in FIELDS}
    if responses and made["group"]:
      made["group"] = json.dumps(json.loads(made["group"])[:responses])
    return made

  found = jsonl.by_path(row, train, test, "id")
  return {name: (lambda read=read: itertools.islice(
      read(), skip, skip + rows if rows else None))
          for name, read in found.items()}


def read(path: str) -> Iterator[dict[str, Any]]:
  """The rows of a file, as `splits` checks them."""
  return splits(train=path)["train"]()


fingerprint = jsonl.fingerprint
