"""Instructions that a program can check, of IFEval's and IFBench's kinds, through if-verifiable.

An answer is JSON, a list of {"id", "kwargs"} as the two benchmarks have them:
[{"id": "length_constraints:number_words", "kwargs": {"relation": "at least", "num_words": 300}}].

A response follows an instruction strictly as it is, its thinking left out, and loosely if it does
so without its first line, its last, both, or without asterisks. Four rewards come of this: whether
all instructions are followed (of the prompt level), and the share that is (from which
`evals/instructions.py` computes the instruction level), each strictly or loosely.

A verdict depends on text and answer alone. if-verifiable draws whatever an answer leaves open, and
NLTK downloads what is not there: the first makes the answer unreadable here, the second is refused
before a run begins. langdetect draws too, always the same here.

Some checks are easy on a response: one in which no language can be told is in the right one, as in
the benchmarks. Some take quadratic time or worse: run this in a `pool.Pool`.

Source: IFEval (2311.07911), IFBench (2507.02833).
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import importlib.util
import json
import logging
import pathlib
from typing import Any, NoReturn

from opd_jax.verifiers.verdict import Verdict

# Which NLTK data the checks read; llama-index-core is a package that brings it.
NLTK_DATA = ("tokenizers/punkt_tab", "corpora/stopwords")
# Needs NLTK's part-of-speech tagger, which no package brings.
UNCHECKED = ("words:start_verb",)
SHOWN = 200  # characters of an instruction in a feedback


class Unreadable(Exception):
  """Why an answer cannot be checked."""


def verify(text: str, answer: str) -> Verdict:
  """1 if all instructions are followed, strictly."""
  return grade(text, answer, loose=False, share=False)


def verify_loose(text: str, answer: str) -> Verdict:
  """1 if all instructions are followed, loosely."""
  return grade(text, answer, loose=True, share=False)


def verify_share(text: str, answer: str) -> Verdict:
  """The share of the instructions that are followed, strictly."""
  return grade(text, answer, loose=False, share=True)


def verify_share_loose(text: str, answer: str) -> Verdict:
  """The share of the instructions that are followed, loosely."""
  return grade(text, answer, loose=True, share=True)


def grade(text: str, answer: str, loose: bool, share: bool) -> Verdict:
  """Checks a response; its feedback names the instructions that are not followed.

  Raises: ValueError if a package is missing.
  """
  library()  # first: a worker of the pool imports it at its first text, which has no answer
  try:
    checkers = read_answer(answer)
  except Unreadable as problem:
    return Verdict(0.0, f"The instructions of this question cannot be checked: {problem}.")
  failed = [wish for wish, done in followed(text, checkers, loose) if not done]
  if not failed:
    return Verdict(1.0, "The response follows all instructions.")
  reward = 1.0 - len(failed) / len(checkers) if share else 0.0
  return Verdict(reward, f"The response does not follow: {'; '.join(map(clip, failed))}")


def read_answer(answer: str) -> list[tuple[str, Any]]:
  """What each instruction says, and if-verifiable's checker of it. Raises: Unreadable."""
  try:
    rows = [(row["id"], {name: x for name, x in row["kwargs"].items() if x is not None})
            for row in json.loads(answer)]
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise Unreadable("they are no list of id and kwargs") from error
  if not rows:
    raise Unreadable("there are none")
  kinds, checkers = library()[0], []
  for kind, kwargs in rows:
    if kind not in kinds or kind in UNCHECKED:
      raise Unreadable(f"there is no check of {clip(str(kind))}")
    checker = kinds[kind](kind)
    try:
      checkers.append((checker.build_description(**kwargs), checker))
    except Exception as error:  # whatever it makes of wrong arguments
      raise Unreadable(f"{kind} cannot have these arguments: {clip(str(error))}") from error
  return checkers


def followed(text: str, checkers: list[tuple[str, Any]], loose: bool) -> list[tuple[str, bool]]:
  """What each instruction says, and whether the response follows it."""
  common = library()[1]
  text = common.strip_thinking(text)
  forms = common.get_loose_transformations(text) if loose else [text]
  forms = [form for form in forms if form.strip()]
  with _unlogged():
    return [(wish, any(_passes(checker, form) for form in forms)) for wish, checker in checkers]


def _passes(checker: Any, text: str) -> bool:
  try:
    return bool(checker.check_following(text))
  except Exception:  # some expect a sentence, or more than punctuation
    return False


def clip(text: str) -> str:
  """At most `SHOWN` characters on one line."""
  text = " ".join(text.split())
  return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ---------------------------------------------------------------------------- the library


def check_installed() -> None:
  """Finds the packages and NLTK's data. Raises: ValueError saying what brings them."""
  missing = [name for name in ("if_verifiable", "nltk") if not importlib.util.find_spec(name)]
  if not missing:
    import nltk  # an extra: not everybody installs it
    package = importlib.util.find_spec("llama_index")
    for folder in package.submodule_search_locations if package else ():
      where = str(pathlib.Path(folder, "core/_static/nltk_cache"))
      if where not in nltk.data.path:
        nltk.data.path.append(where)  # behind the user's own
    missing = [name for name in NLTK_DATA if not _is_there(nltk, name)]
  if missing:
    raise ValueError(f"the verifier of instructions needs {', '.join(missing)}: EXTRAS=ifeval bash "
                     "launch/env.sh")


def _is_there(nltk: Any, name: str) -> bool:
  try:
    return bool(nltk.data.find(name))
  except LookupError:
    return False


@functools.cache
def library() -> tuple[Mapping[str, Any], Any]:
  """if-verifiable's checkers by kind, and its functions that prepare a response."""
  check_installed()
  import langdetect
  with _no_downloads():
    from if_verifiable import common, ifbench, ifeval
    from if_verifiable.ifbench import instructions as bench, instructions_util as bench_util
    from if_verifiable.ifeval import instructions as plain, instructions_util as plain_util
  for module in (bench, bench_util, plain, plain_util):
    module.random = _NoChance()
  langdetect.DetectorFactory.seed = 0
  langdetect.detector_factory.init_factory()  # a second, which the first text should not wait for
  return {**ifeval.INSTRUCTION_DICT, **ifbench.INSTRUCTION_DICT}, common


class _NoChance:
  """Stands for the module `random`, which if-verifiable uses for what it is not given."""

  def __getattr__(self, name: str) -> NoReturn:
    raise ValueError("something is left to chance")


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
  """if-verifiable downloads when it is imported, also what it does not need."""
  import nltk
  download, nltk.download = nltk.download, lambda *args, **kwargs: False
  try:
    yield
  finally:
    nltk.download = download


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
  """if-verifiable logs whole responses."""
  before = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    yield
  finally:
    logging.disable(before)
