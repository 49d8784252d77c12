"""How unlike are a policy's responses to one prompt, and do more of them find more right answers?

Metrics of one group, then means over prompts: pass@k; self-BLEU, pairwise distance, distinct-n and
the share of unique texts; for programs the distance of their syntax trees; and all but pass@k once
more for the successes alone ("success_..."), since a policy that is wrong in many ways is diverse
too. One response is not diverse or uniform: groups of fewer than two are undefined, not 0.

Most of these depend on how many responses there are and how long they are: compare runs of the same
number, and successes with care.

Source: MOPD (2605.12652), its analysis of diversity; METHODS 4.
"""

import ast
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import itertools
import re
from typing import Any
import warnings

from matplotlib.figure import Figure
import numpy as np

from opd_jax.evals import metrics, paired
from opd_jax.evals.saved import Group

Program = Callable[[str], str]  # a response -> the program in it

# Texts are compared up to here, in characters. Two of this length take 35 ms on one core, two of a
# quarter of it 3 ms; a group of 8 has 28 pairs.
LONGEST = 8192


def tokens(text: str) -> list[str]:
  """Words and numbers as they are, and every other character that is not white space alone."""
  return re.findall(r"\w+|[^\w\s]", text)


def self_bleu4(texts: Sequence[str]) -> float:
  """Mean BLEU-4 of each text with all others as its references: 1 for copies of one text.

  BLEU of a sentence: clipped n-gram precisions, and a brevity penalty against the reference whose
  length is nearest, of two the shorter. Smoothed by adding one to matches and total for n > 1 (Lin
  and Och 2004; sacrebleu's "add-k", nltk's method 2). A text of fewer than four `tokens` has as
  many precisions as tokens.

  Source: Texygen (1802.01886), with smoothing.
  """
  rows = [tokens(text) for text in texts]
  precisions: list[list[float]] = [[] for _ in rows]
  for n in range(1, 5):
    counts = [Counter(_ngrams(row, n)) for row in rows]
    # An n-gram counts as often as in the reference that has it most. That is `most`, or, for the
    # text that has it most itself, the next: no union of references is made for every text.
    most, second = Counter(), Counter()
    for count in counts:
      for gram, c in count.items():
        if c > most[gram]:
          most[gram], second[gram] = c, most[gram]
        elif c > second[gram]:
          second[gram] = c
    for count, found in zip(counts, precisions):
      if count:
        matched = sum(c if c < most[gram] else second[gram] for gram, c in count.items())
        found.append((matched + (n > 1)) / (count.total() + (n > 1)))
  lengths = [len(row) for row in rows]
  return float(np.mean([_bleu(found, lengths[i], lengths[:i] + lengths[i + 1:])
                        for i, found in enumerate(precisions)]))


def text_distance(texts: Sequence[str]) -> float:
  """Mean over pairs of the edit distance by characters, over the longer one's length: in [0, 1].

  Of texts longer than `LONGEST` the beginnings are compared.
  """
  return float(np.mean([edit_distance(a, b) / max(len(a), len(b), 1)
                        for a, b in itertools.combinations([text[:LONGEST] for text in texts], 2)]))


def distinct(texts: Sequence[str], n: int) -> float:
  """Different n-grams of `tokens` over all, pooled over the texts; NaN if there are none."""
  grams = [gram for text in texts for gram in _ngrams(tokens(text), n)]
  return len(set(grams)) / len(grams) if grams else np.nan


def unique(texts: Sequence[str]) -> float:
  """Share of different texts, white space aside."""
  return len({" ".join(text.split()) for text in texts}) / len(texts)


def tree_distance(programs: Sequence[str]) -> float:
  """Mean over pairs of 1 - Jaccard of the types of syntax nodes, counted, of Python programs.

  Names and constants do not count. A program that does not parse is left out; NaN if fewer than
  two are left.
  """
  found = [types for types in map(node_types, programs) if types]
  if len(found) < 2:
    return np.nan
  return float(np.mean([1.0 - (a & b).total() / (a | b).total()
                        for a, b in itertools.combinations(found, 2)]))


METRICS: dict[str, Callable[[Sequence[str]], float]] = {
    "self_bleu4": self_bleu4, "text_distance": text_distance,
    "distinct1": lambda texts: distinct(texts, 1), "distinct2": lambda texts: distinct(texts, 2),
    "unique": unique}


def per_prompt(groups: Sequence[Group], ks: Sequence[int],
               program: Program | None = None) -> dict[str, np.ndarray]:
  """Every metric of every group.

  Args:
    groups: prompts with their responses and rewards, of which 1 is a success.
    ks: the k of pass@k; undefined for groups of fewer than k.
    program: the Python program in a response; None if responses are none.
  Returns: metric -> f64[P], NaN where it is undefined. With `program` also "tree_distance" and
    "unparsed", the share of programs that it leaves out.
  """
  rows = []
  for group in groups:
    right = [reward >= 1.0 for reward in group.rewards]
    row = {f"pass@{k}": metrics.pass_at_k(len(right), sum(right), k) if k <= len(right) else np.nan
           for k in ks}
    successes = list(itertools.compress(group.responses, right))
    for prefix, texts in (("", group.responses), ("success_", successes)):
      row |= {prefix + name: value for name, value in _of_texts(texts, program).items()}
    rows.append(row)
  return {name: np.array([row[name] for row in rows], float) for name in rows[0]} if rows else {}


def study(runs: Mapping[str, Sequence[Group]], ks: Sequence[int] = (1, 2, 4, 8), seed: int = 0,
          program: Program | None = None) -> dict[str, Any]:
  """The diversity of one run's responses, or of several runs' to the same prompts.

  Args:
    runs: name -> groups. The first is what the others are compared with.
    ks, program: as `per_prompt`.
    seed: of the bootstrap.
  Returns: what `paired.compare` returns, and "prompts" P, "responses": run -> how many, "cut": run
    -> how many of them are longer than `LONGEST`.
  Raises: ValueError if there are no prompts, or runs differ in theirs.
  """
  first, *_ = runs
  ids = [group.id for group in runs[first]]
  for name, groups in runs.items():
    if [group.id for group in groups] != ids:
      raise ValueError(f"{name!r} has other prompts than {first!r} ({len(groups)} and {len(ids)}); "
                       "runs are compared on the same ones")
  if not ids:
    raise ValueError(f"{first!r} has no prompts")
  texts = {name: [text for group in groups for text in group.responses]
           for name, groups in runs.items()}
  values = {name: per_prompt(groups, ks, program) for name, groups in runs.items()}
  return {"prompts": len(ids), "responses": {name: len(x) for name, x in texts.items()},
          "cut": {name: sum(len(text) > LONGEST for text in x) for name, x in texts.items()},
          **paired.compare(values, first, seed)}


def picture(results: Mapping[str, Any]) -> Figure:
  """Draws the means of `study`."""
  return paired.picture(results["means"], {})


def edit_distance(a: str, b: str) -> int:
  """The fewest insertions, deletions and substitutions of a character that make b of a.

  The table of dynamic programming has len(a) rows and len(b) columns, and neighbors differ by at
  most 1. So a column is two whole numbers, whose bits say where it steps up and where down from row
  to row, and the next column takes a dozen operations on them.

  Source: Myers, "A fast bit-vector algorithm for approximate string matching" (1999), in the form
    of Hyyrö (2003) for whole texts.
  """
  if not a or not b or a == b:
    return 0 if a == b else len(a) + len(b)
  where: dict[str, int] = {}
  for i, character in enumerate(a):
    where[character] = where.get(character, 0) | 1 << i
  every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
  up, down, distance = every, 0, len(a)
  for character in b:
    same = where.get(character, 0)
    diagonal = (((same & up) + up) ^ up) | same | down  # where the diagonal step costs nothing
    more, less = down | ~(diagonal | up), up & diagonal  # steps from the last column to this one
    distance += bool(more & last) - bool(less & last)
    more, less = more << 1 | 1, less << 1  # the row above the first counts the columns
    up, down = (less | ~(diagonal | more)) & every, more & diagonal & every
  return distance


def node_types(program: str) -> Counter | None:
  """How often each type of syntax node occurs in a Python program; None if it does not parse."""
  try:
    with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
      tree = ast.parse(program)
    return Counter(type(node).__name__ for node in ast.walk(tree))
  except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deep
    return None


def _of_texts(texts: Sequence[str], program: Program | None) -> dict[str, float]:
  enough = len(texts) > 1
  found = {name: metric(texts) if enough else np.nan for name, metric in METRICS.items()}
  if program:
    programs = [program(text) for text in texts]
    found["tree_distance"] = tree_distance(programs)
    found["unparsed"] = np.mean([node_types(one) is None for one in programs]) if enough else np.nan
  return found


def _ngrams(row: Sequence[str], n: int) -> list[tuple[str, ...]]:
  return list(zip(*(row[i:] for i in range(n))))


def _bleu(precisions: Sequence[float], length: int, references: Sequence[int]) -> float:
  if not length:
    return float(0 in references)  # an empty text is a copy of another, or nothing like them
  if not all(precisions):
    return 0.0
  nearest = min(references, key=lambda other: (abs(other - length), other))
  brevity = min(0.0, 1.0 - nearest / length)
  return float(np.exp(brevity + np.mean(np.log(precisions))))
