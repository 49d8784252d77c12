"""Over-long prompts are counted in an evaluation, and stop a study before it starts."""

import json
import pathlib
from unittest import mock

from absl.testing import absltest
import jax

from opd_jax import config as configs
from opd_jax import keys, main, progress, sharding
from opd_jax.data import builders
from opd_jax.pipelines import context_use, evaluation
from opd_jax.pipelines import policy as policies

DATA = dict(builder_kw=dict(train=1, test=40, mix=dict(plain=1.0)))


class DroppedTest(absltest.TestCase):

  def test_over_long_prompts_are_counted_and_announced(self):
    config = configs.evaluate(data=DATA, writers=("jsonl",),
                              rollout=dict(max_prompt=26, max_response=8),
                              eval=dict(prompts=8, samples=1, ks=(1,), batch=8))
    workdir, notes = self.create_tempdir().full_path, []
    with mock.patch.object(progress, "note", notes.append):
      main.pick(config.pipeline).run(config, workdir)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
      student = policies.load(config.student, config.model, keys.root(0), mesh)
    source = builders.open_source("arithmetic", DATA["builder_kw"], "test")
    lengths = [len(student.tokenizer.encode_chat(json.loads(source[i]["messages"])))
               for i in range(len(source))]
    last = [i for i, length in enumerate(lengths) if length <= 26][7]
    dropped = sum(length > 26 for length in lengths[:last])
    self.assertGreater(dropped, 0)
    self.assertEqual(evaluation.read(workdir, "eval")["dropped"], dropped)
    line = json.loads(pathlib.Path(workdir, "metrics.jsonl").read_text())
    self.assertEqual(line["eval/dropped"], dropped)
    self.assertRegex("\n".join(notes), f"leaves out {dropped} prompts .*rollout.max_prompt=26")


class ContextUseTest(absltest.TestCase):

  def assert_refused_at_the_start(self, message, **rollout):
    config = configs.context_use(data=DATA, rollout=rollout, eval=dict(prompts=8, batch=8))
    with mock.patch.object(context_use.context_use, "study") as study:
      with self.assertRaisesRegex(ValueError, message):
        main.pick(config.pipeline).run(config, self.create_tempdir().full_path)
    study.assert_not_called()

  def test_lengths_beyond_the_model_are_refused(self):
    self.assert_refused_at_the_start("300 = 600 tokens, but the tiny:student allows 512",
                                     max_prompt=300, max_response=300)

  def test_prompts_that_may_not_fit_are_refused_by_the_key(self):
    self.assert_refused_at_the_start(
        r"up to \d+ tokens .*rollout.max_response=64, but rollout.max_prompt is 80; set it to",
        max_prompt=80, max_response=64)


if __name__ == "__main__":
  absltest.main()
