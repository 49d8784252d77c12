"""The analysis of contexts reads any run's saved responses; scores are those of rows alone."""

import json
import pathlib

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, main, sharding
from opd_jax.evals import saved
from opd_jax.pipelines import evaluate, in_context, teacher_signal
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.teachers import contexts

DATA = dict(builder_kw=dict(train=20, test=40, mix=dict(plain=1.0), seed=7))


def study(**changes):
  return configs.teacher_signal(**dict(
      data=DATA, rollout=dict(max_prompt=40, max_response=64),
      context=dict(budget=280, buckets=(120, 200)),
      eval=dict(prompts=6, batch=4, samples=4, ks=(1,))) | changes)


class TeacherSignalTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.source = cls().create_tempdir().full_path
    config = configs.evaluate(
        data=DATA, rollout=dict(max_prompt=40, max_response=40), writers=("jsonl",),
        eval=dict(prompts=6, batch=6, samples=4, ks=(1,)))
    main.remember(config, cls.source)
    evaluate.run(config, cls.source)

  def test_scores_are_those_of_each_response_alone(self):
    config, mesh = study(), sharding.make_mesh(1, 1)
    groups = saved.read(self.source, "eval")
    with jax.set_mesh(mesh):
      policy = policies.load(config.student, config.model, keys.root(0), mesh)
      read = in_context.make(config.context, False, policy.model, policy.tokenizer.pad_id, mesh)
      scores = {name: teacher_signal.score(config, policy, groups, name, read, mesh)
                for name in ("plain", "success", "two_successes_failure")}
    tokenizer, ask = policy.tokenizer, jax.jit(scorer.logprobs, static_argnums=0)
    for name, found in scores.items():
      made = contexts.make(
          [contexts.Group(i, x.prompt, x.responses, x.rewards, [""] * 4)
           for i, x in enumerate(groups)],
          contexts.Settings(280, name), tokenizer, keys.at(keys.root(0), "context"))
      texts = [text for group in groups for text in group.responses]
      ends = [ended for group in groups for ended in group.ended]
      for i, (context, text, ended, value) in enumerate(zip(made, texts, ends, found.ravel())):
        if name != "plain" and not context.shown:
          self.assertTrue(np.isnan(value))
          continue
        response = [*tokenizer.encode(text), *([tokenizer.end_id] if ended else [])]
        pair = batches.pair([context.ids], [response], 280, 64, tokenizer.pad_id)
        logprobs = np.asarray(ask(policy.model, policy.params, pair)[0][0])[:len(response)]
        self.assertAlmostEqual(value, logprobs.mean(), delta=2e-5, msg=f"{name} {i}")
    self.assertFalse(np.isnan(scores["plain"]).any())
    self.assertTrue(any(ends) and not all(ends))  # both kinds are there

  def test_a_run_gives_a_table_and_a_picture(self):
    workdir = self.create_tempdir().full_path
    teacher_signal.run(study(run=self.source), workdir)
    found = json.loads(pathlib.Path(workdir, "teacher_signal.json").read_text())
    self.assertEqual(list(found["means"]), list(contexts.PEERS))
    self.assertEqual(found["prompts"], 6)
    self.assertTrue(pathlib.Path(workdir, "teacher_signal.png").is_file())

  def test_a_run_without_peers_is_refused(self):
    run = pathlib.Path(self.create_tempdir().full_path)
    whole = json.loads(pathlib.Path(self.source, "eval/eval.json").read_text())
    for record in whole["records"]:
      del record["texts"][1:], record["rewards"][1:]
    (run / "eval").mkdir()
    (run / "eval/eval.json").write_text(json.dumps(whole))
    (run / "config.json").write_text(pathlib.Path(self.source, "config.json").read_text())
    with self.assertRaisesRegex(ValueError, "have one response a prompt, and so no peers"):
      teacher_signal.run(study(run=str(run)), self.create_tempdir().full_path)

  def test_an_evaluation_that_does_not_exist_is_refused(self):
    with self.assertRaisesRegex(ValueError, "no evaluation 'best'; there are: eval"):
      teacher_signal.run(study(run=self.source, evaluation="best"),
                         self.create_tempdir().full_path)


if __name__ == "__main__":
  absltest.main()
