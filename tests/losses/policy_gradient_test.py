"""Surrogates equal a loop, and descend what they are said to descend."""

import math

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, masked, policy_gradient, signals, weights

RNG = np.random.default_rng(3)
LOGPROBS, OLD = RNG.normal(-2.0, 0.7, (2, 3, 5)).astype(np.float32)
SIGNAL = RNG.normal(size=(3, 5)).astype(np.float32)
WEIGHT = RNG.uniform(0.5, 2.0, (3, 5)).astype(np.float32)
MASK = np.arange(5) < np.array([[3], [5], [0]])


def score_function(logprob, signal, weight):
  return -signal * weight * logprob


def clipped(logprob, old, signal, weight, low, high, dual):
  """PPO's loss of one token, by its cases."""
  ratio, advantage = math.exp(logprob - old), signal * weight
  if advantage >= 0:
    return -min(ratio, 1 + high) * advantage
  loss = -max(ratio, 1 - low) * advantage
  return loss if dual is None else min(loss, -dual * advantage)


def over_tokens(function, *arrays):
  """The loop: `function` at every token, in float64, with 0 outside the mask."""
  out = np.zeros(MASK.shape)
  for place in zip(*np.nonzero(MASK)):
    out[place] = function(*(float(x[place]) for x in arrays))
  return out


class ScoreFunctionTest(parameterized.TestCase):

  @parameterized.product(aggregate=tuple(masked.AGGREGATES), weighted=(True, False))
  def test_loss_equals_a_loop(self, aggregate, weighted):
    weight = WEIGHT if weighted else None
    loss, metrics = jax.jit(lambda x: policy_gradient.score_function_loss(
        x, SIGNAL, MASK, weight, masked.AGGREGATES[aggregate]))(LOGPROBS)
    ones = WEIGHT if weighted else np.ones_like(WEIGHT)
    each = over_tokens(score_function, LOGPROBS, SIGNAL, ones)
    rows = each.sum(axis=1)
    want = {"token_mean": rows.sum() / 8, "sequence_sum": rows.sum() / 2,
            "sequence_mean": (rows[0] / 3 + rows[1] / 5) / 2}[aggregate]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/signal"], np.mean((SIGNAL * ones)[MASK]), rtol=1e-5)

  def test_unit_weights_are_no_weights(self):
    loss = lambda weight: policy_gradient.score_function_loss(LOGPROBS, SIGNAL, MASK, weight)[0]
    self.assertEqual(loss(None), loss(np.ones_like(WEIGHT)))
    self.assertEqual(loss(None), loss(weights.uniform(LOGPROBS, SIGNAL, MASK)))

  def test_the_gradient_is_minus_signal_times_weight_over_the_count(self):
    grad = jax.grad(lambda x: policy_gradient.score_function_loss(x, SIGNAL, MASK, WEIGHT)[0])(
        LOGPROBS)
    np.testing.assert_allclose(grad, np.where(MASK, -SIGNAL * WEIGHT / 8, 0.0), rtol=1e-5)

  def test_shapes_that_would_broadcast_are_refused(self):
    for args in ((LOGPROBS, SIGNAL[:1], MASK), (LOGPROBS, SIGNAL, MASK[:1]),
                 (LOGPROBS, SIGNAL, MASK, WEIGHT[:1]), (LOGPROBS[0], SIGNAL[0], MASK[0])):
      with self.assertRaises(AssertionError):
        policy_gradient.score_function_loss(*args)


class ExpectedGradientTest(parameterized.TestCase):
  """The mean over the token drawn, taken exactly: a sum over all V, each with its probability."""

  V = 7
  student, teacher, reference, sampler = RNG.normal(size=(4, 2, 3, V)).astype(np.float32)
  mask = np.array([[1, 1, 0], [1, 1, 1]], bool)

  def expected(self, surrogate, drawn_from):
    """surrogate(log p, log p at the start, log q, log b, log mu) of one token -> [B, T]."""
    def loss(x):
      logp = jax.nn.log_softmax(x)
      others = [jax.nn.log_softmax(y) for y in (self.teacher, self.reference, self.sampler)]
      # The aggregation divides by a count, so a sum over v weighted by p(v) is the mean.
      drawn = jax.lax.stop_gradient(jnp.exp(drawn_from(logp, others)))
      return sum(surrogate(logp[..., v], *(y[..., v] for y in others), drawn[..., v])
                 for v in range(self.V))
    return jax.jit(jax.grad(loss))(self.student)

  def assert_reverse_kl_gradient(self, got, teacher=None, scale=1.0):
    teacher = self.teacher if teacher is None else teacher
    want = jax.grad(lambda x: masked.token_mean(divergences.reverse_kl(x, teacher), self.mask))(
        self.student)
    np.testing.assert_allclose(got, scale * want, atol=1e-6)

  def test_the_score_function_surrogate_has_the_reverse_kl_gradient(self):
    def surrogate(logp, logq, logb, logmu, drawn):
      return policy_gradient.score_function_loss(logp, signals.opd(logp, logq), self.mask, drawn)[0]
    self.assert_reverse_kl_gradient(self.expected(surrogate, lambda logp, _: logp))

  def test_the_clipped_surrogate_has_it_too_at_the_first_update(self):
    def surrogate(logp, logq, logb, logmu, drawn):
      return policy_gradient.clipped_surrogate_loss(
          logp, logp, signals.opd(logp, logq), self.mask, drawn, dual=3.0)[0]
    self.assert_reverse_kl_gradient(self.expected(surrogate, lambda logp, _: logp))

  def test_importance_weights_make_up_for_another_sampler(self):
    def surrogate(logp, logq, logb, logmu, drawn):
      weight = drawn * weights.truncated_importance(logp, logmu, math.inf)
      return policy_gradient.score_function_loss(
          logp, signals.opd(logp, logq), self.mask, weight)[0]
    self.assert_reverse_kl_gradient(self.expected(surrogate, lambda _, others: others[2]))

  @parameterized.parameters(0.0, 0.5, 1.25, 2.0)
  def test_g_opd_descends_the_reverse_kl_to_the_extrapolated_teacher(self, lam):
    def surrogate(logp, logq, logb, logmu, drawn):
      signal = signals.g_opd(logp, logq, logb, lam)
      return policy_gradient.score_function_loss(logp, signal, self.mask, drawn)[0]
    target = (lam * jax.nn.log_softmax(self.teacher)  # b (q / b)^lam, normalized by the softmax
              + (1 - lam) * jax.nn.log_softmax(self.reference))
    self.assert_reverse_kl_gradient(self.expected(surrogate, lambda logp, _: logp), target)


class ClippedSurrogateTest(parameterized.TestCase):

  @parameterized.product(low=(0.2, 0.5), high=(0.2, 0.28), dual=(None, 1.1, 3.0))
  def test_loss_equals_a_loop(self, low, high, dual):
    loss, metrics = jax.jit(lambda x: policy_gradient.clipped_surrogate_loss(
        x, OLD, SIGNAL, MASK, WEIGHT, low, high, dual))(LOGPROBS)
    each = over_tokens(lambda *x: clipped(*x, low, high, dual), LOGPROBS, OLD, SIGNAL, WEIGHT)
    np.testing.assert_allclose(loss, each.sum() / 8, rtol=1e-5)
    free = over_tokens(lambda x, old, a, w: -math.exp(x - old) * a * w, LOGPROBS, OLD, SIGNAL,
                       WEIGHT)
    np.testing.assert_allclose(metrics["loss/clipped"], np.mean(np.abs(each - free)[MASK] > 1e-6))
    np.testing.assert_allclose(metrics["loss/ratio_max"], np.exp(LOGPROBS - OLD)[MASK].max(),
                               rtol=1e-5)

  def test_the_data_reach_every_case(self):
    ratio = np.exp(LOGPROBS - OLD)[MASK]
    for sign in (1, -1):
      chosen = ratio[np.sign(SIGNAL[MASK]) == sign]
      self.assertTrue(np.any(chosen < 0.8) and np.any(chosen > 1.2), chosen)
    self.assertTrue(np.any(ratio[SIGNAL[MASK] < 0.0] > 3.0))  # the dual bound bites

  @parameterized.parameters(*masked.AGGREGATES)
  def test_the_first_update_descends_like_the_score_function(self, aggregate):
    kw = dict(weight=WEIGHT, aggregate=masked.AGGREGATES[aggregate])
    first = jax.grad(lambda x: policy_gradient.clipped_surrogate_loss(
        x, LOGPROBS, SIGNAL, MASK, dual=3.0, **kw)[0])(LOGPROBS)
    want = jax.grad(lambda x: policy_gradient.score_function_loss(x, SIGNAL, MASK, **kw)[0])(
        LOGPROBS)
    np.testing.assert_array_equal(first, want)

  @parameterized.parameters((0.5, 1.0, True), (-0.5, -1.0, True), (0.5, -1.0, False),
                            (-0.5, 1.0, False), (2.0, -1.0, True))
  def test_a_token_stops_teaching_where_the_clip_says(self, change, signal, stopped):
    x = np.full((1, 1), change, np.float32)
    grad = jax.grad(lambda now: policy_gradient.clipped_surrogate_loss(
        now, np.zeros_like(x), np.full_like(x, signal), np.ones((1, 1), bool), dual=3.0)[0])(x)
    self.assertEqual(bool(grad[0, 0] == 0.0), stopped)

  def test_without_bounds_it_is_the_importance_weighted_signal(self):
    loss, metrics = policy_gradient.clipped_surrogate_loss(LOGPROBS, OLD, SIGNAL, MASK, low=1.0,
                                                           high=math.inf)
    ratio = weights.truncated_importance(LOGPROBS, OLD, math.inf)
    np.testing.assert_allclose(loss, -masked.token_mean(ratio * SIGNAL, MASK), rtol=1e-5)
    self.assertEqual(metrics["loss/clipped"], 0.0)

  @parameterized.parameters(1e4, -1e4)
  def test_extreme_ratios_are_finite(self, change):
    for signal in (1.0, -1.0, 0.0):
      (loss, metrics), grad = jax.value_and_grad(
          lambda x: policy_gradient.clipped_surrogate_loss(
              x, OLD, np.full_like(OLD, signal), MASK), has_aux=True)(OLD + np.float32(change))
      self.assertTrue(np.isfinite(loss) and np.all(np.isfinite(grad)))
      self.assertTrue(all(np.isfinite(x) for x in metrics.values()))

  @parameterized.parameters(1.0, 0.5)
  def test_a_dual_bound_that_would_bite_at_ratio_1_is_refused(self, dual):
    with self.assertRaisesRegex(ValueError, f"dual is {dual}"):
      policy_gradient.clipped_surrogate_loss(LOGPROBS, OLD, SIGNAL, MASK, dual=dual)


if __name__ == "__main__":
  absltest.main()
