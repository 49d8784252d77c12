"""The arithmetic data set: its splits, made from nothing but a seed."""

from collections.abc import Callable, Iterator, Mapping
import inspect
import json
import pathlib
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders.arithmetic import chains, examples

TEST_SEED = 1_000_003


def splits(*, train: int, test: int, mix: dict[str, float], digits: tuple[int, ...] = (1, 2),
           min_steps: int = 3, max_steps: int = 8, beyond: float = 0.0, seed: int = 0,
           teachers: Mapping[str, str] | None = None, rubric: str = ""
           ) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
  """Training rows of the kinds in `mix`, and plain test questions that training never asks.

  Args:
    train, test: rows in each split.
    mix: share of each of `examples.KINDS` in training.
    digits, min_steps, max_steps, beyond, seed: see `examples.rows`.
    teachers: name of the teacher by the number of digits, for example {"1": "easy", "2": "hard"}.
    rubric: file with what the rows of a judge ask; it begins with {question} and a blank line.
  Raises: ValueError for rows of a judge without such a file.
  """
  words = pathlib.Path(rubric).read_text() if rubric else ""
  if "judge" in mix and not words.startswith("{question}\n\n"):
    raise ValueError(f"mix has rows of a judge, and rubric is {rubric!r}; name a file that begins "
                     "with {question} and a blank line (configs/rubrics/short.txt)")
  shape = dict(digits=tuple(digits), min_steps=min_steps, max_steps=max_steps)

  def named(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
      digits = str(row["level"] // 100)
      yield {**row, "teacher": teachers.get(digits, "") if teachers else ""}

  def held_out() -> Iterator[dict[str, Any]]:
    return named(examples.rows(count=test, seed=TEST_SEED, mix={"plain": 1.0}, **shape))

  def training() -> Iterator[dict[str, Any]]:
    asked = {_question(row) for row in held_out()}
    rows = named(examples.rows(count=train, seed=seed, mix=dict(mix), beyond=beyond,
                               rubric=words, **shape))
    return (row for row in rows if _question(row) not in asked)

  return {"train": training, "test": held_out}


def _question(row: dict[str, Any]) -> str:
  """What a row asks, without the context around it: a context often holds the answer."""
  return json.loads(row["messages"])[0]["content"].split("\n\n")[0]


def fingerprint(**arguments: Any) -> str:
  """The code that makes the rows: when it changes, they are made again."""
  return "".join(map(inspect.getsource, (chat, chains, examples, sys.modules[__name__])))
