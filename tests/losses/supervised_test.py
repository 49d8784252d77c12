"""Likelihood losses equal a loop, and coincide where they should."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, masked, supervised, weights

RNG = np.random.default_rng(0)
LOGPROBS = RNG.normal(-2.0, 1.0, (3, 4, 5)).astype(np.float32)  # [P, G, T]
LENGTHS = np.array([[5, 3, 1, 2], [4, 0, 5, 1], [0, 0, 0, 0]])  # with an empty prompt
MASK = np.arange(5) < LENGTHS[..., None]
WEIGHTS = RNG.uniform(0.1, 2.0, (3, 4)).astype(np.float32)


class SftTest(parameterized.TestCase):

  @parameterized.parameters(*masked.AGGREGATES)
  def test_sft_equals_a_loop(self, aggregate):
    loss, metrics = jax.jit(lambda x: supervised.sft(x, MASK[0], masked.AGGREGATES[aggregate]))(
        LOGPROBS[0])
    rows = [[-float(v) for v in row[:n]] for row, n in zip(LOGPROBS[0], LENGTHS[0])]
    total = sum(map(sum, rows))
    want = {"token_mean": total / 11, "sequence_sum": total / 4,
            "sequence_mean": sum(sum(row) / len(row) for row in rows) / 4}[aggregate]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/nll"], total / 11, rtol=1e-5)

  def test_sft_is_forward_kl_to_a_teacher_that_is_sure_of_the_data(self):
    logits = RNG.normal(size=(4, 5, 7)).astype(np.float32)
    tokens = RNG.integers(0, 7, (4, 5))
    sure = np.where(np.eye(7, dtype=bool)[tokens], 0.0, -np.inf).astype(np.float32)

    def sft(x):
      logprobs = jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], -1)[..., 0]
      return supervised.sft(logprobs, MASK[0])[0]

    kl = lambda x: masked.token_mean(divergences.forward_kl(x, sure), MASK[0])
    np.testing.assert_allclose(sft(logits), kl(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(sft)(logits), jax.grad(kl)(logits), atol=1e-6)


class WeightedSftTest(parameterized.TestCase):

  def test_weighted_sft_equals_a_loop(self):
    loss, metrics = jax.jit(supervised.weighted_sft)(LOGPROBS, MASK, WEIGHTS)
    terms, nll = [], []
    for p, k in np.ndindex(LENGTHS.shape):
      real = [float(v) for v in LOGPROBS[p, k, :LENGTHS[p, k]]]
      nll += [-v for v in real]
      if real:
        terms.append(-float(WEIGHTS[p, k]) * sum(real))
    np.testing.assert_allclose(loss, sum(terms) / len(terms), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/nll"], sum(nll) / len(nll), rtol=1e-5)

  def test_equal_weights_are_the_sft_of_whole_responses(self):
    flat = lambda x: x.reshape(-1, x.shape[-1])
    got, _ = supervised.weighted_sft(LOGPROBS, MASK, np.ones_like(WEIGHTS))
    want, _ = supervised.sft(flat(LOGPROBS), flat(MASK), masked.sequence_sum)
    self.assertEqual(got, want)

  def test_weights_of_ratio_0_are_equal_weights(self):
    uniform = weights.self_normalized(RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4)), ratio=0.0)
    np.testing.assert_allclose(supervised.weighted_sft(LOGPROBS, MASK, uniform)[0],
                               supervised.weighted_sft(LOGPROBS, MASK, np.ones((3, 4)))[0],
                               rtol=1e-6)

  @parameterized.parameters(([1.0, 1.0, 1.0, 1.0], 4.0), ([4.0, 0.0, 0.0, 0.0], 1.0),
                            ([2.0, 2.0, 0.0, 0.0], 2.0), ([0.0, 0.0, 0.0, 0.0], 0.0))
  def test_effective_responses_says_how_many_share_the_weight(self, row, effective):
    _, metrics = supervised.weighted_sft(LOGPROBS[:2], MASK[:2], np.array([row, row], np.float32))
    self.assertAlmostEqual(float(metrics["loss/effective_responses"]), effective, places=4)

  def test_a_response_descends_by_its_weight(self):
    grad = jax.grad(lambda x: supervised.weighted_sft(x, MASK, WEIGHTS)[0])(LOGPROBS)
    want = np.where(MASK, -WEIGHTS[..., None] / np.sum(LENGTHS > 0), 0.0)
    np.testing.assert_allclose(grad, want, rtol=1e-6)

  def test_shapes_that_would_broadcast_are_refused(self):
    for args in ((LOGPROBS, MASK, WEIGHTS[:1]), (LOGPROBS, MASK[:1], WEIGHTS),
                 (LOGPROBS[0], MASK[0], WEIGHTS)):
      with self.assertRaises(AssertionError):
        supervised.weighted_sft(*args)
    with self.assertRaises(AssertionError):
      supervised.sft(LOGPROBS[0], MASK[0][:1])


if __name__ == "__main__":
  absltest.main()
