"""Preference losses equal a loop and push the right way."""

import math

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax.losses import masked, preference

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = RNG.normal(-20.0, 5.0, (4, 6)).astype(np.float32)
PAIRS = np.array([1, 1, 0, 1, 0, 1], bool)


def softplus(x):  # -log sigmoid(-x)
  return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values, pairs=None):
  values = [v for i, v in enumerate(values) if pairs is None or pairs[i]]
  return sum(values) / len(values)


LOSSES = {
    "dpo": (preference.dpo, (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)),
    "simpo": (preference.simpo, (CHOSEN / 10, REJECTED / 10)),
    "bradley_terry": (preference.bradley_terry, (CHOSEN / 10, REJECTED / 10)),
}


class PreferenceTest(parameterized.TestCase):

  @parameterized.product(beta=(0.05, 0.1, 1.0), smoothing=(0.0, 0.1), pairs=(None, PAIRS))
  def test_dpo_equals_a_loop(self, beta, smoothing, pairs):
    loss, metrics = jax.jit(lambda *x: preference.dpo(*x, beta, smoothing, pairs))(
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    rewards = [(beta * (float(c) - float(rc)), beta * (float(r) - float(rr))) for c, r, rc, rr in
               zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    h = [c - r for c, r in rewards]
    want = [(1 - smoothing) * softplus(-x) + smoothing * softplus(x) for x in h]
    np.testing.assert_allclose(loss, mean(want, pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/margin"], mean(h, pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/pair_accuracy"], mean([x > 0 for x in h], pairs))
    np.testing.assert_allclose(metrics["loss/chosen_reward"], mean([c for c, _ in rewards], pairs),
                               rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/rejected_reward"],
                               mean([r for _, r in rewards], pairs), rtol=1e-5)

  @parameterized.product(beta=(2.0, 10.0), margin=(0.0, 1.0), pairs=(None, PAIRS))
  def test_simpo_equals_a_loop(self, beta, margin, pairs):
    chosen, rejected = LOSSES["simpo"][1]
    loss, metrics = jax.jit(lambda *x: preference.simpo(*x, beta, margin, pairs))(chosen, rejected)
    gap = [beta * (float(c) - float(r)) for c, r in zip(chosen, rejected)]
    np.testing.assert_allclose(loss, mean([softplus(margin - g) for g in gap], pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/margin"], mean(gap, pairs), rtol=1e-4)

  @parameterized.parameters(False, True)
  def test_bradley_terry_equals_a_loop(self, some):
    pairs = PAIRS if some else None
    loss, metrics = jax.jit(lambda *x: preference.bradley_terry(*x, pairs))(CHOSEN, REJECTED)
    gap = [float(c) - float(r) for c, r in zip(CHOSEN, REJECTED)]
    np.testing.assert_allclose(loss, mean([softplus(-g) for g in gap], pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/pair_accuracy"], mean([g > 0 for g in gap], pairs))

  def test_dpo_at_the_reference_is_log_2_and_simpo_without_margin_of_equals_too(self):
    self.assertAlmostEqual(
        float(preference.dpo(CHOSEN, REJECTED, CHOSEN, REJECTED)[0]), math.log(2), places=6)
    self.assertAlmostEqual(
        float(preference.simpo(CHOSEN, CHOSEN, margin=0.0)[0]), math.log(2), places=6)
    self.assertAlmostEqual(
        float(preference.bradley_terry(CHOSEN, CHOSEN)[0]), math.log(2), places=6)

  @parameterized.parameters(*LOSSES)
  def test_descent_raises_the_chosen_and_lowers_the_rejected_equally(self, name):
    loss, args = LOSSES[name]
    chosen, rejected = jax.jit(jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1)))(*args)
    self.assertTrue(np.all(chosen < 0.0))
    np.testing.assert_allclose(rejected, -chosen, rtol=1e-6)

  @parameterized.parameters(*LOSSES)
  def test_missing_pairs_are_as_if_cut_out(self, name):
    loss, args = LOSSES[name]
    filled = [np.where(PAIRS, x, np.nan).astype(np.float32) for x in args]
    got = jax.jit(lambda *x: loss(*x, mask=PAIRS))(*filled)
    want = jax.jit(loss)(*(x[PAIRS] for x in args))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  @parameterized.product(name=tuple(LOSSES), gap=(1e4, -1e4, 0.0))
  def test_extreme_margins_are_finite(self, name, gap):
    loss, args = LOSSES[name]
    args = [args[1] + np.float32(gap), args[1], *args[3:], *args[3:]]
    (value, metrics), grad = jax.value_and_grad(lambda x: loss(x, *args[1:]), has_aux=True)(args[0])
    self.assertTrue(np.isfinite(value) and np.all(np.isfinite(grad)))
    self.assertTrue(all(np.isfinite(x) for x in metrics.values()))

  def test_simpo_takes_the_mean_log_probability_that_masked_gives(self):
    logprobs = RNG.normal(-1.0, 0.3, (4, 3)).astype(np.float32)
    mask = np.arange(3) < np.array([[3], [2], [1], [3]])
    per_token = masked.row_mean(logprobs, mask)
    loss, _ = preference.simpo(per_token[:2], per_token[2:])
    rows = [x[m].astype(np.float64).mean() for x, m in zip(logprobs, mask)]
    want = mean([softplus(1.0 - 2.0 * (rows[i] - rows[i + 2])) for i in (0, 1)])
    np.testing.assert_allclose(loss, want, rtol=1e-5)

  @parameterized.parameters(0.5, -0.1)
  def test_smoothing_that_would_turn_labels_over_is_refused(self, smoothing):
    with self.assertRaisesRegex(ValueError, f"label_smoothing is {smoothing}"):
      preference.dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, label_smoothing=smoothing)

  @parameterized.parameters(*LOSSES)
  def test_shapes_that_would_broadcast_are_refused(self, name):
    loss, args = LOSSES[name]
    with self.assertRaises(AssertionError):
      loss(args[0][:1], *args[1:])
    with self.assertRaises(AssertionError):
      loss(*args, mask=PAIRS[:1])


if __name__ == "__main__":
  absltest.main()
