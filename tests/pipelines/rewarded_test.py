"""On-policy learning from a reward model: whose rewards they are, on any mesh, and what is refused.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import checkpoint
from opd_jax import config as configs
from opd_jax import keys, main, sharding
from opd_jax.losses import signals
from opd_jax.pipelines import on_policy, reward_model, rewarded
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts.sampler import Sampling
from opd_jax.verifiers import Verdict

ROOT = pathlib.Path(__file__).parents[2]
DATA = dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0)))
# The same run on eight devices, in a process of its own.
MESHED = """
import sys
from tests.pipelines import rewarded_test as t
t.run(t.tiny(sys.argv[1], mesh=dict(data=4, model=2)), sys.argv[2])
"""


def run(config, workdir):
  configs.validate(config)
  pathlib.Path(workdir).mkdir(exist_ok=True)
  main.remember(config, workdir)
  main.pick(config.pipeline).run(config, workdir)


def judge(folder):
  """A reward model that has begun to like long responses."""
  rng = np.random.default_rng(0)
  text = lambda low, high: "".join(rng.choice(list("0123456789+"), rng.integers(low, high)))
  path = pathlib.Path(folder, "pairs.jsonl")
  path.write_text("".join(json.dumps(dict(id=str(i), q=f"{i}+2=?", a="", chosen=text(9, 20),
                                          rejected=text(1, 8))) + "\n" for i in range(32)))
  run(configs.reward_model(**dict(
      total_steps=8, writers=("jsonl",), student=dict(source="tiny:weak"),
      data=dict(builder="jsonl", builder_kw=dict(
          train=str(path), test=str(path), question="q", answer="a", chosen="chosen",
          rejected="rejected")),
      batch=dict(tokens=48 * 16, buckets=(48,), chunk=16), eval=dict(prompts=32),
      optimizer=dict(learning_rate=3e-3), min_accuracy=0.0)), f"{folder}/judge")
  return f"{folder}/judge"


def tiny(source, **changes):
  settings = dict(
      total_steps=2, log_every=1, writers=("jsonl",), data=DATA, reward=dict(source=source),
      rollout=dict(prompts=8, group_size=2, max_prompt=40, max_response=24, decode_chunk=8),
      batch=dict(tokens=512, buckets=(32, 64)), loss=dict(signal="group_advantage"),
      optimizer=dict(learning_rate=1e-3), eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
      checkpoint=dict(best_metric="eval/mean@2"))
  for section, values in changes.items():
    settings[section] = {**settings.get(section, {}), **values}
  return configs.rewarded(**settings)


def lines(workdir):
  found = [json.loads(x) for x in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
  return [line for line in found if "reward/mean" in line]


class RewardedTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.source = judge(cls.folder)

  def said(self, conversations, texts):
    """The reward model's own rewards, of the parameters on disk and one row at a time."""
    config, out = configs.on_policy(student=dict(source="tiny:weak")), []
    policy = policies.load(config.student, config.model, keys.root(0), sharding.make_mesh(1, 1))
    params = checkpoint.restore_params(self.source, reward_model.with_head(
        policy.params, policy.model.config.embed_dim))
    for messages, text in zip(conversations, texts):
      ids = np.array([policy.tokenizer.encode_chat(messages) + policy.tokenizer.encode(text)
                      + [policy.tokenizer.end_id]])
      states, _ = policy.model.apply({"params": params["trunk"]}, ids,
                                     np.arange(ids.shape[1])[None], np.ones_like(ids))
      out.append(float(states[0, -1] @ params["score"]))
    return np.array(out, np.float32)

  def test_the_rewards_learned_from_are_the_reward_models_own(self):
    config, mesh = tiny(self.source), sharding.make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
      student = policies.load(config.student, config.model, keys.root(0), mesh)
      method = rewarded.build(config, student, mesh)
      rows = [dict(messages=json.dumps([dict(role="user", content=f"Compute {i}+1 mod 10.")]))
              for i in range(8)]
      prompts = batches.prompts(
          [student.tokenizer.encode_chat(json.loads(row["messages"])) for row in rows], 2, (40,),
          student.tokenizer.pad_id)
      sample = policies.make_sampler(student.model, student.tokenizer, config.rollout, Sampling())
      drawn = sample(student.params, sharding.put(prompts, sharding.of_batch(mesh)), keys.root(3))
      texts = policies.texts(student.tokenizer, drawn)
      graded, metrics = method.grade(
          None, drawn.replace(learn=drawn.mask), on_policy.Verified(
              rows, texts, [Verdict(0.0, "")] * 16), keys.root(4))
    own = self.said([json.loads(rows[i // 2]["messages"]) for i in range(16)], texts)
    there = rewarded.ended(drawn, student.tokenizer.eos_ids)
    self.assertGreater(there.sum(), 4)
    self.assertLess(there.sum(), 16)  # a response that was cut off has the least of the others'
    want = np.where(there, own, own[there].min())
    np.testing.assert_allclose(graded.reward, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        graded.advantage, signals.group_advantage(jnp.asarray(want).reshape(8, 2), True).ravel(),
        atol=2e-3)
    self.assertAlmostEqual(metrics["reward/known"], there.mean(), places=6)
    self.assertAlmostEqual(metrics["reward/mean"], own[there].mean(), places=4)

  def test_a_run_learns_them_and_one_device_equals_eight(self):
    alone, many = f"{self.folder}/alone", f"{self.folder}/many"
    run(tiny(self.source), alone)
    child = subprocess.run([sys.executable, "-c", MESHED, self.source, many], cwd=ROOT, text=True,
                           capture_output=True, env=os.environ | {
                               "JAX_NUM_CPU_DEVICES": "8"})
    self.assertEqual(child.returncode, 0, child.stderr)
    ours, theirs = lines(many), lines(alone)
    self.assertLen(theirs, 2)
    for one, other in zip(ours, theirs, strict=True):
      self.assertEqual(other["update/skipped"], 0.0)
      for name in ("reward/mean", "reward/std", "reward/known", "rollout/reward", "loss/total",
                   "update/gradient_norm"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4, err_msg=name)

  def test_what_has_no_known_reward_has_the_least(self):
    rewards = np.array([3.0, np.nan, 9.0, 1.0], np.float32)
    there = np.array([True, True, False, True])
    found, metrics = rewarded.settle(rewards, there)
    np.testing.assert_array_equal(found, [3.0, 1.0, 1.0, 1.0])
    self.assertEqual(metrics, {"reward/mean": 2.0, "reward/std": 1.0, "reward/known": 0.5})
    found, metrics = rewarded.settle(rewards, np.zeros(4, bool))
    np.testing.assert_array_equal(found, 0.0)
    self.assertEqual(metrics, {"reward/known": 0.0})

  @parameterized.parameters(
      (dict(loss=dict(signal="opd")), "'opd', which learns from no reward; set it to one of group"),
      (dict(reward=dict(source="")), "reward.source is ''; name the workdir of a reward model"))
  def test_what_cannot_be_learned_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      run(tiny(self.source, **changes), self.create_tempdir().full_path)

  def test_one_that_hardly_tells_is_refused(self):
    folder = self.create_tempdir().full_path
    path = pathlib.Path(self.source, "eval/step_000008.json")
    found = path.read_text()
    self.addCleanup(path.write_text, found)
    path.write_text(json.dumps(json.loads(found) | {"metrics": {"accuracy": 0.54}}))
    with self.assertRaisesRegex(ValueError, "right about 54.0% .* and min_accuracy is 55.0%"):
      run(tiny(self.source), folder)


if __name__ == "__main__":
  absltest.main()
