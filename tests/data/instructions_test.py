"""Prompts with instructions become rows that can be checked; others are left out and counted."""

import json
import os
import pathlib

from absl.testing import absltest, parameterized

from opd_jax.data import builders, chat
from opd_jax.data.builders import instructions

ROW = {"key": 7, "prompt": "Say it. No commas. 🙂", "instruction_id_list": ["punctuation:no_comma"],
       "kwargs": [{"num_words": None}]}
LETTER = {"let_frequency": 2, "let_relation": "at least"}
SPAN = {"prompt_to_repeat": "a b c d", "n_end": 3}


def with_one(kind, kwargs, **changes):
  return {**ROW, "instruction_id_list": [kind], "kwargs": [kwargs], **changes}


class InstructionsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, "rows.jsonl")

  def rows(self, *records):
    self.path.write_text("\n".join(map(json.dumps, records)))
    return list(instructions.splits(test=str(self.path))["test"]())

  def test_rows_hold_the_prompt_and_the_instructions(self):
    self.path.write_text(json.dumps(ROW))
    source = builders.open_source("instructions", dict(train=str(self.path), system="Be brief."),
                                  "train", self.create_tempdir().full_path)
    self.assertEqual(source[0], dict(
        id="7", task="instructions", level=0, response="", teacher="", group="",
        messages=json.dumps(chat.question(ROW["prompt"], "Be brief.")),
        answer='[{"id": "punctuation:no_comma", "kwargs": {}}]'))

  @parameterized.parameters(
      ("words:start_verb", {}, "needs NLTK's part-of-speech tagger"),
      ("keywords:letter_frequency", {"letter": "!", **LETTER}, "in the place of '!'"),
      ("keywords:letter_frequency", LETTER, "in the place of ''"),
      ("repeat:repeat_span", {"n_start": 0, **SPAN}, "takes a random place for one that is 0"),
      ("repeat:repeat_span", SPAN, "takes a random place for one that is 0"),
  )
  def test_what_cannot_be_checked_is_left_out_with_a_warning(self, kind, kwargs, why):
    both = with_one(kind, kwargs, key=8)
    both["instruction_id_list"], both["kwargs"] = (
        ["punctuation:no_comma", kind], [{}, kwargs])
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual([row["id"] for row in self.rows(ROW, both)], ["7"])
    self.assertIn("rows.jsonl, line 2 is left out: " + kind, logs.output[0])
    self.assertIn(why, logs.output[0])

  @parameterized.parameters(
      ("keywords:letter_frequency", {"letter": "Q", **LETTER}),
      ("repeat:repeat_span", {"n_start": 1, **SPAN}))
  def test_what_can_be_checked_is_kept(self, kind, kwargs):
    self.assertLen(self.rows(with_one(kind, kwargs)), 1)

  @parameterized.parameters(
      ({"prompt": "?"}, "KeyError"), ({**ROW, "prompt": None}, "ValueError: no text"),
      ({**ROW, "kwargs": []}, "ValueError"), ({**ROW, "kwargs": [None]}, "AttributeError"),
      ({**ROW, "instruction_id_list": [], "kwargs": []}, "ValueError: no text or no instruction"),
      ({**ROW, "instruction_id_list": [3]}, "ValueError: no text or no instruction"),
  )
  def test_bad_rows_are_named(self, record, message):
    with self.assertRaisesRegex(ValueError, f"rows.jsonl, line 2: no prompt.*{message}"):
      self.rows(ROW, record)

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  @parameterized.parameters(("ifeval", 269, 1), ("ifbench", 143, 2))
  def test_real_rows_are_kept_but_a_few(self, name, rows, left_out):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"], name, "half.jsonl")
    with self.assertLogs(level="WARNING") as logs:
      found = list(instructions.splits(test=str(path))["test"]())
    self.assertEqual((len(found), len(logs.output)), (rows - left_out, left_out))


if __name__ == "__main__":
  absltest.main()
