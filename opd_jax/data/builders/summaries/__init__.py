"""Posts and their summaries, in the form of Reddit TL;DR: EVE's controlled summarization.

A record has `prompt`, a post that ends in "TL;DR:", and `reference`, its summary by who wrote it.
The summary is `answer` too; there is no verifier of summaries: a reward model judges them
(pipelines/reward_model.py), first one that is fitted to "preferences".
"""

from collections.abc import Iterator
import hashlib
import inspect
import json
import pathlib
import random
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders import jsonl

KINDS = ("sft", "preferences", "prompts")
END = "\n\nTL;DR:"


def splits(*, kind: str, file: str, test: int, characters: int = 0, seed: int = 0) -> jsonl.Splits:
  """Splits `train` and `test`, the last rows of a file.

  Args:
    kind: "sft", posts with their summaries; "preferences", a group of two summaries, of which the
      better is the post's own and the other one another post's of the same split; "prompts", posts
      alone.
    file: a .jsonl or .jsonl.gz file with the fields id, prompt, reference, or a folder of them.
    test: how many rows are held out.
    characters: posts that are longer are cut there, between two words; 0: none is.
    seed: of whose summary is the other one.
  Raises: ValueError for a kind that does not exist, a row without a post or a summary, and a file
    of no more than `test` rows, or of one row in a split of pairs.
  """
  if kind not in KINDS:
    raise ValueError(f"data.builder_kw.kind is {kind!r}; it must be one of {', '.join(KINDS)}")

  def row(record: dict[str, Any], path: pathlib.Path, number: int) -> dict[str, Any]:
    texts = [record.get(name) for name in ("id", "prompt", "reference")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
      raise ValueError(f"{path}, line {number}: no text in id, prompt or reference; the row has "
                       f"{sorted(record)}")
    about = chat.question(cut(texts[1], characters))
    return dict(id=texts[0], task=f"summaries/{kind}", level=0, messages=json.dumps(about),
                answer=texts[2].strip(), response="", group="")

  def part(name: str) -> Iterator[dict[str, Any]]:
    rows = list(jsonl.by_path(row, file, "", "id")["train"]())
    if not 0 < test < len(rows):
      raise ValueError(f"data.builder_kw.test is {test}, and {file} has {len(rows)} rows; some "
                       "must be left in both splits")
    rows = rows[:-test] if name == "train" else rows[-test:]
    rng = random.Random(f"{seed}/{name}")
    for i, one in enumerate(rows):
      if kind == "preferences":
        others = [x["answer"] for x in rows if x["answer"] != one["answer"]]
        if not others:
          raise ValueError(f"the split {name!r} of {file} has no two summaries to make a pair of")
        one = one | dict(response=one["answer"], group=json.dumps(
            [{"response": text} for text in (one["answer"], rng.choice(others))]))
      yield one | dict(response=one["answer"]) if kind == "sft" else one

  return {name: (lambda name=name: part(name)) for name in ("train", "test")}


def cut(prompt: str, characters: int) -> str:
  """A post of at most so many characters, whole words, and what asks for its summary."""
  post = prompt.strip().removesuffix("TL;DR:").strip()
  if characters and len(post) > characters:
    post = post[:characters].rsplit(maxsplit=1)[0]
  return post + END


def fingerprint(*, file: str, **arguments: Any) -> str:
  """The files and the code that makes the rows: when either changes, they are made again."""
  whole = jsonl.fingerprint(train=file) + inspect.getsource(sys.modules[__name__])
  return hashlib.sha256(whole.encode()).hexdigest()
