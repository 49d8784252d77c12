"""Four families of verifiable questions with written-out working, which tiny models can learn.

    chain   Compute 3+4*7-2 mod 10.     sort   Sort 7,3,9.
            3+4=7                              7,3,9>3
            7*7=9                              7,9>7
            9-2=7                              9>9
            #### 7                             #### 3,7,9

    count   Count above 4 in 3,7,9.     keep   Keep above 4 in 3,7,9.
            3:0                                3:
            7:1                                7:7
            9:2                                9:7,9
            #### 2                             #### 7,9

An expert of one is none of the others: training on it alone spoils the rest. reasoning-gym's
`chain_sum` and `number_sorting` ask such questions of larger models, and have no working.
"""

from collections.abc import Callable
import random
from typing import NamedTuple

from opd_jax.data.builders.arithmetic import chains


class Question(NamedTuple):
  text: str
  answer: str
  working: list[str]    # a line a step
  level: int            # steps


def chain(rng: random.Random) -> Question:
  """Modular arithmetic on one digit, from left to right; three to eight steps."""
  steps = rng.randint(3, 8)
  drawn = chains.sample(rng, 1, steps)
  return Question(chains.question(drawn), chains.answer(drawn), chains.lines(drawn), steps)


def sort(rng: random.Random) -> Question:
  """Three to six digits put in order: each line takes the smallest of those left."""
  steps = rng.randint(3, 6)
  left = [rng.randrange(10) for _ in range(steps)]
  text, answer, working = f"Sort {_listed(left)}.", _listed(sorted(left)), []
  while left:
    working.append(f"{_listed(left)}>{min(left)}")
    left.remove(min(left))
  return Question(text, answer, working, steps)


def count(rng: random.Random) -> Question:
  """How many of four to ten digits are above a bound: each line is a digit and the count so far."""
  steps, bound = rng.randint(4, 10), rng.randint(1, 8)
  digits, above, working = [rng.randrange(10) for _ in range(steps)], 0, []
  for digit in digits:
    above += digit > bound
    working.append(f"{digit}:{above}")
  return Question(f"Count above {bound} in {_listed(digits)}.", str(above), working, steps)


def keep(rng: random.Random) -> Question:
  """Which of three to six digits are above a bound: each line is a digit and those so far."""
  steps, bound = rng.randint(3, 6), rng.randint(1, 8)
  while True:
    digits = [rng.randrange(10) for _ in range(steps)]
    if max(digits) > bound:
      break
  kept, working = [], []
  for digit in digits:
    kept += [digit] if digit > bound else []
    working.append(f"{digit}:{_listed(kept)}")
  return Question(f"Keep above {bound} in {_listed(digits)}.", _listed(kept), working, steps)


def _listed(digits: list[int]) -> str:
  return ",".join(map(str, digits))


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "chain": chain, "sort": sort, "count": count, "keep": keep}


def solution(question: Question) -> str:
  """The correct response: working, then the answer behind the marker."""
  return "\n".join([*question.working, f"#### {question.answer}"])
