"""Arithmetic behind a critique: what a model must have learned before a critic can teach it.

In half of the rows the attempt that was criticized is there too, and the row asks for its
refinement; in the others the critique alone, which is what OPCD's self-teacher sees. The tiny
models have learned from rows of the first kind only (data/builders/arithmetic).
"""

from collections.abc import Callable, Iterator
import inspect
import json
import random
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders import arithmetic
from opd_jax.data.builders.arithmetic import chains, examples


def splits(*, train: int, test: int, digits: tuple[int, ...] = (1, 2), min_steps: int = 3,
           max_steps: int = 6, beyond: float = 0.5, seed: int = 0
           ) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
  """Rows to learn from and, of other questions, to be evaluated on.

  Args:
    train, test: rows in each split.
    digits, min_steps, max_steps: as of `arithmetic.splits`.
    beyond: share of the rows of three digits, more than the tiny models can compute, whose
      critique has all of the right solution: what is said must be read.
    seed: of the training rows.
  """
  shape = dict(digits=tuple(digits), min_steps=min_steps, max_steps=max_steps, beyond=beyond)

  def held_out() -> Iterator[dict[str, Any]]:
    return rows(count=test, seed=arithmetic.TEST_SEED, **shape)

  def training() -> Iterator[dict[str, Any]]:
    asked = {_question(row) for row in held_out()}
    return (row for row in rows(count=train, seed=seed, **shape) if _question(row) not in asked)

  return {"train": training, "test": held_out}


def rows(*, count: int, seed: int, digits: tuple[int, ...], min_steps: int, max_steps: int,
         beyond: float) -> Iterator[dict[str, Any]]:
  """Yields `count` rows, deterministic in the arguments; see `splits`."""
  rng = random.Random(seed)
  for i in range(count):
    too_hard = rng.random() < beyond
    chain = chains.sample(rng, 3 if too_hard else rng.choice(digits),
                          rng.randint(min_steps, max_steps))
    kind = rng.choice(("right", "early", "anywhere", "anywhere"))
    attempt = (chains.solution(chain) if kind == "right" else
               chains.corrupt(chain, rng, where=0 if kind == "early" else None))
    said = chains.critique(chain, attempt, len(chain.steps) if too_hard else 0)
    asked = chat.question(chains.question(chain))
    messages = (chat.refine_request(asked, attempt, said) if rng.random() < 0.5 else
                chat.with_critique(asked, said))
    yield dict(id=f"critiqued-{seed}-{i}", task="arithmetic/critiqued",
               level=examples.level(chain.digits, len(chain.steps)),
               messages=json.dumps(messages), answer=chains.answer(chain),
               response=chains.solution(chain))


def _question(row: dict[str, Any]) -> str:
  """What a row asks, without the critique behind it."""
  return json.loads(row["messages"])[0]["content"].partition("\n\n")[0]


def fingerprint(**arguments: Any) -> str:
  """The code that makes the rows: when it changes, they are made again."""
  return "".join(map(inspect.getsource, (chat, chains, examples, sys.modules[__name__])))
