"""The program inside the sandbox that calls a solution's function; and values as text.

It knows the inputs and no expected output: whoever wants to be right must compute. Its own text
is sent into the sandbox as the main module, so it imports the standard library alone.
"""

import json
import math
import os
import sys
import types
from typing import Any

# What exercises in the form of LeetCode take for granted.
PREAMBLE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""
RECURSION = 50_000  # the limit that LiveCodeBench sets


def main() -> None:
  """Reads {before, code, entry_point, inputs}; writes a line for each input.

  An input is the text of a Python list, the arguments of a call. A line is {"value": encoded} or
  {"error": words}, and after an error no more follow.
  """
  out = os.fdopen(os.dup(1), "w")
  silence = os.open("/dev/null", os.O_WRONLY)
  os.dup2(silence, 1)  # what the solution prints is no result
  job = json.load(sys.stdin)
  sys.setrecursionlimit(RECURSION)
  module = types.ModuleType("solution")  # not "__main__": no demonstration is to be run
  sys.modules["solution"] = module

  def write(**fields: Any) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()

  try:
    exec(PREAMBLE, module.__dict__)
    exec(compile(job["before"], "before.py", "exec"), module.__dict__)
    exec(compile(job["code"], "solution.py", "exec"), module.__dict__)
    function = find(module, job["entry_point"])
    if function is None:
      write(error=f"the code does not define {job['entry_point']}")
      return
    for arguments in job["inputs"]:
      write(value=encode(function(*eval(arguments, {"inf": math.inf, "nan": math.nan}))))
  except BaseException as error:
    write(error=f"{type(error).__name__}: {error}"[:300])


def find(module: types.ModuleType, name: str) -> Any:
  """The function, or the method of LeetCode's class Solution; None if there is neither."""
  if "Solution" in vars(module) and hasattr(module.Solution, name):
    return getattr(module.Solution(), name)
  return vars(module).get(name)


def encode(value: Any) -> Any:
  """A value as JSON that keeps apart what Python does; what is no plain value is its repr."""
  if value is None or isinstance(value, (bool, str)):
    return value if value is None or isinstance(value, bool) else str(value)
  if isinstance(value, int):
    return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else {"float": repr(float(value))}
  if isinstance(value, list):
    return [encode(x) for x in value]
  for kind in (tuple, set, frozenset):
    if isinstance(value, kind):
      return {kind.__name__: [encode(x) for x in value]}
  if isinstance(value, dict):
    return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
  if isinstance(value, complex):
    return {"complex": [encode(value.real), encode(value.imag)]}
  if isinstance(value, (bytes, bytearray)):
    return {"bytes": bytes(value).hex()}
  return {"other": repr(value)[:200]}


class Other(str):
  """The repr of a value of another type: equal to no value that was asked for."""

  __hash__ = str.__hash__

  def __eq__(self, other: Any) -> bool:
    return False

  def __repr__(self) -> str:
    return str(self)


def decode(value: Any) -> Any:
  """The value of its encoding. Raises: ValueError or TypeError if it is none."""
  if isinstance(value, list):
    return [decode(x) for x in value]
  if not isinstance(value, dict):
    return value
  [(kind, content)] = value.items()
  if kind == "int":
    return int(content, 16)
  if kind == "float":
    return float(content)
  if kind == "dict":
    return {decode(k): decode(v) for k, v in content}
  if kind == "complex":
    return complex(*map(decode, content))
  if kind == "bytes":
    return bytes.fromhex(content)
  if kind == "other":
    return Other(content)
  return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, content))


if __name__ == "__main__":
  main()
