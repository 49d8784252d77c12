"""Notes about records, judged by a gold reward: weak-to-strong learning for tiny models.

    7,3,9,2,5,4        ->        9,7,5:4

`verifiers/notes.py` says what gold likes: it grades five attributes, in nats, and is both the
verifier of responses and the truth from which preferences are drawn. The design answers what makes
learning from a weak teacher a question at all:

*The weak model errs systematically.* Its records are not like the others: with probability `lead`
the three greatest facts stand first, so that taking the first three, a habit, is nearly as good as
comparing, a skill. This is the lead bias of models that summarize. On records in any order (lead=0:
`test`, and what the strong model is given) such a teacher states facts of the head that are not the
greatest: its order, its truth and its arithmetic may be right, its coverage and its brevity are
wrong where the head is, and the same at every sampling. It is no noise, and more samples do not
average it out; `head_share` measures it. A weak model that is small and never pre-trained has the
others' mistakes on top: facts that are not in the record, and wrong spreads.

*The strong model can do it, but is not tuned for it.* It is pre-trained on all `STYLES` of notes:
which facts (the greatest, the least, the first, the last), how many, in which order, with a spread
or without, and gold's is but one of them. Without demonstrations the style is drawn at random, so
that the base's own notes are poor by gold's measure. With two demonstrations of one style in the
prompt (`shots` of the rows) the response has their style: few-shot it can do what is shown.
Some demonstrations have slips, as those of a weak teacher have, while the response has none: the
base learns to look through errors. Styles that select by value are more frequent than those that
select by place (`SHARES`), which is the prior knowledge there is to be elicited: what two
demonstrations leave open, the base decides for comparing.

*The gap is wide.* The best notes have 5.0 nats; notes of the first three facts, falling, with the
right spread, have 5.0 on records that lead and 2.75 on the others; notes of a style drawn at random
2.0; notes with one slip 3.6, with four 1.3 (see tests/data/notes_test.py). Over prompts the rewards
of notes of the first three have a standard deviation of 1, so that 256 prompts know their mean to
0.06: a gap of 2.3 is 18 times its 95% half-interval.

Splits of every kind: `train`; `held_out`, drawn as `train` is; `test`, whose records are in any
order. Each has records of its own, of all kinds together (`part`): what a model is asked about in
tests, neither it nor its teacher has learned or was shown. `answer` is always the record.
"""

from collections.abc import Callable, Iterator, Sequence
import hashlib
import inspect
import itertools
import json
import math
import random
import sys
from typing import Any, NamedTuple

from opd_jax.data import chat
from opd_jax.verifiers import notes as gold_notes

KINDS = ("pretrain", "sft", "preferences", "prompts")
SIZE = 6  # facts of a record
HELD_OUT_SEED, TEST_SEED = 1_000_003, 1_000_033

# Which facts a note takes, and how often pre-training does so.
SHARES = {"greatest": 0.45, "least": 0.25, "first": 0.15, "last": 0.15}
ORDERS = ("falling", "rising", "as they stand")
COUNTS = (2, 3, 4)


class Style(NamedTuple):
  """A way to write notes."""

  which: str = "greatest"
  count: int = 3
  order: str = "falling"
  spread: bool = True


GOLD = Style()
STYLES = [Style(*x) for x in itertools.product(SHARES, COUNTS, ORDERS, (True, False))]


def splits(*, kind: str, train: int, test: int, held_out: int = 0, lead: float = 0.0,
           slips: Sequence[int] = (0,), shots: float = 0.0, noise: float = 0.2,
           seed: int = 0) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
  """Rows of one kind.

  Args:
    kind: "pretrain", notes of all styles, with demonstrations or without; "sft", notes of gold's
      style; "preferences", a group of two notes, the one that gold drew as the better first (and as
      `response`); "prompts", records alone.
    train, test, held_out: rows in each split; without rows there is no `held_out`.
    lead: share of the records of `train` and `held_out` whose three greatest facts stand first.
    slips: how many slips a note has, each equally often, of "sft" and "preferences": (0,) the best
      notes alone, (0, 1, 2, 3, 4) of all qualities.
    shots: share of the rows of "pretrain" and "prompts" with two demonstrations, those of the
      latter in gold's style and right.
    noise: share of the demonstrations of "pretrain" with a slip or two.
    seed: of `train`; the other splits are always the same.
  Raises: ValueError for a kind that does not exist.
  """
  if kind not in KINDS:
    raise ValueError(f"data.builder_kw.kind is {kind!r}; it must be one of {', '.join(KINDS)}")

  def rows(split: str, number: int, lead: float) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{number}/{kind}")
    for i in itertools.count():
      made = _row(rng, kind, record(rng, lead, split), tuple(slips), shots, noise)
      yield dict(id=f"notes-{split}-{number}-{i}", task=f"notes/{kind}", level=0, **made)

  def tested() -> Iterator[dict[str, Any]]:
    return itertools.islice(rows("test", TEST_SEED, 0.0), test)

  def kept() -> Iterator[dict[str, Any]]:
    return itertools.islice(rows("held_out", HELD_OUT_SEED, lead), held_out)

  def training() -> Iterator[dict[str, Any]]:
    return itertools.islice(rows("train", seed, lead), train)

  made = {"train": training, "test": tested}
  return made | {"held_out": kept} if held_out else made


def part(record: str) -> str:
  """The split that a record belongs to: a twentieth of all are of `test`, another of `held_out`."""
  place = hashlib.sha256(record.encode()).digest()[0]
  return "test" if place < 13 else "held_out" if place < 26 else "train"


def record(rng: random.Random, lead: float, split: str = "train") -> str:
  """Six different digits, of a split; with probability `lead` the three greatest come first."""
  leads = rng.random() < lead
  while True:
    digits = rng.sample(range(10), SIZE)
    if leads:
      digits.sort(reverse=True)
      head, tail = digits[:gold_notes.GREATEST], digits[gold_notes.GREATEST:]
      rng.shuffle(head)
      rng.shuffle(tail)
      digits = head + tail
    made = ",".join(map(str, digits))
    if part(made) == split:
      return made


def write(record: str, style: Style = GOLD) -> str:
  """The note of a style, without a mistake."""
  facts = gold_notes.facts(record)
  chosen = {"greatest": sorted(facts)[-style.count:], "least": sorted(facts)[:style.count],
            "first": facts[:style.count], "last": facts[-style.count:]}[style.which]
  chosen = [fact for fact in facts if fact in chosen]
  if style.order != "as they stand":
    chosen.sort(reverse=style.order == "falling")
  return _text(chosen, abs(chosen[0] - chosen[-1]) if style.spread else None)


def _text(facts: Sequence[int], spread: int | None) -> str:
  said = ",".join(map(str, facts))
  return said if spread is None else f"{said}:{spread}"


def slip(rng: random.Random, record: str, text: str) -> str:
  """A note with a mistake more, of a kind drawn at random; gold mostly thinks less of it.

  A fact is left out, another one is stated, in its place or at the end, two change places, one
  is untrue, or the spread is wrong or missing. Otherwise a right spread stays that of the facts.
  """
  body, colon, spread = text.partition(":")
  facts = gold_notes.facts(body)
  right = bool(colon) and spread == str(abs(facts[0] - facts[-1]))
  others = [fact for fact in gold_notes.facts(record) if fact not in facts]
  kinds = ["untrue", "spread"] + ["swap", "drop"] * (len(facts) > 1)
  kinds += ["other", "more"] * bool(others)
  kind = rng.choice(kinds)
  if kind == "spread":
    wrong = rng.choice([d for d in map(str, range(10)) if d != spread])
    return body + (f":{wrong}" if colon and rng.random() < 0.7 else "")
  place = rng.randrange(len(facts))
  if kind == "drop":
    del facts[place]
  elif kind == "other":
    facts[place] = rng.choice(others)
  elif kind == "more":
    facts.append(rng.choice(others))
  elif kind == "untrue":
    facts[place] = rng.choice([d for d in range(10)
                               if d not in gold_notes.facts(record) and d != facts[place]])
  else:
    other = rng.choice([i for i in range(len(facts)) if i != place])
    facts[place], facts[other] = facts[other], facts[place]
  if right:
    return _text(facts, abs(facts[0] - facts[-1]))
  return _text(facts, None) + colon + spread


def graded(rng: random.Random, record: str, slips: Sequence[int]) -> str:
  """A note of gold's style with a number of slips drawn from `slips`."""
  text = write(record)
  for _ in range(rng.choice(slips)):
    text = slip(rng, record, text)
  return text


def prompt(record: str, demonstrations: Sequence[tuple[str, str]] = ()) -> chat.Messages:
  """The conversation that asks for a note: the record, behind demonstrations if there are any.

  Args:
    demonstrations: records and their notes, in the order in which they are shown.
  Source: EVE, appendix 9.6, with ">" in the place of "TL;DR:".
  """
  shown = "".join(f"{there}>{note}\n" for there, note in demonstrations)
  return chat.question(f"{shown}{record}>")


def head_share(record: str, text: str) -> float:
  """Share of the stated facts that are among the record's first three but not its greatest three.

  The measure of the weak model's systematic error: 0 for gold's notes, near 0.5 for notes of the
  first three facts of records in any order. 0 for what is no note.
  """
  if gold_notes.attributes(record, text) is None:
    return 0.0
  stated = gold_notes.facts(text.strip().partition(":")[0])
  head = set(gold_notes.facts(record)[:gold_notes.GREATEST]) - set(gold_notes.greatest(record))
  return sum(fact in head for fact in stated) / len(stated)


def _style(rng: random.Random) -> Style:
  """One of `STYLES`, what it selects by as often as `SHARES` says."""
  which = rng.choices(list(SHARES), list(SHARES.values()))[0]
  return rng.choice([style for style in STYLES if style.which == which])


def _row(rng: random.Random, kind: str, about: str, slips: Sequence[int], shots: float,
         noise: float) -> dict[str, Any]:
  """messages, answer, response and group of one row."""
  made = dict(messages=json.dumps(prompt(about)), answer=about, response="", group="")
  if kind == "sft":
    return made | dict(response=graded(rng, about, slips))
  if kind in ("prompts", "pretrain"):
    style = GOLD if kind == "prompts" else _style(rng)
    shown = []
    for _ in range(2 if rng.random() < shots else 0):
      there = record(rng, 0.0)
      note = write(there, style)
      for _ in range(rng.choice((1, 2)) if kind == "pretrain" and rng.random() < noise else 0):
        note = slip(rng, there, note)
      shown.append((there, note))
    return made | dict(messages=json.dumps(prompt(about, shown)),
                       response="" if kind == "prompts" else write(about, style))
  first = second = graded(rng, about, slips)
  for _ in range(100):  # of equal notes nothing can be learned
    if second != first:
      break
    second = graded(rng, about, slips)
  gap = gold_notes.gold(about, first) - gold_notes.gold(about, second)
  if rng.random() >= 1.0 / (1.0 + math.exp(-gap)):
    first, second = second, first
  return made | dict(response=first,
                     group=json.dumps([{"response": first}, {"response": second}]))


def fingerprint(**arguments: Any) -> str:
  """The code that makes the rows: when it changes, they are made again."""
  return "".join(map(inspect.getsource, (chat, gold_notes, sys.modules[__name__])))
