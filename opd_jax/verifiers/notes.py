"""The gold reward of a note about a record: several attributes, graded, in nats.

A record is six facts, different digits in any order, "7,3,9,2,5,4". A note states some of them, and
behind a colon how far the first and the last that it states lie apart: "9,7,5:4". Gold likes the
three greatest facts, from the greatest down, true, nothing else, and the right spread:

    coverage     +1    for each of the three greatest facts, if it is stated
    truth        -1.5  for each stated digit that is not in the record
    brevity      -0.5  for each other true fact, and each repetition of a true one
    order        +0.5  for each two neighbors that fall, two at most
    arithmetic   +1    if the spread is that of the facts stated, -0.5 if it is not, 0 without one

The best note has 5.0; what is no note at all has -3.0, and no note has less. The rewards are log
odds: of two notes gold prefers the first with probability sigmoid(r1 - r2).
"""

import re

from opd_jax.verifiers.verdict import Verdict

BEST, WORST = 5.0, -3.0
GREATEST = 3  # how many facts gold wants

# What each attribute adds at most.
_MOST = dict(coverage=3.0, truth=0.0, brevity=0.0, order=1.0, arithmetic=1.0)
_NOTE = re.compile(r"(\d(?:,\d)*)(?::(\d))?")


def facts(record: str) -> list[int]:
  """The facts of a record, or those that a note states: "7,3" -> [7, 3]."""
  return [int(fact) for fact in record.split(",")]


def greatest(record: str) -> list[int]:
  """The facts that gold wants, from the greatest down."""
  return sorted(facts(record), reverse=True)[:GREATEST]


def attributes(record: str, text: str) -> dict[str, float] | None:
  """What each attribute adds to the reward of a note, in nats; None for what is no note."""
  found = _NOTE.fullmatch(text.strip())
  if not found:
    return None
  true, stated = set(facts(record)), facts(found[1])
  covered = set(greatest(record)) & set(stated)
  untrue = sum(fact not in true for fact in stated)
  falling = sum(a > b for a, b in zip(stated, stated[1:]))
  spread = "" if found[2] is None else int(found[2])
  return dict(coverage=1.0 * len(covered), truth=-1.5 * untrue,
              brevity=-0.5 * (len(stated) - untrue - len(covered)),
              order=0.5 * min(falling, GREATEST - 1),
              arithmetic=0.0 if spread == "" else 1.0 if spread == abs(stated[0] - stated[-1])
              else -0.5)


def gold(record: str, text: str) -> float:
  """The gold reward of a note about a record, in nats, from WORST to BEST."""
  parts = attributes(record, text)
  return WORST if parts is None else max(sum(parts.values()), WORST)


def share(reward: float) -> float:
  """Where a reward lies between the worst and the best. PGR does not see the difference."""
  return (reward - WORST) / (BEST - WORST)


def verify(text: str, answer: str) -> Verdict:
  """The gold reward as a verdict; `answer` is the record. 0 is the worst note's, 1 the best's."""
  parts = attributes(answer, text)
  if parts is None:
    return Verdict(0.0, "The response is no note: facts parted by commas, a colon and a digit.")
  lost = {name: most - parts[name] for name, most in _MOST.items()}
  if not any(lost.values()):
    return Verdict(1.0, "The note is as good as can be.")
  return Verdict(share(gold(answer, text)),
                 f"The note could be better in {max(lost, key=lost.get)}.")
