"""The gold reward of a note about a record: several attributes, graded, in nats.

A record is six facts, each a digit and a letter, "7b,3k,9c,2m,5e,4f". A note states some of them,
and behind a colon how far the first and the last value that it states lie apart: "9c,7b,5e:4". Gold
likes the three greatest facts, from the greatest down, true, nothing else, and the right spread:

    coverage     +1    for each of the three greatest facts, if it is stated with its value
    truth        -1.5  for each letter that is not in the record, or stated with another value
    brevity      -0.5  for each other true fact, and each repetition
    order        +0.5  for each two neighbors whose stated values fall, two at most
    arithmetic   +1    if the spread is that of the values stated, -0.5 if it is not, 0 without one

The best note has 5.0; what is no note at all has -3.0, and no note has less. The rewards are log
odds: of two notes gold prefers the first with probability sigmoid(r1 - r2).
"""

import re

from opd_jax.verifiers.verdict import Verdict

BEST, WORST = 5.0, -3.0
GREATEST = 3  # how many facts gold wants

# What each attribute adds at most.
_MOST = dict(coverage=3.0, truth=0.0, brevity=0.0, order=1.0, arithmetic=1.0)
_NOTE = re.compile(r"(\d[a-z](?:,\d[a-z])*)(?::(\d))?")


def facts(record: str) -> list[tuple[str, int]]:
  """The facts of a record, or those that a note states: "7b,3k" -> [("b", 7), ("k", 3)]."""
  return [(fact[1], int(fact[0])) for fact in record.split(",")]


def greatest(record: str) -> list[tuple[str, int]]:
  """The facts that gold wants, from the greatest down."""
  return sorted(facts(record), key=lambda fact: -fact[1])[:GREATEST]


def attributes(record: str, text: str) -> dict[str, float] | None:
  """What each attribute adds to the reward of a note, in nats; None for what is no note."""
  found = _NOTE.fullmatch(text.strip())
  if not found:
    return None
  true, stated, wanted = dict(facts(record)), facts(found[1]), set(greatest(record))
  covered, other, untrue = set(), 0, 0
  for fact in stated:
    if true.get(fact[0]) != fact[1]:
      untrue += 1
    elif fact in wanted and fact not in covered:
      covered.add(fact)
    else:
      other += 1
  values = [value for _, value in stated]
  falling = sum(a > b for a, b in zip(values, values[1:]))
  spread = "" if found[2] is None else int(found[2])
  return dict(coverage=1.0 * len(covered), truth=-1.5 * untrue, brevity=-0.5 * other,
              order=0.5 * min(falling, GREATEST - 1),
              arithmetic=0.0 if spread == "" else 1.0 if spread == abs(values[0] - values[-1])
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
