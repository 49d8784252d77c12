"""From rows on disk to the batches of a run: shuffling, shared work, exact resume."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import json
import random
from typing import Any

import grain

from opd_jax import distributed
from opd_jax.data.tokenizer import Tokenizer

Row = dict[str, Any]


def encode(tokenizer: Tokenizer, teachers: Sequence[str] = ()) -> Callable[[Row], Row]:
  """Row -> the row with `prompt_ids`, and `teacher_id` as in `teacher_id`."""
  return lambda row: {**row, "prompt_ids": tokenizer.encode_chat(json.loads(row["messages"])),
                      "teacher_id": teacher_id(row, teachers)}


def teacher_id(row: Row, teachers: Sequence[str]) -> int:
  """The place in `teachers` of the one that a row names.

  A row that names none has the only one there is. Without `teachers` nobody asks: 0.

  Raises: ValueError naming the row if there is no such teacher, or none is named of several.
  """
  if not teachers:
    return 0
  name = row["teacher"]
  if name in teachers:
    return teachers.index(name)
  if name:
    known = ", ".join(map(repr, filter(None, teachers))) or "one `teacher` without a name"
    raise ValueError(f"row {row['id']!r} names the teacher {name!r}, but the config has {known}; "
                     f"add a section `teachers.{name}`, or correct the row")
  if len(teachers) == 1:
    return 0
  raise ValueError(f"row {row['id']!r} names no teacher, and the config has several: "
                   f"{', '.join(teachers)}; for JSONL say in data.builder_kw.teacher which field "
                   "names it")


def encode_answered(tokenizer: Tokenizer, teachers: Sequence[str] = ()) -> Callable[[Row], Row]:
  """Row -> as `encode`, and `response_ids`, which end in EOS.

  Raises: ValueError, when a row comes up that has no response to learn from.
  """
  def one(row: Row) -> Row:
    if not row["response"]:
      raise ValueError(f"row {row['id']!r} has an empty `response`, and this pipeline learns from "
                       "responses; choose data that has them (for JSONL name their field in "
                       "data.builder_kw.response)")
    ids = [*tokenizer.encode(row["response"]), tokenizer.end_id]
    return {**encode(tokenizer, teachers)(row), "response_ids": ids}
  return one


def rows_in(bucket: int, tokens: int) -> int:
  """Rows of a batch of `tokens` padded tokens, of rows padded to `bucket`."""
  return max(tokens // bucket, 1)


class Numbered:
  """A source whose rows know their place in it: `index`."""

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Row:
    return {**self._source[index], "index": index}


class Batches:
  """Endless lists of rows; `state` / `restore` resume exactly, across epochs too.

  Rows for which `fits` is false are dropped, never cut, and counted in `dropped`. There is one
  order of rows however many processes there are: each reads and transforms its share of them, and
  all get all. Each reads ahead, in a thread, what it expects to be its share of the next list.

  Raises: ValueError if there is no row, or none that fits.
  """

  def __init__(self, source: Any, size: int, *, transform: Callable[[Row], Row],
               fits: Callable[[Row], bool], seed: int, shuffle: bool = True):
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
      dataset = dataset.shuffle()
    if not len(source):
      raise ValueError("the data has no rows; choose another split, or other data")
    # Twice through the data without a fit: then no row fits. Of large data a part must do.
    self._patience = min(2 * len(source), 10_000)
    self._rows = dataset.map(transform).repeat()
    self._size, self._fits = size, fits
    self._next, self.dropped = 0, 0
    self._reader = futures.ThreadPoolExecutor(1)
    self._ahead: tuple[range, futures.Future[list[Row]]] | None = None

  def __iter__(self) -> Iterator[list[Row]]:
    return self

  def __next__(self) -> list[Row]:
    rows, misses = [], 0
    while len(rows) < self._size:
      places = range(self._next, self._next + self._size - len(rows))
      self._next = places.stop
      for row in distributed.each(self._read, places):
        if self._fits(row):
          rows.append(row)
          misses = 0
          continue
        self.dropped += 1
        misses += 1
        if misses >= self._patience:
          raise ValueError(f"{misses:,} rows in a row were dropped as too long: raise "
                           "rollout.max_prompt (or batch.buckets), or choose other data")
    soon = distributed.share(range(self._next, self._next + self._size))
    self._ahead = soon, self._reader.submit(self._transformed, soon)
    return rows

  def _read(self, places: range) -> list[Row]:
    if self._ahead and self._ahead[0] == places:
      return self._ahead[1].result()
    return self._reader.submit(self._transformed, places).result()

  def _transformed(self, places: range) -> list[Row]:
    return [self._rows[place] for place in places]

  def state(self) -> dict[str, Any]:
    """Everything needed to go on from here, as JSON, with any number of processes."""
    return {"rows": {"next_index": self._next}, "dropped": self.dropped}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes back to where `state` was taken."""
    self._next = state["rows"]["next_index"]
    self.dropped = state["dropped"]


class BucketedBatches:
  """Batches of rows of similar length for training on given responses.

  Rows are taken in chunks; within a chunk each row goes to the smallest bucket that holds
  it, and a bucket's batch has `rows_in` rows. The last batch of a bucket is filled
  up with None. So shapes are few and padding is small, and the state is only "which chunk,
  how many of its batches are done".
  """

  def __init__(self, chunks: Batches, length: Callable[[Row], int], buckets: Sequence[int],
               tokens: int, seed: int):
    self._chunks, self._length = chunks, length
    self._buckets, self._tokens, self._seed = sorted(buckets), tokens, seed
    self._plan: list[tuple[int, list[Row | None]]] = []
    self._before, self._done, self._chunk = chunks.state(), 0, 0

  @property
  def dropped(self) -> int:
    """Rows longer than the largest bucket, so far."""
    return self._chunks.dropped

  def __iter__(self) -> Iterator[tuple[int, list[Row | None]]]:
    return self

  def __next__(self) -> tuple[int, list[Row | None]]:
    if self._done == len(self._plan):
      self._before = self._chunks.state()
      self._plan = self._cut(next(self._chunks))
      self._done, self._chunk = 0, self._chunk + 1
    self._done += 1
    return self._plan[self._done - 1]

  def _cut(self, rows: list[Row]) -> list[tuple[int, list[Row | None]]]:
    groups: dict[int, list[Row | None]] = {size: [] for size in self._buckets}
    for row in rows:
      groups[next(size for size in self._buckets if self._length(row) <= size)].append(row)
    plan = []
    for size, group in groups.items():
      count = rows_in(size, self._tokens)
      group += [None] * (-len(group) % count)
      plan += [(size, group[i:i + count]) for i in range(0, len(group), count)]
    random.Random(f"{self._seed}/{self._chunk}").shuffle(plan)
    return plan

  def state(self) -> dict[str, Any]:
    """Everything needed to go on from here, as JSON."""
    return {"before": self._before, "done": self._done, "chunk": self._chunk}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes back to where `state` was taken."""
    self._chunks.restore(state["before"])
    self._before, self._chunk, self._done = state["before"], state["chunk"], state["done"]
    self._plan = []
    if state["chunk"]:
      self._chunk -= 1
      self._plan = self._cut(next(self._chunks))
      self._chunk += 1
