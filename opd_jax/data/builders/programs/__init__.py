"""Programming exercises with tests: HumanEval+, MBPP+, and LiveCodeBench's form.

Answers are what `verifiers/unit_tests.py` reads. The first two data sets bring inputs and a right
solution, which is run later, in the sandbox: nothing is run here.
"""

import ast
import base64
import hashlib
import inspect
import io
import json
import pathlib
import pickle
import sys
from typing import Any
import zlib

from opd_jax.data import chat
from opd_jax.data.builders import jsonl

TEMPLATE = "{question}\n\nAnswer with the whole program in one ```python block."


def splits(*, train: str = "", test: str = "", template: str = TEMPLATE,
           system: str = "") -> jsonl.Splits:
  """Splits over .jsonl or .jsonl.gz files; each record tells by its fields which form it has.

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    template: how the question becomes the user's turn; holds "{question}".
    system: system turn before every question, if any.
  Raises: ValueError naming file and line of a record of no known form.
  """
  if "{question}" not in template:
    raise ValueError(f"data.builder_kw.template is {template!r}; it must hold '{{question}}'")

  def row(record: dict[str, Any], file: pathlib.Path, number: int) -> dict[str, Any]:
    for mark, form in FORMS.items():
      if mark in record:
        try:
          made = form(record)
        except (KeyError, ValueError, TypeError, AttributeError, SyntaxError,
                StopIteration) as error:
          raise ValueError(f"{file}, line {number}: not the exercise that its field {mark!r} "
                           f"promises ({type(error).__name__}: {error})") from error
        content = template.replace("{question}", made.pop("question"))
        return dict(made, level=0, messages=json.dumps(chat.question(content, system)))
    raise ValueError(f"{file}, line {number}: no exercise; the row has {sorted(record)}, wanted "
                     f"one of {sorted(FORMS)}")

  return jsonl.by_path(row, train, test, "task_id")


def humaneval(record: dict[str, Any]) -> dict[str, Any]:
  """A function's head to be completed; what precedes it in the prompt may be relied on."""
  prompt, name = record["prompt"], record["entry_point"]
  head = next(node for node in ast.parse(prompt).body if getattr(node, "name", "") == name)
  before = "\n".join(prompt.split("\n")[:head.lineno - 1])
  question = f"Complete this function.\n\n```python\n{prompt.strip()}\n```"
  compare = "zero" if name == "find_zero" else "equal"
  inputs = [*record["base_input"], *record["plus_input"]]
  return exercise(record, "humaneval", question, before, prompt + record["canonical_solution"],
                  inputs, compare)


def mbpp(record: dict[str, Any]) -> dict[str, Any]:
  """A task in words, with one assertion that shows how the function is called."""
  nodes = list(ast.walk(ast.parse(record["assertion"])))
  calls = [node for node in nodes if isinstance(node, ast.Call)
           and getattr(node.func, "id", "") == record["entry_point"]]
  example = next(x for x in map(_literal, calls) if x is not None)
  inputs = [list(map(argument, arguments, example)) if len(arguments) == len(example) else arguments
            for arguments in (*record["base_input"], *record["plus_input"])]
  test = next(node.test for node in nodes if isinstance(node, ast.Assert))
  compare = "equal"
  if ast.unparse(test).startswith("set("):
    compare = "set"
  elif test in calls or isinstance(test, ast.UnaryOp):  # assert f(...), assert not f(...)
    compare = "truth"
  return exercise(record, "mbpp", ast.literal_eval(record["prompt"].strip()).strip(), "",
                  record["canonical_solution"], inputs, compare)


def exercise(record: dict[str, Any], task: str, question: str, before: str, solution: str,
             inputs: list[list[Any]], compare: str) -> dict[str, Any]:
  answer = dict(entry_point=record["entry_point"], before=before, inputs=list(map(repr, inputs)),
                solution=solution, atol=record["atol"], compare=compare)
  return dict(id=record["task_id"], task=task, question=question, answer=json.dumps(answer),
              response=f"```python\n{solution.strip()}\n```")


def livecodebench(record: dict[str, Any]) -> dict[str, Any]:
  """A program between standard input and output, or a method of class Solution.

  Hidden tests are JSON, or JSON as it is published: pickled, compressed, in base64.
  """
  tests = json.loads(record["public_test_cases"]) + hidden(record.get("private_test_cases") or "[]")
  question = record["question_content"].strip()
  if tests[0]["testtype"] == "stdin":
    answer = dict(stdins=[t["input"] for t in tests], stdouts=[t["output"] for t in tests])
  else:
    question += f"\n\n```python\n{record['starter_code'].strip()}\n```"
    values = lambda text: [json.loads(line) for line in text.strip().split("\n")]
    answer = dict(entry_point=json.loads(record["metadata"])["func_name"], before="", atol=0,
                  compare="equal", inputs=[repr(values(t["input"])) for t in tests],
                  outputs=[repr(json.loads(t["output"])) for t in tests])
  return dict(id=record["question_id"], task="livecodebench", question=question,
              answer=json.dumps(answer), response="")


def hidden(text: str) -> list[dict[str, Any]]:
  """LiveCodeBench's hidden tests. Raises: ValueError for what is neither JSON nor as published."""
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    try:
      packed = zlib.decompress(base64.b64decode(text, validate=True))
      return json.loads(Plain(io.BytesIO(packed)).load())
    except (ValueError, TypeError, EOFError, zlib.error, pickle.UnpicklingError) as error:
      raise ValueError(f"hidden tests are no JSON, and not packed as published: {error}") from error


class Plain(pickle.Unpickler):
  """A pickle of text and numbers: one that names a function, which it could call, is refused."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"a pickle of tests names {module}.{name}; it is not opened")


# By the field that only records of this form have.
FORMS = {"public_test_cases": livecodebench, "assertion": mbpp, "test": humaneval}


def argument(value: Any, example: Any) -> Any:
  """As `like`; where complex numbers are meant, all numbers are texts (Mbpp/124, Mbpp/252)."""
  if isinstance(value, str) and isinstance(example, (int, float, complex)):
    number = complex(value)
    return number if number.imag or isinstance(example, complex) else number.real
  return like(value, example)


def like(value: Any, example: Any) -> Any:
  """A value that JSON made poorer, with the types of an example: tuples and sets."""
  if isinstance(value, dict) and isinstance(example, dict) and example:
    inner = next(iter(example.values()))
    return {key: like(x, inner) for key, x in value.items()}
  if not isinstance(value, list) or not isinstance(example, (list, tuple, set)):
    return value
  # What is nested deeper than in the example is like what it stands in (Mbpp/580).
  inner = next((x for x in example if isinstance(x, CONTAINERS)), example)
  return type(example)(like(x, inner) for x in value)


CONTAINERS = (list, tuple, set, dict)


def _literal(call: ast.Call) -> list[Any] | None:
  try:
    return [ast.literal_eval(argument) for argument in call.args]
  except ValueError:
    return None


def fingerprint(**arguments: Any) -> str:
  """The files and the code that makes the rows: when either changes, they are made again."""
  whole = jsonl.fingerprint(**arguments) + inspect.getsource(sys.modules[__name__])
  return hashlib.sha256(whole.encode()).hexdigest()
