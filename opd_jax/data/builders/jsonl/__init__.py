"""Any data set in JSON Lines: one object a line, fields named in the config."""

from collections.abc import Callable, Iterator
import gzip
import hashlib
import inspect
import json
import pathlib
import re
import sys
import zlib
from typing import Any

from opd_jax.data import chat

Splits = dict[str, Callable[[], Iterator[dict[str, Any]]]]
# A record, its file and line -> its row; None to leave it out.
Row = Callable[[dict[str, Any], pathlib.Path, int], dict[str, Any] | None]

LETTERS = "ABCDEFGHIJ"  # as many as the multiple-choice verifier reads


def splits(*, question: str, answer: str, train: str = "", test: str = "", response: str = "",
           teacher: str = "", id: str = "id", task: str = "jsonl", system: str = "",
           template: str = "{question}", strip_marks: bool = False,
           choices: str = "", chosen: str = "", rejected: str = "", group: str = "") -> Splits:
  """Splits over .jsonl or .jsonl.gz files.

  Args:
    train, test: a file, or a folder of them; a split without one does not exist.
    question, answer, response, teacher, id: names of the rows' fields; response and teacher
      may be "" (none).
    task: the rows' task name.
    system: system turn before every question, if any.
    template: how the question becomes the user's turn; holds "{question}".
    strip_marks: removes GSM8K's calculator marks `<<48/2=24>>` from responses.
    choices: name of a field with a list of options, if any; they follow the question, one a line,
      as "A: ..." and so on, and the answer must be the letter of one.
    chosen, rejected: names of the fields with the better and the worse response of a pair, if any.
    group: name of a field with a list of responses to be learned together, if any: objects with
      `response`, a text, and numbers that are known of it.
  Raises: ValueError naming file, line and field when a row lacks one, or holds there what is
    no text; and for a file that is not whole, an id used twice, or no rows at all.
  """
  if bool(chosen) != bool(rejected) or chosen and group:
    raise ValueError(f"data.builder_kw has chosen={chosen!r}, rejected={rejected!r} and "
                     f"group={group!r}; name both of a pair, or a group, or none")
  if "{question}" not in template:
    raise ValueError(f"data.builder_kw.template is {template!r}; it must hold '{{question}}'")

  def row(record: dict[str, Any], file: pathlib.Path, number: int) -> dict[str, Any]:
    def field(name: str) -> str:
      if name not in record:
        raise ValueError(f"{file}, line {number}: no field {name!r}; the row has "
                         f"{sorted(record)}")
      value = record[name]
      if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{file}, line {number}: field {name!r} is {json.dumps(value)[:60]}; "
                         "wanted text or a number")
      text = str(value)
      if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{file}, line {number}: field {name!r} holds half a character (a lone "
                         "UTF-16 surrogate), which no tokenizer takes")
      return text
    text = field(response) if response else ""
    if strip_marks:
      text = re.sub(r"<<[^>]*>>", "", text)
    together = ""
    if chosen:
      together = json.dumps([{"response": field(name)} for name in (chosen, rejected)])
    elif group:
      together = responses(record.get(group), group, file, number)
    asked = field(question)
    if choices:
      asked += "\n\n" + lettered(record.get(choices), field(answer), choices, file, number)
    content = template.replace("{question}", asked)
    return dict(id=field(id) if id else f"{file.name}-{number}", task=task, level=0,
                messages=json.dumps(chat.question(content, system)), answer=field(answer),
                response=text, teacher=field(teacher) if teacher else "", group=together)

  return by_path(row, train, test, id)


def by_path(row: Row, train: str, test: str, id: str) -> Splits:
  """Splits whose rows are made of the files' records, one by one.

  Raises: ValueError if neither split has a path; when read, for an id used twice or no rows.
  """
  def read(where: str) -> Iterator[dict[str, Any]]:
    seen = set()
    for file in files(where):
      for number, line in lines(file):
        if not line.strip():
          continue
        made = row(parse(file, number, line), file, number)
        if made is None:
          continue
        if made["id"] in seen:
          raise ValueError(f"{file}, line {number}: field {id!r} is {made['id']!r}, as in an "
                           "earlier row; ids must differ. With data.builder_kw.id='' rows are "
                           "named by file and line")
        seen.add(made["id"])
        yield made
    if not seen:
      raise ValueError(f"no rows in {where!r}; wanted one JSON object a line")

  found = {"train": train, "test": test}
  if not any(found.values()):
    raise ValueError("data.builder_kw names no data; set train or test to a .jsonl or .jsonl.gz "
                     "file, or a folder with some")
  return {name: (lambda where=where: read(where)) for name, where in found.items() if where}


def lettered(options: Any, answer: str, name: str, file: pathlib.Path, number: int) -> str:
  """Options as lines "A: ...". Raises: ValueError if they are none, or the answer is not one."""
  if (not isinstance(options, list) or not 1 < len(options) <= len(LETTERS)
      or not all(isinstance(x, str) for x in options)):
    raise ValueError(f"{file}, line {number}: field {name!r} is {json.dumps(options)[:60]}; wanted "
                     f"a list of 2 to {len(LETTERS)} texts")
  if answer not in list(LETTERS[:len(options)]):
    raise ValueError(f"{file}, line {number}: the answer is {answer!r}; wanted the letter of one "
                     f"of {len(options)} options")
  return "\n".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options))


def responses(found: Any, name: str, file: pathlib.Path, number: int) -> str:
  """A field's responses as JSON. Raises: ValueError if it does not hold a list of them."""
  if (not isinstance(found, list) or not found
      or not all(isinstance(x, dict) and isinstance(x.get("response"), str) for x in found)):
    raise ValueError(f"{file}, line {number}: field {name!r} is {json.dumps(found)[:60]}; wanted a "
                     "list of objects, each with a text in `response`")
  return json.dumps(found)


def lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Numbered lines, from 1. Raises: ValueError naming a compressed file that is not whole."""
  opener = gzip.open if file.suffix == ".gz" else open
  try:
    with opener(file, "rb") as stream:
      yield from enumerate(stream, 1)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{file} is not a whole gzip file ({error}); copy it again") from error


def parse(file: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  """One line as an object. Raises: ValueError naming file and line."""
  try:
    record = json.loads(line.decode("utf-8-sig"))  # some editors put a mark first
  except ValueError as error:
    raise ValueError(f"{file}, line {number}: not JSON in UTF-8 ({error})") from error
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
  """The files and the code that makes the rows: when either changes, they are made again."""
  code = "".join(map(inspect.getsource, (chat, sys.modules[__name__])))
  digest = hashlib.sha256(code.encode())
  for where in (arguments.get("train", ""), arguments.get("test", "")):
    for file in files(where) if where else ():
      digest.update(f"{file.name}/{file.stat().st_size}/".encode())  # names may become ids
      digest.update(file.read_bytes())
  return digest.hexdigest()
