"""Any data set in JSON Lines: one object a line, fields named in the config."""

from collections.abc import Callable, Iterator
import gzip
import hashlib
import inspect
import json
import pathlib
import re
import sys
from typing import Any

from opd_jax.data import chat


def splits(*, question: str, answer: str, train: str = "", test: str = "", response: str = "",
           id: str = "id", task: str = "jsonl", system: str = "", template: str = "{question}",
           strip_marks: bool = False) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
  """Splits over .jsonl or .jsonl.gz files.

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    question, answer, response, id: names of the rows' fields; response may be "" (none).
    task: the rows' task name.
    system: system turn before every question, if any.
    template: how the question becomes the user's turn; holds "{question}".
    strip_marks: removes GSM8K's calculator marks `<<48/2=24>>` from responses.
  Raises: ValueError naming file, line and field when a row lacks one.
  """
  if "{question}" not in template:
    raise ValueError(f"data.builder_kw.template is {template!r}; it must hold '{{question}}'")

  def read(where: str) -> Iterator[dict[str, Any]]:
    for file in files(where):
      opener = gzip.open if file.suffix == ".gz" else open
      with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
          if line.strip():
            yield row(parse(file, number, line), file, number)

  def row(record: dict[str, Any], file: pathlib.Path, number: int) -> dict[str, Any]:
    def field(name: str) -> str:
      if name not in record:
        raise ValueError(f"{file}, line {number}: no field {name!r}; the row has "
                         f"{sorted(record)}")
      return str(record[name])
    text = field(response) if response else ""
    if strip_marks:
      text = re.sub(r"<<[^>]*>>", "", text)
    content = template.replace("{question}", field(question))
    return dict(id=field(id) if id else f"{file.name}-{number}", task=task, level=0,
                messages=json.dumps(chat.question(content, system)), answer=field(answer),
                response=text)

  found = {"train": train, "test": test}
  return {name: (lambda where=where: read(where)) for name, where in found.items() if where}


def parse(file: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  """One line as an object. Raises: ValueError naming file and line."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
  if not isinstance(record, dict):
    raise ValueError(f"{file}, line {number}: a {type(record).__name__}, wanted a JSON object")
  return record


def files(where: str) -> list[pathlib.Path]:
  """The files behind a path. Raises: ValueError if there are none."""
  path = pathlib.Path(where).expanduser()
  if path.is_file():
    return [path]
  found = sorted(p for p in path.glob("*") if p.name.endswith((".jsonl", ".jsonl.gz")))
  if not found:
    raise ValueError(f"no data at {where!r}: wanted a .jsonl or .jsonl.gz file, or a folder with "
                     "some. Set it with --config.data.builder_kw.train=... (or .test=...)")
  return found


def fingerprint(**arguments: Any) -> str:
  """The files' contents and this code: when either changes, the rows are made again."""
  digest = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode())
  for where in (arguments.get("train", ""), arguments.get("test", "")):
    for file in files(where) if where else ():
      digest.update(file.read_bytes())
  return digest.hexdigest()
