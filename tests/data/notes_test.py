"""Notes: the gold reward is what it says, preferences follow it, the weak model's error shows."""

import json
import math
import random

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax.data import builders
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders import notes
from opd_jax.models.source import TINY
from opd_jax.verifiers import notes as gold

RECORD = "7,3,9,2,5,4"
SLIPS = (0, 1, 2, 3, 4)


def rows(split="train", **arguments):
  return list(notes.splits(**(dict(train=400, test=50, held_out=50) | arguments))[split]())


def asked(row):
  return json.loads(row["messages"])[0]["content"]


class GoldTest(parameterized.TestCase):

  @parameterized.parameters(
      ("9,7,5:4", 5.0),       # the best
      ("9,7,5", 4.0),         # no spread
      ("9,7,5:3", 3.5),       # a wrong one
      ("5,7,9:4", 4.0),       # rising
      ("9,7:2", 3.5),         # two of three, one falling pair
      ("9,7,5,4:5", 4.5),     # one too many
      ("9,7,5,5:4", 4.5),     # one twice
      ("9,7,6:3", 2.5),       # no such fact, which is none of gold's either
      ("2,3,4:2", -0.5),      # the least, rising
      ("1,6,8:1", -3.0),      # cut off at the worst
      ("", -3.0), ("9 7", -3.0), ("9,7,5:12", -3.0), ("9,7,5:4\n9", -3.0), ("9b,7,5:4", -3.0),
      (" 9,7,5:4\n", 5.0),
  )
  def test_each_attribute_counts_as_the_docstring_says(self, text, reward):
    self.assertEqual(gold.gold(RECORD, text), reward)
    self.assertEqual(gold.verify(text, RECORD).reward, (reward + 3.0) / 8.0)

  def test_no_note_is_better_than_the_best(self):
    rng = random.Random(0)
    for _ in range(2000):
      text = notes.graded(rng, RECORD, (0, 1, 2, 3, 4, 8))
      self.assertBetween(gold.gold(RECORD, text), gold.WORST, gold.BEST)

  @parameterized.parameters(
      ("9,7,5:4", "as good as"), ("9,7,5:3", "arithmetic"), ("4,2:2", "coverage"),
      ("9,7,5,1:8", "truth"), ("hello", "no note"))
  def test_feedback_names_what_is_lost_and_not_the_answer(self, text, said):
    self.assertIn(said, gold.verify(text, RECORD).feedback)


class NotesTest(parameterized.TestCase):

  @parameterized.product(kind=notes.KINDS, seed=(0, 5))
  def test_rows_are_the_seeds_and_test_records_are_never_trained_on(self, kind, seed):
    arguments = dict(kind=kind, seed=seed, slips=SLIPS, shots=0.5, lead=0.9)
    train = rows(**arguments)
    self.assertEqual(train, rows(**arguments))
    self.assertLen({row["id"] for row in train}, 400)
    self.assertNotEqual([row["answer"] for row in train],
                        [row["answer"] for row in rows(**{**arguments, "seed": seed + 1})])
    for split in ("test", "held_out"):
      kept = rows(split, **arguments)
      self.assertLen(kept, 50)
      self.assertEqual({notes.part(row["answer"]) for row in kept}, {split})
      self.assertEqual(kept, rows(split, **{**arguments, "seed": seed + 1}))
    for row in train + kept:
      *shown, last = asked(row).split("\n")
      self.assertEqual(last, f"{row['answer']}>")
      self.assertContainsSubset({notes.part(line.split(">")[0]) for line in shown}, {"train"})
    self.assertEqual({notes.part(row["answer"]) for row in train}, {"train"})

  def test_rows_survive_the_disk(self):
    arguments = dict(kind="preferences", train=20, test=5, slips=SLIPS)
    source = builders.open_source("notes", arguments, "train", self.create_tempdir().full_path)
    want = {row["id"]: row for row in notes.splits(**arguments)["train"]()}
    for i in range(len(source)):
      self.assertEqual(source[i], {"teacher": "", **want[source[i]["id"]]})

  def test_a_record_that_leads_has_its_greatest_first_and_others_only_by_chance(self):
    rng = random.Random(0)
    leads = lambda about: set(gold.greatest(about)) == set(gold.facts(about)[:3])
    self.assertTrue(all(leads(notes.record(rng, 1.0)) for _ in range(200)))
    share = np.mean([leads(notes.record(rng, 0.0)) for _ in range(4000)])
    self.assertAlmostEqual(share, 1 / math.comb(6, 3), delta=0.02)

  def test_who_takes_the_first_three_errs_on_test_records_and_nowhere_else(self):
    first = notes.Style("first")
    def mean(split, style, measure):
      return np.mean([measure(row["answer"], notes.write(row["answer"], style))
                      for row in rows(split, kind="prompts", lead=1.0, test=1000)])
    self.assertEqual(mean("train", first, gold.gold), 5.0)
    self.assertAlmostEqual(mean("test", first, gold.gold), 2.75, delta=0.1)
    self.assertEqual(mean("test", notes.GOLD, gold.gold), 5.0)
    self.assertAlmostEqual(mean("test", first, notes.head_share), 0.5, delta=0.03)
    self.assertEqual(mean("test", notes.GOLD, notes.head_share), 0.0)

  def test_notes_of_more_slips_are_worse(self):
    rng = random.Random(0)
    means = [np.mean([gold.gold(about, notes.graded(rng, about, (count,)))
                      for about in (notes.record(rng, 0.0) for _ in range(1000))])
             for count in SLIPS]
    np.testing.assert_allclose(means, [5.0, 3.6, 2.6, 1.9, 1.3], atol=0.2)

  def test_preferences_are_drawn_by_the_difference_of_the_rewards(self):
    gaps = []
    for row in rows(kind="preferences", train=8000, slips=SLIPS):
      better, worse = (member["response"] for member in json.loads(row["group"]))
      self.assertNotEqual(better, worse)
      self.assertEqual(row["response"], better)
      gaps.append(gold.gold(row["answer"], better) - gold.gold(row["answer"], worse))
    gaps = np.array(gaps)
    for low, high in ((0.25, 0.75), (0.75, 1.25), (1.25, 2.0), (2.0, 3.0)):
      near = gaps[(np.abs(gaps) > low) & (np.abs(gaps) <= high)]
      want = np.mean(1.0 / (1.0 + np.exp(-np.abs(near))))
      self.assertAlmostEqual(np.mean(near > 0), want, delta=3.5 * math.sqrt(0.25 / len(near)))

  def test_demonstrations_and_the_response_are_of_one_style(self):
    styles = {}
    for row in rows(kind="pretrain", shots=1.0, noise=0.0):
      *shown, last = asked(row).split("\n")
      pairs = [tuple(line.split(">")) for line in shown] + [(last[:-1], row["response"])]
      self.assertLen(pairs, 3)
      fitting = [style for style in notes.STYLES
                 if all(notes.write(about, style) == note for about, note in pairs)]
      self.assertNotEmpty(fitting)
      styles[fitting[0].which] = styles.get(fitting[0].which, 0) + 1
    self.assertAlmostEqual(styles["greatest"] / 400, notes.SHARES["greatest"], delta=0.08)

  def test_demonstrations_of_prompts_are_golds(self):
    for row in rows(kind="prompts", shots=1.0, train=50):
      for line in asked(row).split("\n")[:-1]:
        self.assertEqual(gold.gold(*line.split(">")), gold.BEST)

  def test_every_character_is_a_token_of_the_tiny_models(self):
    tokenizer = tokenizers.load(TINY / "teacher")
    for row in rows(kind="pretrain", shots=0.5, train=100):
      self.assertLen(tokenizer.encode(row["response"]), len(row["response"]))
    # What configs/claims/eve.py has place for: the longest note that slips make, shown twice.
    worst = "8,6,5,3,1,0:8"
    self.assertLen(tokenizer.encode(worst), 13)
    for demonstrations, length in ((), 20), (((RECORD, worst),) * 2, 72):
      self.assertLen(tokenizer.encode_chat(notes.prompt(RECORD, demonstrations)), length)

  def test_no_mistake_makes_a_note_longer_than_six_facts_and_a_spread(self):
    rng = random.Random(0)
    for _ in range(2000):
      self.assertLessEqual(len(notes.graded(rng, notes.record(rng, 0.9), SLIPS)), 13)

  def test_a_slip_changes_the_note(self):
    rng = random.Random(0)
    for _ in range(1000):
      self.assertNotEqual(notes.slip(rng, RECORD, notes.write(RECORD)), notes.write(RECORD))

  def test_a_kind_that_does_not_exist_is_named(self):
    with self.assertRaisesRegex(ValueError, "kind is 'rl'; it must be one of pretrain, sft, pref"):
      notes.splits(kind="rl", train=1, test=1)


if __name__ == "__main__":
  absltest.main()
