"""Code against unit tests, run in the sandbox.

The sandbox is given inputs and sends back outputs; what they should be stays out here, and is
compared out here. So no response can print, return early or patch its way to a reward: the only
way to pass is to compute the right values. Not named code.py, which would hide Python's own.

An answer is the JSON of one of two forms. Tests of a function:

    entry_point  str        the function, or a method of LeetCode's class Solution
    before       str        code that the response may rely on, "" if none
    inputs       list[str]  each the text of a Python list: the arguments of a call
    outputs      list[str]  each the text of a Python value; or instead
    solution     str        a right program, whose outputs are the right ones
    atol         float      absolute tolerance of floats; at 0 it is 1e-6
    compare      str        "equal"; "set": neither order nor repetition matters; "truth": only
                            whether the output counts as true; "zero": the output is a zero of the
                            polynomial whose coefficients are the argument (HumanEval/32)

Tests of a program, in LiveCodeBench's form: stdins and stdouts, two lists of str.
"""

from collections.abc import Sequence
import ast
import dataclasses
import decimal
import functools
import inspect
import json
import logging
import math
import re
from typing import Any

from opd_jax.verifiers import calls, sandbox
from opd_jax.verifiers.verdict import Verdict

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)",
                   re.DOTALL | re.MULTILINE)
PYTHON = ("python", "python3", "py")
SHOWN = 200  # characters of an input or output in a feedback
RELATIVE = 1e-7  # tolerance of floats, numpy's default
# Of the clock, for a right solution. It does not wait, so that processor time is its limit: which
# tests a question has must not depend on what else the machine does.
PATIENCE_S = 600.0


def verify(text: str, answer: str, limits: sandbox.Limits = sandbox.Limits(),
           isolated: bool = True) -> Verdict:
  """Runs the response's code against the answer's tests; 1 if all pass.

  Raises: NoVerdict if the sandbox fails, which is no text's fault.
  """
  try:
    tests = json.loads(answer)
    by_function = "entry_point" in tests
    inputs = tests["inputs" if by_function else "stdins"]
    if not inputs or not all(isinstance(x, str) for x in inputs):
      raise ValueError("no inputs")
  except (ValueError, TypeError, KeyError):
    return Verdict(0.0, "The tests of this question cannot be read.")
  code = extract(text)
  if not code.strip():
    return Verdict(0.0, "The response holds no code.")
  try:
    compile(code, "solution.py", "exec")
  except SyntaxError as error:
    return Verdict(0.0, f"The code cannot be compiled: {clip(error.msg)} in line {error.lineno}.")
  except Exception as error:  # null bytes, nesting too deep, ...
    return Verdict(0.0, f"The code cannot be compiled ({type(error).__name__}).")
  grade = grade_function if by_function else grade_program
  failure = grade(code, tests, limits, isolated)
  if failure:
    return Verdict(0.0, failure)
  return Verdict(1.0, "The code passes all tests.")


def extract(text: str) -> str:
  """The code of a response: its last block of Python, or else its last block, or else all."""
  text = text.rpartition("</think>")[2]
  blocks = FENCE.findall(text)
  python = [code for language, code in blocks if language.lower() in PYTHON]
  return (python or [code for _, code in blocks] or [text])[-1]


# ----------------------------------------------------------------------------- a function


def grade_function(code: str, tests: dict[str, Any], limits: sandbox.Limits,
                   isolated: bool) -> str:
  """What is wrong, in a sentence; "" if nothing."""
  try:
    wanted = right_outputs(json.dumps(tests), limits, isolated)
  except ValueError as error:
    logging.warning("a question cannot be asked: %s", error)
    return f"The tests of this question cannot be run: {error}."
  name, inputs = tests["entry_point"], tests["inputs"][:len(wanted)]
  found, failure = call(code, dict(tests, inputs=inputs), limits, isolated)
  for i, (text, want) in enumerate(zip(inputs, wanted)):
    which = f"Test {i + 1} of {len(inputs)} failed: {name}({clip(text.strip()[1:-1])})"
    if i == len(found):
      if failure == f"the code does not define {name}":
        return f"The code does not define {clip(name)}."
      return f"{which} {failure}."
    if not is_right(text, found[i], want, tests):
      return f"{which} returned {shown(found[i])}, which is wrong."
  return ""


@functools.lru_cache(maxsize=512)
def right_outputs(tests: str, limits: sandbox.Limits, isolated: bool) -> tuple[Any, ...]:
  """What the function should return, up to the first input that is too much for the right solution.

  Raises: ValueError if already the first one is; NoVerdict if the sandbox fails.
  """
  tests = json.loads(tests)
  if "outputs" in tests:
    return tuple(map(ast.literal_eval, tests["outputs"]))
  patient = dataclasses.replace(limits, wall_s=PATIENCE_S)
  found, failure = call(tests["solution"], tests, patient, isolated)
  if not found:
    raise ValueError(f"the right solution of {tests['entry_point']} {failure}")
  if failure:
    logging.warning("the right solution of %s %s at test %d of %d, which ends the tests",
                    tests["entry_point"], failure, len(found) + 1, len(tests["inputs"]))
  return tuple(found)


def call(code: str, tests: dict[str, Any], limits: sandbox.Limits,
         isolated: bool) -> tuple[list[Any], str]:
  """The outputs of the calls that came to an end, and why the next one did not, if so."""
  job = dict(before=tests["before"], code=code, entry_point=tests["entry_point"],
             inputs=tests["inputs"])
  [ended] = sandbox.run(inspect.getsource(calls), [json.dumps(job)], limits, isolated)
  outputs, failure = [], ended.failure
  for line in ended.stdout.splitlines()[:len(tests["inputs"]) + 1]:
    try:
      fields = json.loads(line)
      if "error" in fields:
        error = str(fields["error"])
        missing = error.startswith("the code does not define ")
        return outputs, error if missing else f"stopped with {clip(error)}"
      outputs.append(calls.decode(fields["value"]))
    except Exception:  # half a line, or one that a solution wrote itself
      return outputs, failure or "ended without a result"
  return outputs, failure or ("" if len(outputs) >= len(tests["inputs"]) else
                              "ended the program before it returned")


def is_right(text: str, found: Any, want: Any, tests: dict[str, Any]) -> bool:
  """Whether the output for an input is right. Never raises, whatever the output is."""
  try:
    compare = tests["compare"]
    if compare == "set":
      return set(found) == set(want)
    if compare == "truth":
      return bool(found) == bool(want)
    if compare == "zero":
      [[*coefficients]] = ast.literal_eval(text)
      return abs(sum(c * math.pow(found, i) for i, c in enumerate(coefficients))) < 1e-4
    if "outputs" in tests and isinstance(found, tuple):
      found = list(found)  # outputs were JSON once, which has no tuples
    return is_close(found, want, tests["atol"] or 1e-6)
  except Exception:
    return False


def is_close(found: Any, want: Any, atol: float) -> bool:
  """Equality as Python has it, but for floats at any depth of lists and tuples."""
  if isinstance(want, (list, tuple)) and type(found) is type(want):
    return len(found) == len(want) and all(is_close(f, w, atol) for f, w in zip(found, want))
  if isinstance(want, float) and isinstance(found, (int, float)):
    both_nan = math.isnan(want) and math.isnan(found)
    return both_nan or math.isclose(found, want, rel_tol=RELATIVE, abs_tol=atol)
  return bool(found == want)


# ------------------------------------------------------------------------------ a program


def grade_program(code: str, tests: dict[str, Any], limits: sandbox.Limits,
                  isolated: bool) -> str:
  """What is wrong, in a sentence; "" if nothing."""
  stdins, stdouts = tests["stdins"], tests["stdouts"]
  results = sandbox.run(code, stdins, limits, isolated)
  for i, (stdin, stdout) in enumerate(zip(stdins, stdouts, strict=True)):
    which = f"Test {i + 1} of {len(stdins)} failed: for the input {clip(repr(stdin))} the program"
    if i == len(results):
      return f"{which} was not run."
    if results[i].failure:
      return f"{which} {clip(results[i].failure)}."
    if not prints_the_same(results[i].stdout, stdout):
      return f"{which} printed {clip(repr(results[i].stdout))}, which is wrong."
  return ""


def prints_the_same(found: str, want: str) -> bool:
  """Line by line, without white space at the ends; lines of numbers as numbers."""
  lines = lambda text: [line.strip() for line in text.strip().split("\n")]
  one, other = lines(found), lines(want)
  return len(one) == len(other) and all(a == b or _numbers(a) == _numbers(b) != None
                                        for a, b in zip(one, other))


def _numbers(line: str) -> Sequence[decimal.Decimal] | None:
  try:
    numbers = [decimal.Decimal(x) for x in line.split()]
  except decimal.InvalidOperation:
    return None
  return None if any(x.is_snan() for x in numbers) else numbers  # to compare one would raise


def shown(value: Any) -> str:
  """A value as Python writes it, clipped; of one that it does not write (10**5000), the type."""
  try:
    return clip(repr(value))
  except (ValueError, RecursionError):
    return f"a value of type {type(value).__name__} that is too long to write"


def clip(text: str) -> str:
  """At most `SHOWN` characters on one line."""
  text = " ".join(text.split())
  return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
