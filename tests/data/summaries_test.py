"""Posts and their summaries: what a row holds, and that EVE's stages run on the real text."""

import json
import os
import pathlib

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax import main
from opd_jax.data import builders
from opd_jax.data.builders import summaries

DATA = pathlib.Path(os.environ.get("OPD_JAX_DATA", "/nowhere"), "reddit_tldr/part.jsonl")


class SummariesTest(parameterized.TestCase):

  def file(self, number=6):
    return self.create_tempfile(content="".join(json.dumps(dict(
        id=f"p{i}", prompt=f"A long post about {i}\n\nTL;DR:", reference=f" It is {i}.")) + "\n"
        for i in range(number))).full_path

  def rows(self, split="train", **arguments):
    made = summaries.splits(**dict(kind="sft", file=self.file(), test=2) | arguments)
    return list(made[split]())

  def test_the_last_rows_are_held_out_and_answers_are_the_summaries(self):
    self.assertEqual([row["id"] for row in self.rows("test")], ["p4", "p5"])
    first = self.rows()[0]
    self.assertEqual((first["response"], first["answer"]), ("It is 0.", "It is 0."))
    self.assertEqual(json.loads(first["messages"])[-1]["content"], "A long post about 0\n\nTL;DR:")
    self.assertEqual({row["response"] for row in self.rows(kind="prompts")}, {""})

  def test_the_better_of_a_pair_is_the_posts_own(self):
    rows = self.rows(kind="preferences")
    within = {row["answer"] for row in rows}
    for row in rows:
      better, worse = (x["response"] for x in json.loads(row["group"]))
      self.assertEqual(better, row["answer"])
      self.assertIn(worse, within - {better})  # never one that is held out
    self.assertEqual(rows, self.rows(kind="preferences"))

  def test_posts_are_cut_between_words(self):
    self.assertEqual(summaries.cut("one two three\n\nTL;DR:", 9), "one two\n\nTL;DR:")
    self.assertEqual(summaries.cut("one two\n\nTL;DR:", 7), "one two\n\nTL;DR:")

  @parameterized.parameters((dict(kind="best"), "kind is 'best'; it must be one of sft"),
                            (dict(test=6), "test is 6, and .* has 6 rows"),
                            (dict(test=5, kind="preferences"), "no two summaries"))
  def test_what_cannot_be_made_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      self.rows(**changes)


@absltest.skipUnless(DATA.is_file(), "OPD_JAX_DATA has no reddit_tldr")
class RealTextTest(absltest.TestCase):

  def run_stage(self, config):
    workdir = self.create_tempdir().full_path
    configs.validate(config)
    main.remember(config, workdir)
    main.pick(config.pipeline).run(config, workdir)
    return workdir

  def test_stages_run_on_it(self):
    data = lambda kind: dict(builder="summaries", builder_kw=dict(
        kind=kind, file=str(DATA), test=16, characters=200))
    source = builders.open_source("summaries", data("sft")["builder_kw"], "train")
    self.assertLen(source, 52)
    batch = dict(tokens=4 * 400, buckets=(400,), chunk=16)
    judge = self.run_stage(configs.reward_model(
        total_steps=1, student=dict(source="tiny:weak"), data=data("preferences"), batch=batch,
        writers=("jsonl",), eval=dict(prompts=4), min_accuracy=0.0))
    rows = self.run_stage(configs.responses(  # preferences drawn by it, of the real summaries
        data=data("preferences"), prompts=8, keep="drawn_pair", batch=batch, writers=("jsonl",),
        reward=dict(source=judge, min_accuracy=0.0)))
    weak = self.run_stage(configs.offline(
        total_steps=1, student=dict(source="tiny:weak"), writers=("jsonl",), batch=batch,
        data=dict(builder="rows", builder_kw=dict(train=f"{rows}/rows.jsonl"),
                  eval_builder="summaries", eval_builder_kw=data("prompts")["builder_kw"]),
        rollout=dict(max_prompt=300, max_response=16),
        eval=dict(prompts=2, samples=1, ks=(1,), batch=2, scores=dict(
            base=dict(source="tiny:weak"))), checkpoint=dict(best_metric="eval/mean@1")))
    self.assertTrue(pathlib.Path(weak, "export/model.safetensors").is_file())
    self.assertIn("scored", json.loads(pathlib.Path(weak, "eval/step_000001.json").read_text())[
        "metrics"])


if __name__ == "__main__":
  absltest.main()
