"""Prompts with instructions that a program can check: IFEval, IFBench and data in their form.

Answers are what `verifiers/instructions.py` reads.
"""

import hashlib
import inspect
import json
import logging
import pathlib
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders import jsonl


def splits(*, train: str = "", test: str = "", task: str = "instructions",
           system: str = "") -> jsonl.Splits:
  """Splits over .jsonl or .jsonl.gz files with the fields key, prompt, instruction_id_list, kwargs.

  Rows with an instruction that cannot be checked are left out, with a warning: whatever a response
  does would count as wrong, or by chance as right.

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    task: the rows' task name.
    system: system turn before every prompt, if any.
  Raises: ValueError naming file and line of a row without a prompt or instructions.
  """
  def row(record: dict[str, Any], file: pathlib.Path, number: int) -> dict[str, Any] | None:
    try:
      identity, prompt = str(record["key"]), record["prompt"]
      answer = [{"id": kind, "kwargs": {name: x for name, x in kwargs.items() if x is not None}}
                for kind, kwargs in zip(record["instruction_id_list"], record["kwargs"],
                                        strict=True)]
      texts = (prompt, *record["instruction_id_list"])
      if not answer or not all(isinstance(x, str) for x in texts):
        raise ValueError("no text or no instruction")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ValueError(f"{file}, line {number}: no prompt with instructions "
                       f"({type(error).__name__}: {error})") from error
    if reasons := [reason for one in answer if (reason := unchecked(one["id"], one["kwargs"]))]:
      logging.warning("%s, line %d is left out: %s", file, number, reasons[0])
      return None
    return dict(id=identity, task=task, level=0, messages=json.dumps(chat.question(prompt, system)),
                answer=json.dumps(answer), response="")

  return jsonl.by_path(row, train, test, "key")


def unchecked(kind: str, kwargs: dict[str, Any]) -> str:
  """Why if-verifiable cannot check an instruction, "" if it can."""
  if kind == "words:start_verb":
    return f"{kind} needs NLTK's part-of-speech tagger, which no package brings"
  if kind == "keywords:letter_frequency":
    letter = str(kwargs.get("letter", ""))
    if not ("a" <= letter.lower() <= "z" and len(letter) == 1):
      return f"{kind} counts a letter at random in the place of {letter!r}"
  if kind == "repeat:repeat_span" and not (kwargs.get("n_start") and kwargs.get("n_end")):
    return f"{kind} takes a random place for one that is 0 or not given"
  return ""


def fingerprint(**arguments: Any) -> str:
  """The files and the code that makes the rows: when either changes, they are made again."""
  whole = jsonl.fingerprint(**arguments) + inspect.getsource(sys.modules[__name__])
  return hashlib.sha256(whole.encode()).hexdigest()
