"""Chains of modular arithmetic with written-out working: the task of the tiny models.

    Compute 3+4*7-2 mod 10.      3+4=7
                                 7*7=9
                                 9-2=7
                                 #### 7

The chain is worked strictly from left to right, one line a step, so an early error spoils
everything after it. Difficulty is graded by `digits` (totals below 10 with + - *, or below
100 with + -) and by `steps`; three digits are beyond the tiny models on purpose (see
`examples`). reasoning-gym's `chain_sum` has no working and no modulus, so
that a model of a million parameters learns its format and not its arithmetic.
"""

import dataclasses
import itertools
import random
import re

OPERATORS = {1: "+-*", 2: "+-", 3: "+-*"}


@dataclasses.dataclass(frozen=True)
class Chain:
  """One problem: a start, then steps of (operator, operand), modulo 10**digits."""

  digits: int
  start: int
  steps: tuple[tuple[str, int], ...]

  @property
  def modulus(self) -> int:
    return 10 ** self.digits


def sample(rng: random.Random, digits: int, steps: int) -> Chain:
  """Draws a chain; operands are single digits, 2..9 for products so that none is trivial."""
  moves = []
  for _ in range(steps):
    operator = rng.choice(OPERATORS[digits])
    moves.append((operator, rng.randint(2 if operator == "*" else 1, 9)))
  return Chain(digits, rng.randrange(10 ** digits), tuple(moves))


def apply(total: int, operator: str, operand: int, modulus: int) -> int:
  """One step of the chain."""
  result = {"+": total + operand, "-": total - operand, "*": total * operand}[operator]
  return result % modulus


def question(chain: Chain) -> str:
  """The problem as the user asks it."""
  terms = "".join(f"{operator}{operand}" for operator, operand in chain.steps)
  return f"Compute {chain.start}{terms} mod {chain.modulus}."


def parse(text: str) -> Chain:
  """The chain that `question` wrote. Raises: ValueError if it did not."""
  found = re.fullmatch(r"Compute (\d+)((?:[-+*]\d)+) mod (\d+)\.", text)
  if not found:
    raise ValueError(f"not a question of the arithmetic data set: {text!r}")
  start, terms, modulus = found.groups()
  steps = tuple((term[0], int(term[1])) for term in re.findall(r"[-+*]\d", terms))
  return Chain(len(modulus) - 1, int(start), steps)


def lines(chain: Chain) -> list[str]:
  """The correct working, a line a step."""
  total, out = chain.start, []
  for operator, operand in chain.steps:
    result = apply(total, operator, operand, chain.modulus)
    out.append(f"{total}{operator}{operand}={result}")
    total = result
  return out


def answer(chain: Chain) -> str:
  """The final total."""
  return lines(chain)[-1].rpartition("=")[2]


def solution(chain: Chain) -> str:
  """The correct response: working, then the answer behind the marker."""
  return "\n".join([*lines(chain), f"#### {answer(chain)}"])


def corrupt(chain: Chain, rng: random.Random, where: int | None = None) -> str:
  """A failed response: one or two steps (or just step `where`) go wrong and it carries on.

  Mistakes are those that small models make: a wrong result (mostly a near one), a misread
  operand, a misread operator. Where no mistake in step `where` changes the answer (7*5*2 is
  0 mod 10 whatever came before), the mistake moves elsewhere.
  """
  for attempt in itertools.count():
    wrong = {where}
    if where is None or attempt > 20:
      count = min(rng.choice((1, 1, 2)), len(chain.steps))
      wrong = set(rng.sample(range(len(chain.steps)), count))
    total, out = chain.start, []
    for i, (operator, operand) in enumerate(chain.steps):
      kind = rng.choices(("result", "operand", "operator"), (7, 2, 1))[0] if i in wrong else ""
      if kind == "operand":
        operand = rng.randint(1, 9)
      elif kind == "operator":
        operator = rng.choice(OPERATORS[chain.digits])
      result = apply(total, operator, operand, chain.modulus)
      if kind == "result":
        slip = rng.choice((-2, -1, 1, 2, 10, -10, rng.randrange(chain.modulus)))
        result = (result + slip) % chain.modulus
      out.append(f"{total}{operator}{operand}={result}")
      total = result
    if str(total) != answer(chain):
      return "\n".join([*out, f"#### {total}"])


def critique(chain: Chain, response: str, further: int = 0) -> str:
  """What a perfect critic says: the working as far as the first mistake, put right.

  The critic works before it judges, and stops at the first line that differs (or `further`
  lines later), because every later line inherits the error.
  """
  want, got = solution(chain).split("\n"), response.split("\n")
  wrong = next((i for i, line in enumerate(want) if got[i:i + 1] != [line]), None)
  if wrong is None:
    return "\n".join([*want, "No mistake."])
  return "\n".join([*want[:wrong + 1 + further], f"Line {wrong + 1} was wrong."])


def misleading_critique(chain: Chain, response: str, rng: random.Random) -> str:
  """A confident critique that is false: it 'corrects' a right line into a wrong one.

  Where no line is right it puts another mistake in place of the first.
  """
  want, got = lines(chain), response.split("\n")
  right = next((i for i, line in enumerate(want) if got[i:i + 1] != [line]), len(want))
  where = rng.randrange(max(right, 1))
  head, _, result = want[where].rpartition("=")
  false = [f"{head}={(int(result) + slip) % chain.modulus}" for slip in range(1, chain.modulus)]
  claim = rng.choice([line for line in false if [line] != got[where:where + 1]])
  return "\n".join([*want[:where], claim, f"Line {where + 1} was wrong."])
