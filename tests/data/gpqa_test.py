"""GPQA is read out of its encrypted archive, and nothing that a run leaves shows a question."""

import csv
import io
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
from unittest import mock
import zipfile
import zlib

from absl.testing import absltest, parameterized
import jax

from opd_jax import config as configs
from opd_jax import main, progress, sharding
from opd_jax.data import builders
from opd_jax.data.builders import gpqa
from opd_jax.evals import saved
from opd_jax.pipelines import opcd, teacher_cache, teacher_samples
from opd_jax.verifiers import multiple_choice

# Invented; no question here is GPQA's.
THINGS = ("glimmerfish", "wobblestone", "sproketree", "quillbeetle", "frostlamp", "murmurvine",
          "cinderplum", "toffeecloud", "brambleowl", "vellumcrab")


def records():
  return [{"Record ID": f"rec{i}", "Question": f"How many legs\nhas the {thing}, if any?",
           "Correct Answer": f" {i} of {thing}s \n",
           **{f"Incorrect Answer {j}": f"{i + 10 * j} of {thing}s" for j in (1, 2, 3)},
           "High-level domain": ("Physics", "Biology")[i % 2], "Canary String": "unused"}
          for i, thing in enumerate(THINGS)]


def table(rows):
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, list(rows[0]))
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


def encrypt(data, password):
  """ZipCrypto, as PKWARE's APPNOTE describes it; the standard library can only undo it."""
  keys, out = [0x12345678, 0x23456789, 0x34567890], bytearray()
  crc = lambda key, byte: ~zlib.crc32(bytes([byte]), ~key & 0xffffffff) & 0xffffffff

  def take(byte):
    keys[0] = crc(keys[0], byte)
    keys[1] = ((keys[1] + (keys[0] & 0xff)) * 134775813 + 1) & 0xffffffff
    keys[2] = crc(keys[2], keys[1] >> 24)
  for byte in password:
    take(byte)
  for byte in data:
    pad = (keys[2] | 2) & 0xffff
    out.append(byte ^ (pad * (pad ^ 1) >> 8 & 0xff))
    take(byte)
  return bytes(out)


def archive(path, tables, password=gpqa.PASSWORD):
  """Writes an encrypted zip file, as the authors' is."""
  body, directory = b"", b""
  for name, content in tables.items():
    packed = zlib.compress(content, wbits=-15)
    sealed = encrypt(bytes(11) + bytes([zlib.crc32(content) >> 24]) + packed, password.encode())
    fields = struct.pack("<HHHHHIIIHH", 20, 1, 8, 0, 0x21, zlib.crc32(content), len(sealed),
                         len(content), len(name), 0)
    directory += (b"PK\1\2" + struct.pack("<H", 20) + fields
                  + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode())
    body += b"PK\3\4" + fields + name.encode() + sealed
  end = struct.pack("<HHHHIIH", 0, 0, len(tables), len(tables), len(directory), len(body), 0)
  path.write_bytes(body + directory + b"PK\5\6" + end)


class GpqaTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, "dataset.zip")
    archive(self.path, {gpqa.MAIN: table(records()), gpqa.DIAMOND: table(records()[7:])})

  def rows(self, split, **changes):
    arguments = dict(archive=str(self.path), train_rows=4, **changes)
    source = builders.open_source("gpqa", arguments, split, "/nowhere/that/could/be/written")
    return [source[i] for i in range(len(source))]

  def test_splits_are_the_main_set_without_the_diamonds_and_these(self):
    train, test, diamond = ([row["id"] for row in self.rows(split)]
                            for split in ("train", "test", "diamond"))
    self.assertEqual((len(train), len(test)), (4, 3))
    self.assertCountEqual(train + test, [f"rec{i}" for i in range(7)])
    self.assertEqual(diamond, ["rec7", "rec8", "rec9"])
    self.assertEqual([row["id"] for row in self.rows("train")], train)
    shuffled = records()
    random.Random(0).shuffle(shuffled)  # who trains does not depend on the order of the file
    archive(self.path, {gpqa.MAIN: table(shuffled), gpqa.DIAMOND: table(records()[7:])})
    self.assertEqual([row["id"] for row in self.rows("train")], train)

  def test_250_questions_are_129_to_train_and_121_held_out(self):
    many = [{**records()[0], "Record ID": f"rec{i}"} for i in range(448)]
    archive(self.path, {gpqa.MAIN: table(many), gpqa.DIAMOND: table(many[100:298])})
    of = gpqa.splits(archive=str(self.path))
    ids = {split: {row["id"] for row in rows()} for split, rows in of.items()}
    self.assertEqual({split: len(x) for split, x in ids.items()},
                     dict(train=129, test=121, diamond=198))
    self.assertLen(set.union(*ids.values()), 448)

  def test_rows_ask_in_an_order_of_their_own_and_the_letter_is_the_right_options(self):
    letters = set()
    for row in self.rows("train") + self.rows("test"):
      i = int(row["id"].removeprefix("rec"))
      [turn] = json.loads(row["messages"])
      question, options, how = turn["content"].split("\n\n")
      self.assertEqual(question, records()[i]["Question"])
      found = dict(line.split(": ") for line in options.split("\n"))
      self.assertCountEqual(found.values(), [f"{i + 10 * j} of {THINGS[i]}s" for j in range(4)])
      self.assertEqual(found[row["answer"]], f"{i} of {THINGS[i]}s")
      self.assertIn('"Answer: X"', how)
      self.assertEqual(row["task"], f"gpqa/{('physics', 'biology')[i % 2]}")
      self.assertEqual((row["level"], row["response"], row["teacher"]), (0, "", ""))
      verdict = multiple_choice.verify(f"Answer: {row['answer']}", row["answer"])
      self.assertEqual(verdict.reward, 1.0)
      letters.add(row["answer"])
    self.assertGreater(len(letters), 1)
    brief = self.rows("test", template="Q: {question}", system="Be brief.")[0]
    self.assertEqual([m["role"] for m in json.loads(brief["messages"])], ["system", "user"])

  def assert_refused(self, message, **changes):
    with self.assertRaisesRegex(ValueError, message) as caught:
      self.rows("test", **changes)
    while (error := caught.exception) is not None:
      self.assertFalse(any(thing in repr(error) for thing in THINGS))
      caught.exception = error.__cause__

  def test_what_is_not_the_archive_is_named(self):
    # One in 256 wrong passwords passes the check of the first byte: both ways must be clear.
    for password in map(str, range(300)):
      self.assert_refused("the password does not open dataset/gpqa_diamond.csv in .*zip, or the "
                          "file is damaged", password=password)
    self.assert_refused("must hold '{question}'", template="x")
    self.assert_refused("plain_text is 1; it must be True or False", plain_text=1)
    archive(self.path, {gpqa.DIAMOND: table(records()[7:])})
    self.assert_refused("is not GPQA's archive: it has no dataset/gpqa_main.csv")
    self.path.write_bytes(b"PK, but no zip file")
    self.assert_refused("is not a zip archive; wanted GPQA's dataset.zip")
    self.path.unlink()
    self.assert_refused(r"no GPQA archive at '.*dataset.zip': wanted dataset.zip")
    with zipfile.ZipFile(self.path, "w", zipfile.ZIP_LZMA) as plain:  # not encrypted: no harm
      plain.writestr(gpqa.MAIN, table(records()))
      plain.writestr(gpqa.DIAMOND, table(records()[7:]))
    self.assertLen(self.rows("test"), 3)

  @parameterized.parameters(
      (lambda r: r[2].pop("Question") and r, "record 3: id, question or an option is empty"),
      (lambda r: r[3].update({"Record ID": "rec1"}) or r, "record 4: the id 'rec1' is an earlier"),
      (lambda r: [{k: x for k, x in row.items() if k != "Incorrect Answer 2"} for row in r],
       "has no column 'Incorrect Answer 2'"),
      (lambda r: r[6:], "train_rows is 4; of 1 records it must be at least 1 and leave one"),
  )
  def test_bad_tables_are_named(self, change, message):
    archive(self.path, {gpqa.MAIN: table(change(records())), gpqa.DIAMOND: table(records()[7:])})
    self.assert_refused(message)

  def test_text_that_is_no_utf8_is_not_shown(self):
    archive(self.path, {gpqa.DIAMOND: table(records()) + b"\xff", gpqa.MAIN: b""})
    self.assert_refused("is not a table of comma-separated values in UTF-8")

  def test_nothing_printed_of_the_rows_is_their_text(self):
    source = builders.open_source("gpqa", dict(archive=str(self.path), train_rows=4), "train")
    self.assertNotIn("rec", repr(source) + str(source))


class GuardTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.room = pathlib.Path(self.create_tempdir().full_path)
    for name in ("home", "tmp", "work"):
      (self.room / name).mkdir()
    path = self.room / "dataset.zip"
    archive(path, {gpqa.MAIN: table(records()), gpqa.DIAMOND: table(records()[8:])})
    self.arguments = dict(archive=str(path), train_rows=5)
    environment = dict(HOME=str(self.room / "home"), TMPDIR=str(self.room / "tmp"))
    self.enterContext(mock.patch.dict(os.environ, environment))
    self.enterContext(mock.patch.object(tempfile, "tempdir", None))

  def shared(self, **changes):
    """What all runs here have in common."""
    return dict(
        data=dict(builder="gpqa", builder_kw={**self.arguments, **changes}),
        verifier=dict(name="multiple_choice"),
        rollout=dict(max_prompt=320, max_response=24, prompts=2, group_size=2),
        eval=dict(prompts=2, samples=2, ks=(1,), batch=2))

  def run_here(self, config):
    workdir = self.room / "work"
    (workdir / "config.json").write_text(config.to_json())
    notes = []
    with mock.patch.object(progress, "note", notes.append):
      main.pick(config.pipeline).run(config, str(workdir))
    (self.room / "notes").write_text("\n".join(notes))

  def found(self):
    """Files under the room that show a question or an option."""
    out = {}
    for path in sorted(self.room.rglob("*")):
      if path.is_file():
        content = path.read_bytes()
        shown = {thing for thing in THINGS if thing.encode() in content}
        shown |= {"legs"} if b"legs" in content else set()
        if shown:
          out[str(path.relative_to(self.room))] = shown
    return out

  def test_an_evaluation_shows_ids_alone_and_texts_only_if_allowed(self):
    file = self.room / "the_config.py"
    for plain_text in (False, True):
      file.write_text(f"from opd_jax import config as configs\n\ndef get_config():\n"
                      f"  return configs.evaluate(**{self.shared(plain_text=plain_text)!r})\n")
      done = subprocess.run(
          [sys.executable, "-m", "opd_jax.main", f"--config={file}",
           f"--workdir={self.room / 'work' / str(plain_text)}"],
          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
      self.assertEqual(done.returncode, 0, done.stderr.decode())
      (self.room / "printed").write_bytes(done.stdout + done.stderr)
      if not plain_text:
        self.assertEmpty(self.found())
        workdir = self.room / "work/False"
        records = json.loads((workdir / "eval/eval.json").read_text())["records"]
        self.assertTrue(all(len(record["rewards"]) == 2 for record in records))
        self.assertNotIn("texts", records[0])
        self.assertIn(f"=== {records[0]['id']}, level 0, answer (guarded)",
                      (workdir / "samples/eval.txt").read_text())
        with self.assertRaisesRegex(ValueError, "those of guarded data are not kept"):
          saved.read(str(workdir), "eval")
    self.assertEqual(list(self.found()), ["work/True/samples/eval.txt"])  # the search can find
    self.assertLen(saved.read(str(self.room / "work/True"), "eval"), 2)
    self.assertFalse((self.room / "home/.cache/opd_jax/data").exists())

  def test_training_on_policy_shows_ids_alone(self):
    self.run_here(configs.on_policy(
        **self.shared(), total_steps=2, log_every=1, checkpoint=dict(every=1),
        teacher=dict(source="tiny:teacher")))
    self.assertTrue((self.room / "work/export").is_dir())
    self.assertEmpty(self.found())

  def test_critiques_stay_in_memory_and_a_run_cannot_go_on_without_them(self):
    config = lambda epochs: configs.opcd(
        **self.shared(), total_steps=epochs, questions=2, filter="none", control="none",
        critic=dict(source=""), context=dict(budget=440), triples=4, updates=1, export=False,
        checkpoint=dict(every=1, keep_best=0),
        loss=dict(surrogate="reverse_kl", aggregate="sequence_sum"))
    self.run_here(config(1))
    triples = opcd.read(str(self.room / "work"), 0)
    self.assertLen(triples, 4)
    self.assertContainsSubset({"epoch", "prompt", "chain", "reward", "outcome", "kept"}, triples[0])
    for triple in triples:
      self.assertNoCommonElements(triple, ("answer", "ids", "critique", "refinement"))
    self.assertEmpty(self.found())
    with self.assertRaisesRegex(ValueError, "no text is kept to go on with"):
      self.run_here(config(2))

  def test_a_teachers_samples_stay_in_memory(self):
    config = configs.offline(
        data=dict(builder="gpqa", builder_kw=self.arguments), teacher=dict(source="tiny:teacher"),
        rollout=dict(max_prompt=256, max_response=96, prompts=5, group_size=4))
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    source = builders.open_source("gpqa", self.arguments, "train")
    with jax.set_mesh(mesh), mock.patch.object(progress, "note"):
      rows = teacher_samples.of(config, source, mesh, str(self.room / "work"))
    self.assertTrue(all(row["response"] for row in rows))
    self.assertEmpty(list((self.room / "work").iterdir()))
    self.assertEmpty(self.found())

  def test_what_would_keep_words_of_the_data_is_refused(self):
    shared = self.shared()
    with self.assertRaisesRegex(ValueError, "words of the guarded data set 'gpqa' must not reach"):
      self.run_here(configs.offline(**shared, tokenizer_vocab=300))
    cached = configs.on_policy(**shared, teacher_cache=str(self.room / "cache"))
    with self.assertRaisesRegex(ValueError, "would keep tokens of the guarded data set 'gpqa'"):
      teacher_cache.prepare(cached, None, None)
    self.assertFalse((self.room / "cache").exists())
    self.assertEmpty(self.found())


if __name__ == "__main__":
  absltest.main()
