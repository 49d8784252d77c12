"""Tool calls in the form of ReAct, "Action: name" and "Action Input: {...}", compared exactly.

An answer is JSON: a list of {Action, Action_Input}, the input being the JSON text of an object.
The calls may come in any order, each as often as it is listed; {"ordered": true, "calls": [...]}
wants them in this order. An action that begins with "[Optional]" may be missing (ToolAlpaca).
Arguments are compared as values: 1 is 1.0 and no True, the order of keys does not matter.
"""

import dataclasses
import json
import re
from typing import Any

from opd_jax.verifiers.verdict import Verdict

OPTIONAL = "[Optional]"
# Headers at the beginning of a line, in Markdown's bold or not.
ACTION = re.compile(r"^[ \t]*[*_]*Action[*_]*[ \t]*:[*_ \t]*([^\n]*)$", re.MULTILINE)
INPUT = re.compile(r"^[ \t]*[*_]*Action[ _]Input[*_]*[ \t]*:[*_]*\s*(?:```(?:json)?\s*)?",
                   re.MULTILINE)
# What may follow an input on its line.
REST = re.compile(r"[ \t`*_]*(?:\n|\Z)")


@dataclasses.dataclass(frozen=True)
class Call:
  name: str
  arguments: dict[str, Any]
  optional: bool = False


class Unreadable(Exception):
  """What is wrong with the form of a call."""


def verify(text: str, answer: str) -> Verdict:
  """Compares the response's calls with the answer's; 1 if all agree."""
  try:
    wanted, ordered = read_answer(answer)
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    return Verdict(0.0, "The calls that this question wants cannot be read.")
  try:
    found = read_response(text)
  except Unreadable as problem:
    return Verdict(0.0, str(problem))
  failure = compare(found, wanted, ordered)
  return Verdict(0.0, failure) if failure else Verdict(1.0, "The calls are correct.")


def read_answer(answer: str) -> tuple[list[Call], bool]:
  given = json.loads(answer)
  ordered = isinstance(given, dict) and given["ordered"]
  calls = []
  for row in given["calls"] if isinstance(given, dict) else given:
    name = row["Action"].strip()
    arguments = json.loads(row["Action_Input"])
    calls.append(Call(name.removeprefix(OPTIONAL).strip(), dict(arguments.items()),
                      name.startswith(OPTIONAL)))
  return calls, ordered


def read_response(text: str) -> list[Call]:
  """Raises: Unreadable naming the call."""
  text = text.rpartition("</think>")[2]
  heads = list(ACTION.finditer(text))
  if not heads:
    raise Unreadable("The response has no line \"Action: ...\".")
  calls = []
  for i, head in enumerate(heads):
    name = head[1].strip().strip("`*_\"'").strip()
    which = f"call {i + 1} ({clip(name)})"
    end = heads[i + 1].start() if i + 1 < len(heads) else len(text)
    opening = INPUT.search(text, head.end(), end)
    if not opening:
      raise Unreadable(f"The {which} has no line \"Action Input: ...\".")
    try:
      arguments, stop = DECODER.raw_decode(text[opening.end():end])
    except (ValueError, RecursionError) as error:
      reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
      raise Unreadable(f"The input of {which} is not JSON: {clip(reason)}.") from error
    if not isinstance(arguments, dict):
      raise Unreadable(f"The input of {which} is not a JSON object.")
    if not REST.match(text, opening.end() + stop, end):
      raise Unreadable(f"The input of {which} is followed by something else on its line.")
    calls.append(Call(name, arguments))
  return calls


def compare(found: list[Call], wanted: list[Call], ordered: bool) -> str:
  """What is wrong, in a sentence that does not tell what would be right; "" if nothing."""
  left = list(wanted)
  for i, call in enumerate(found):
    # In order, only optional calls may be passed over.
    reach = next((k for k, x in enumerate(left) if not x.optional), len(left) - 1)
    candidates = left[:reach + 1] if ordered else left
    match = next((k for k, x in enumerate(candidates) if is_same_call(call, x)), None)
    if match is None:
      return explain(i, call, candidates)
    left = left[match + 1:] if ordered else left[:match] + left[match + 1:]
  return "" if all(call.optional for call in left) else "There are too few calls."


def explain(i: int, call: Call, candidates: list[Call]) -> str:
  which = f"Call {i + 1} ({clip(call.name)})"
  same_name = [x for x in candidates if x.name == call.name]
  if not same_name:
    return f"{which} is not wanted" + (" at this place." if candidates else ": too many calls.")
  differences = lambda x: [k for k, v in call.arguments.items()
                           if k not in x.arguments or not is_same(v, x.arguments[k])]
  wrong = min(map(differences, same_name), key=len)
  if not wrong:
    return f"{which} lacks an argument."
  return f"{which} has wrong arguments: {', '.join(map(clip, wrong[:5]))}."


def is_same_call(a: Call, b: Call) -> bool:
  return a.name == b.name and is_same(a.arguments, b.arguments)


def is_same(a: Any, b: Any) -> bool:
  """Equality of JSON values."""
  if isinstance(a, bool) or isinstance(b, bool):
    return a is b
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(is_same, a, b))
  return a == b


def clip(text: str) -> str:
  """At most 60 characters on one line."""
  return " ".join(text.split())[:60]


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) < len(pairs):
    raise ValueError("a key is given twice")
  return dict(pairs)


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_no_constant)
