"""Several domains in one data set, made from nothing but a seed: for experts and their merging."""

from collections.abc import Callable, Iterator, Sequence
import inspect
import itertools
import json
import random
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders.arithmetic import chains
from opd_jax.data.builders.domains import tasks as families

TEST_SEED = 1_000_003


def splits(*, train: int, test: int, tasks: Sequence[str] = tuple(families.TASKS), seed: int = 0,
           route: bool = False) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
  """Training rows of the given tasks in turn, and test rows of questions that training never asks.

  Args:
    train, test: rows in each split.
    tasks: keys of `families.TASKS`.
    seed: of the training rows; the test rows are always the same.
    route: whether a row names the teacher of its domain, which has the name of its task.
  Raises: ValueError for a task that does not exist.
  """
  if not tasks or set(tasks) - set(families.TASKS):
    raise ValueError(f"data.builder_kw.tasks is {tuple(tasks)}; it must name some of "
                     f"{', '.join(families.TASKS)}")

  def held_out() -> Iterator[dict[str, Any]]:
    return itertools.islice(_rows(tasks, TEST_SEED, route, set()), test)

  def training() -> Iterator[dict[str, Any]]:
    asked = {row["messages"] for row in held_out()}
    return itertools.islice(_rows(tasks, seed, route, asked), train)

  return {"train": training, "test": held_out}


def _rows(tasks: Sequence[str], seed: int, route: bool,
          asked: set[str]) -> Iterator[dict[str, Any]]:
  """Endless rows, the tasks by turns, without the questions in `asked`."""
  # A stream of its own for each task: its questions do not depend on the other tasks.
  streams = {task: random.Random(f"{seed}/{task}") for task in tasks}
  for i, task in enumerate(itertools.cycle(tasks)):
    while True:
      question = families.TASKS[task](streams[task])
      messages = json.dumps(chat.question(question.text))
      if messages not in asked:
        break
    yield dict(id=f"{task}-{seed}-{i}", task=task, level=question.level, messages=messages,
               answer=question.answer, response=families.solution(question),
               teacher=task if route else "")


def fingerprint(**arguments: Any) -> str:
  """The code that makes the rows: when it changes, they are made again."""
  return "".join(map(inspect.getsource, (chat, chains, families, sys.modules[__name__])))
