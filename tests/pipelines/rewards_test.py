"""Losses of verified responses: as signals in the loop's loss they are what their papers say."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, sharding
from opd_jax.losses import masked, preference
from opd_jax.pipelines import objective, opd
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch

AGGREGATES = dict(dpo="sequence_sum", simpo="sequence_mean", verified="token_mean")


def config(signal, **loss):
  return configs.on_policy(
      teacher=dict(source=""), reference=dict(source="tiny:weak" if signal == "dpo" else ""),
      rollout=dict(prompts=3, group_size=4),
      loss=dict(signal=signal, aggregate=AGGREGATES[signal], **loss))


class RewardsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    settings = config("verified")
    mesh = sharding.make_mesh(1, 1)
    cls.student = policies.load(settings.student, settings.model, keys.root(0), mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 320, (12, 16), np.int32)
    mask = np.arange(12) < np.array([12, 1, 3, 5, 12, 7, 2, 9, 4, 4, 6, 11])[:, None]
    # A group of both, one that agrees, and one success of graded rewards.
    reward = np.array([1, 0, 0, 1, 0, 0, 0, 0, 0.5, 0, 1, 0.5], np.float32)
    cls.batch = Batch(
        tokens[:, :4], np.ones((12, 4), bool), tokens[:, 4:], mask, mask,
        rng.uniform(-9.0, -7.0, mask.shape).astype(np.float32),  # not what anybody would sample
        reward=reward,
        reference_logprobs=rng.uniform(-9.0, -2.0, mask.shape).astype(np.float32))

  def logprobs(self, params):
    return jnp.where(self.batch.mask, scorer.logprobs(self.student.model, params, self.batch)[0],
                     0.0)

  def direct(self, signal, params):
    """The papers' losses, of the log-probabilities themselves."""
    now, batch = self.logprobs(params), self.batch
    reward, real = batch.reward.reshape(3, 4), np.ones((3, 4), bool)
    rows = lambda x, over: over(x, batch.mask).reshape(3, 4)
    if signal == "dpo":
      reference = jnp.where(batch.mask, batch.reference_logprobs, 0.0)
      return preference.group_dpo(rows(now, masked.row_sum), rows(reference, masked.row_sum),
                                  reward, real, 0.1)[0]
    if signal == "simpo":
      return preference.group_simpo(rows(now, masked.row_mean), reward, real, 2.0, 1.0)[0]
    passed = batch.mask & (batch.reward[:, None] == 1.0)
    return -jnp.sum(jnp.where(passed, now, 0.0)) / passed.sum()

  @parameterized.parameters("dpo", "simpo", "verified")
  def test_the_loops_gradient_is_that_of_the_papers_loss(self, signal):
    settings = config(signal)
    objective.check(settings)
    batch = self.batch
    if objective.asks_old(settings.loss):
      batch = batch.replace(old_logprobs=np.asarray(self.logprobs(self.student.params)))
    graded = opd.grade(settings, batch)
    found = jax.grad(lambda params: opd.loss(
        self.student.model, settings.loss, params, graded, None)[0])(self.student.params)
    want = jax.grad(lambda params: self.direct(signal, params))(self.student.params)
    self.assertGreater(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)), 1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), found, want)

  @parameterized.parameters("dpo", "simpo", "verified")
  def test_without_a_success_nothing_is_learned(self, signal):
    batch = self.batch.replace(reward=np.zeros(12, np.float32),
                               old_logprobs=np.asarray(self.logprobs(self.student.params)))
    graded = opd.grade(config(signal), batch)
    self.assertFalse(np.any(graded.learn))  # so the update is skipped

  @parameterized.parameters(
      ("dpo", dict(surrogate="clipped"), "only with loss.surrogate='score_function'"),
      ("simpo", dict(updates_per_batch=2), "only with loss.updates_per_batch=1"),
      ("verified", dict(weight="position"), "only with loss.weight='uniform'"),
      ("verified", dict(dpo=dict(beta=0.2)), "loss.dpo is .*, which has no effect"),
      ("simpo", dict(success_at=0.5), "loss.success_at is 0.5, which has no effect"),
      ("simpo", dict(importance_cap=2.0), "loss.importance_cap is 2.0, which has no effect"))
  def test_what_would_be_another_loss_is_refused(self, signal, loss, message):
    with self.assertRaisesRegex(ValueError, message):
      objective.check(config(signal, **loss))

  def test_dpo_wants_its_aggregate_a_group_and_a_reference(self):
    for change, message in ((("loss.aggregate", "token_mean"), "loss.aggregate='sequence_sum'"),
                            (("rollout.group_size", 1), "group_size is 1"),
                            (("reference.source", ""), "loss.signal is dpo, which needs a ref")):
      settings = config("dpo")
      settings.update_from_flattened_dict(dict([change]))
      with self.assertRaisesRegex(ValueError, message):
        objective.check(settings)


if __name__ == "__main__":
  absltest.main()
