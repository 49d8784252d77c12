"""Data sets as TFDS builders: from a generator of rows to array_record files, once.

Every data set yields the same canonical row:

    id        str   unique within its split
    task      str   which family of tasks, "arithmetic/plain"
    level     int   difficulty, 0 where there is none
    messages  str   JSON list of {role, content}: the conversation up to the response
    answer    str   the ground truth that a verifier compares with
    response  str   a response to learn from, "" if there is none
    teacher   str   the name of the teacher to learn it from, "" for the only one
    group     str   JSON list of responses to be learned together (a pair, the better one first; the
                    K samples of the prompt), each {response, ...}: its text and what is known of
                    it, for example its log-probability under a model; "" if there is none
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import hashlib
import inspect
import io
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from opd_jax.data.builders import (
    arithmetic, critiqued, domains, gpqa, instructions, jsonl, notes, programs, rows, summaries,
    tool_use)

Splits = Mapping[str, Callable[[], Iterator[dict[str, Any]]]]

# Each data set: keyword arguments -> its splits, as functions that yield rows.
BUILDERS: dict[str, Any] = {"arithmetic": arithmetic, "critiqued": critiqued, "domains": domains,
                            "gpqa": gpqa, "instructions": instructions, "jsonl": jsonl,
                            "notes": notes, "programs": programs, "rows": rows,
                            "summaries": summaries, "tool_use": tool_use}

# Guarded: their authors ask that nobody shows them as plain text. Of such rows, and of what models
# say of them, only ids reach the disk; they are read anew by every run and live in memory.
GUARDED = ("gpqa",)


class Rows(tfds.core.GeneratorBasedBuilder):
  """The one TFDS builder: canonical rows from whatever generator it is given."""

  VERSION = tfds.core.Version("1.2.0")

  def __init__(self, splits: Splits, **kwargs: Any):
    self._splits = splits
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(dict(
        id=text, task=text, level=np.int32, messages=text, answer=text, response=text,
        teacher=text, group=text)))

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

  def _generate_examples(self, rows: Callable[[], Iterator[dict[str, Any]]]) -> Any:
    for i, row in enumerate(rows()):
      yield i, {"teacher": "", "group": "", **row}


class Source:
  """Random access to the rows of one split, as dicts of str and int."""

  def __init__(self, records: Any):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row = self._records[index]
    return {key: value.decode() if isinstance(value, bytes) else int(value)
            for key, value in row.items()}


class Guarded:
  """Random access to rows that live in memory alone."""

  def __init__(self, rows: Iterable[dict[str, Any]]):
    self._rows = [{"teacher": "", **row} for row in rows]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return dict(self._rows[index])


def is_guarded(data: Mapping[str, Any]) -> bool:
  """Whether texts and tokens of a run's data, and of models about it, must not reach the disk.

  Args:
    data: the `data` section: what is learned, or what is asked, may be guarded. plain_text among a
      builder's arguments takes the guard away.
  """
  return any(name in GUARDED and not arguments.get("plain_text", False)
             for name, arguments in ((data["builder"], data["builder_kw"]), evaluated(data)))


def evaluated(data: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
  """Name and arguments of the data set that eval_split is of; mostly that which is learned.

  Args:
    data: the `data` section.
  """
  which = "eval_builder" if data["eval_builder"] else "builder"
  return data[which], data[f"{which}_kw"]


def open_eval(data: Mapping[str, Any]) -> "Source | Guarded":
  """Opens the split of held-out rows that a `data` section names, as `open_source` does."""
  return open_source(*evaluated(data), data["eval_split"], data["cache"])


def open_source(name: str, arguments: Mapping[str, Any], split: str,
                cache: str = "") -> Source | Guarded:
  """Opens a split, preparing the data set on first use.

  The cache folder's name is a hash of the arguments, the contents of the files they name, the
  code that makes the rows and their version, so a stale copy is never read. It is written aside
  and renamed, so several processes may prepare it at once. One of `GUARDED` has no such copy.

  Args:
    name: a key of `BUILDERS`.
    arguments: keyword arguments of that module's `splits`.
    split: for example "train".
    cache: folder; ~/.cache/opd_jax/data by default.
  Raises: ValueError for an unknown data set, argument or split, or for a bad row.
  """
  if name not in BUILDERS:
    raise ValueError(f"data.builder is {name!r}; it must be one of {', '.join(BUILDERS)}")
  module = BUILDERS[name]
  known = inspect.signature(module.splits).parameters
  if unknown := set(arguments) - set(known):
    raise ValueError(f"data.builder_kw has {sorted(unknown)}, which {name!r} does not take; it "
                     f"takes {sorted(known)}")
  splits = module.splits(**arguments)
  if split not in splits:
    raise ValueError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}")
  if name in GUARDED:
    return Guarded(splits[split]())
  whole = lambda x: dict(x) if hasattr(x, "keys") else list(x)  # a ConfigDict is not a dict
  identity = json.dumps([name, str(Rows.VERSION), dict(arguments), module.fingerprint(**arguments)],
                        sort_keys=True, default=whole)
  root = pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache/opd_jax/data"
  folder = root / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
  if not folder.is_dir():
    _prepare(splits, folder)
  builder = tfds.builder_from_directory(str(folder / "rows" / str(Rows.VERSION)))
  return Source(builder.as_data_source(split=split))


def _prepare(splits: Splits, folder: pathlib.Path) -> None:
  folder.parent.mkdir(parents=True, exist_ok=True)
  aside = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
  try:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download that is none
      Rows(splits, data_dir=aside).download_and_prepare(
          file_format="array_record",
          download_config=tfds.download.DownloadConfig(compute_stats="skip"))
    os.rename(aside, folder)
  except OSError:
    if not folder.is_dir():  # another process that prepared the same data set was faster
      raise
  finally:
    shutil.rmtree(aside, ignore_errors=True)
