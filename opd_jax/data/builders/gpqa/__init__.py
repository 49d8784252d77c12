"""GPQA, out of its authors' encrypted archive, in memory.

Its authors ask that no question is shown in plain text where a crawler may find it. So none is in
this repository, the archive is decrypted in memory alone, and what reads these rows keeps ids (see
`builders.GUARDED`). Messages of errors name files, columns and ids, and no text.

Source: GPQA (2311.12022); which questions train, "On-Policy Critique Distillation" (2606.00424).
"""

from collections.abc import Iterator
import csv
import hashlib
import io
import json
import pathlib
import random
import zipfile
import zlib
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders import jsonl

TEMPLATE = ("{question}\n\nThink step by step. End with a line \"Answer: X\", where X is the "
            "letter of one option.")
PASSWORD = "deserted-untie-orchid"  # as the authors publish it, beside the archive
MAIN, DIAMOND = "dataset/gpqa_main.csv", "dataset/gpqa_diamond.csv"
ID, QUESTION, DOMAIN = "Record ID", "Question", "High-level domain"
OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def splits(*, archive: str, train_rows: int = 129, template: str = TEMPLATE, system: str = "",
           password: str = PASSWORD, plain_text: bool = False) -> jsonl.Splits:
  """Splits "train" and "test", of the main set without its diamond set, and "diamond".

  OPCD has 129 and 121 of the former 250, without saying which: here a hash of their ids orders
  them. Its inference-time results are of the 198 of "diamond".

  Args:
    archive: the authors' dataset.zip.
    train_rows: how many of the main set's others are "train".
    template: how question and options become the user's turn; holds "{question}".
    system: system turn before every question, if any.
    password: of the archive.
    plain_text: whether what a run leaves on disk may show questions and responses.
  Raises: ValueError if the file is missing, is not the archive or does not open, naming what was
    looked for; and for records without an id, or twice with the same.
  """
  if "{question}" not in template:
    raise ValueError(f"data.builder_kw.template is {template!r}; it must hold '{{question}}'")
  if not isinstance(plain_text, bool):
    raise ValueError(f"data.builder_kw.plain_text is {plain_text!r}; it must be True or False")

  def others() -> list[dict[str, str]]:
    diamond = {record[ID] for record in read(archive, DIAMOND, password)}
    records = [record for record in read(archive, MAIN, password) if record[ID] not in diamond]
    if not 0 < train_rows < len(records):
      raise ValueError(f"data.builder_kw.train_rows is {train_rows}; of {len(records)} records it "
                       f"must be at least 1 and leave one for the split 'test'")
    return sorted(records, key=lambda x: hashlib.sha256(x[ID].encode()).hexdigest())

  rows = lambda records: (row(record, template, system) for record in records)
  return {"train": lambda: rows(others()[:train_rows]), "test": lambda: rows(others()[train_rows:]),
          "diamond": lambda: rows(read(archive, DIAMOND, password))}


def row(record: dict[str, str], template: str, system: str) -> dict[str, Any]:
  """A record's question with its options in an order of its own."""
  options = [record[name].strip() for name in OPTIONS]
  order = list(range(len(options)))
  random.Random(record[ID]).shuffle(order)
  lines = [f"{letter}: {options[i]}" for letter, i in zip(jsonl.LETTERS, order)]
  asked = record[QUESTION].strip() + "\n\n" + "\n".join(lines)
  return dict(id=record[ID], task=f"gpqa/{record[DOMAIN].lower()}", level=0, response="",
              messages=json.dumps(chat.question(template.replace("{question}", asked), system)),
              answer=jsonl.LETTERS[order.index(0)])


def read(archive: str, member: str, password: str) -> list[dict[str, str]]:
  """The records of one table of the archive, decrypted in memory."""
  path = pathlib.Path(archive).expanduser()
  if not path.is_file():
    raise ValueError(f"no GPQA archive at {archive!r}: wanted dataset.zip, as its authors give it "
                     "out. Set it with --config.data.builder_kw.archive=...")
  try:
    with zipfile.ZipFile(path) as opened:
      content = opened.read(member, pwd=password.encode())
  except KeyError as error:
    raise ValueError(f"{path} is not GPQA's archive: it has no {member}") from error
  except NotImplementedError as error:
    raise ValueError(f"{path} is packed or encrypted in a way that Python does not read ({error}); "
                     "wanted the authors' own dataset.zip") from error
  # Of a wrong password one in 256 passes the archive's check, and then the data are no data.
  except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
    if not zipfile.is_zipfile(path):
      raise ValueError(f"{path} is not a zip archive; wanted GPQA's dataset.zip") from error
    raise ValueError(f"the password does not open {member} in {path}, or the file is damaged; "
                     "GPQA's authors publish both together: data.builder_kw.password") from error
  return list(records(content, f"{member} in {path}"))


def records(content: bytes, name: str) -> Iterator[dict[str, str]]:
  """The rows of a table with the columns that are needed. Raises: ValueError, without any text."""
  try:
    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    found = list(table)
  except (UnicodeDecodeError, csv.Error):
    # Not chained: a codec's error carries what it could not read.
    raise ValueError(f"{name} is not a table of comma-separated values in UTF-8") from None
  missing = [x for x in (ID, QUESTION, DOMAIN, *OPTIONS) if x not in (table.fieldnames or ())]
  if missing:
    raise ValueError(f"{name} has no column {', '.join(map(repr, missing))}")
  seen = set()
  for number, record in enumerate(found, 1):
    if not all(record[x] for x in (ID, QUESTION, *OPTIONS)) or record[DOMAIN] is None:
      raise ValueError(f"{name}, record {number}: id, question or an option is empty")
    if record[ID] in seen:
      raise ValueError(f"{name}, record {number}: the id {record[ID]!r} is an earlier record's too")
    seen.add(record[ID])
    yield record
