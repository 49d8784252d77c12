"""Questions to be answered by calling tools: SDPO's tooluse and ToolAlpaca's real APIs.

Answers are what `verifiers/tool_calls.py` reads.
"""

import hashlib
import inspect
import json
import logging
import pathlib
import re
import sys
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders import jsonl

# The form that tooluse's prompts ask for, for data that has no prompts of its own.
TEMPLATE = """Answer the user's question with the tools below.

Name: {api}
Description: {description}
Documentation:
{functions}

Use this format, once for each call:
Thought: what to do, and why
Action: the name of one tool
Action Input: its arguments, a JSON object

Question: {question}"""


def splits(*, train: str = "", test: str = "", ordered: bool = False) -> jsonl.Splits:
  """Splits over .jsonl or .jsonl.gz files.

  Rows in which the input of a call is no JSON are left out, with a warning: no response could be
  right (four of ToolAlpaca's).

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    ordered: whether the calls must come in the order of the data's.
  Raises: ValueError naming file and line of a row that has no calls or makes no prompt.
  """
  def row(record: dict[str, Any], file: pathlib.Path, number: int) -> dict[str, Any] | None:
    try:
      inputs = [json.loads(call["Action_Input"]) for call in record["answer"]]
    except json.JSONDecodeError as error:
      logging.warning("%s, line %d is left out: the input of a call is no JSON (%s)", file, number,
                      error)
      return None
    except (KeyError, TypeError) as error:
      raise ValueError(f"{file}, line {number}: no calls ({type(error).__name__}: {error})"
                       ) from error
    try:
      calls = [{"Action": call["Action"], "Action_Input": json.dumps(dict(found.items()))}
               for call, found in zip(record["answer"], inputs)]
      content = record["prompt"] if "prompt" in record else prompt(record)
      identity = record["id"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ValueError(f"{file}, line {number}: no question with tools and calls "
                       f"({type(error).__name__}: {error})") from error
    answer = {"ordered": True, "calls": calls} if ordered else calls
    return dict(id=identity, task="tool_use", level=0, messages=json.dumps(chat.question(content)),
                answer=json.dumps(answer), response=response(calls))

  return jsonl.by_path(row, train, test, "id")


def prompt(record: dict[str, Any]) -> str:
  functions = dict(record["functions"])
  notes = functions.pop("components", "")
  parts = [f"{name}: {text}" for name, text in functions.items()] + ([notes] if notes else [])
  fields = dict(record, functions="\n".join(parts))
  return re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], TEMPLATE)


def response(calls: list[dict[str, str]]) -> str:
  """The calls in the form that the prompt asks for, without thoughts."""
  return "\n".join(f"Action: {call['Action'].removeprefix('[Optional]')}\n"
                   f"Action Input: {call['Action_Input']}" for call in calls)


def fingerprint(**arguments: Any) -> str:
  """The files and the code that makes the rows: when either changes, they are made again."""
  whole = jsonl.fingerprint(**arguments) + inspect.getsource(sys.modules[__name__])
  return hashlib.sha256(whole.encode()).hexdigest()
