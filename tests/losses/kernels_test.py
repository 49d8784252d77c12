"""Kernels equal the float64 golden file; padding is inert; special cases coincide."""

import pathlib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.evals import metrics
from opd_jax.losses import divergences, masked, policy_gradient, signals, weights

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/kernels.npz")


def golden(name: str, dtype=jnp.float32):
  value = GOLDEN[name]
  return jnp.asarray(value, dtype if value.dtype == np.float64 else None)


def assert_matches(got, name: str, mask=None):
  got, want = np.asarray(got, np.float64), GOLDEN[name]
  error = np.abs(got - want) / (1 + np.abs(want))
  if mask is not None:
    error = error[GOLDEN["mask"].astype(bool)]
  assert error.max() <= 1e-5, f"{name}: {error.max()}"


def mask():
  return jnp.asarray(GOLDEN["mask"].astype(bool))


class GoldenTest(parameterized.TestCase):

  @parameterized.parameters(
      ("jsd_beta0.0", divergences.forward_kl, {}), ("jsd_beta1.0", divergences.reverse_kl, {}),
      ("jsd_beta0.1", divergences.jsd, {"beta": 0.1}),
      ("jsd_beta0.5", divergences.jsd, {"beta": 0.5}),
      ("jsd_beta0.9", divergences.jsd, {"beta": 0.9}))
  def test_divergences(self, name, kernel, kwargs):
    got = kernel(golden("student_logits"), golden("teacher_logits"), **kwargs)
    assert_matches(got, name, mask)

  def test_signal_of_opd_is_the_lam_1_advantage(self):
    assert_matches(signals.opd(golden("student_logps"), golden("teacher_logps")),
                   "advantage_lam1.0", mask)

  def test_truncated_importance(self):
    got = weights.truncated_importance(golden("student_logps"), golden("sampler_logps"), 2.0)
    assert_matches(got, "truncated_is_cap2", mask)

  @parameterized.parameters(("token-mean", "token_mean"), ("seq-mean-token-sum", "sequence_sum"),
                            ("seq-mean-token-mean", "sequence_mean"))
  def test_aggregations(self, theirs, ours):
    assert_matches(masked.AGGREGATES[ours](golden("jsd_beta1.0"), mask()), f"aggregate_{theirs}")

  def test_score_function_loss(self):
    student = golden("student_logps")
    loss, _ = policy_gradient.score_function_loss(
        student, signals.opd(student, golden("teacher_logps")), mask())
    assert_matches(loss, "opd_pg_loss_token_mean")

  @parameterized.parameters(1, 4, 8)
  def test_pass_at_k(self, k):
    got = [metrics.pass_at_k(int(n), int(c), k)
           for n, c in np.broadcast(GOLDEN["pass_n"], GOLDEN["pass_c"])]
    assert_matches(np.reshape(got, GOLDEN[f"pass_at_{k}"].shape), f"pass_at_{k}")


class GradientTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.logprobs, self.signal = rng.normal(size=(2, 3, 5)).astype(np.float32)
    self.mask = np.arange(5) < np.array([[3], [5], [0]])  # the last row is empty

  @parameterized.parameters(*masked.AGGREGATES)
  def test_padding_and_empty_rows_have_exactly_no_gradient_and_no_nan(self, aggregate):
    padded = np.where(self.mask, self.logprobs, -np.inf).astype(np.float32)
    loss = lambda x: policy_gradient.score_function_loss(
        x, np.where(self.mask, self.signal, np.nan), self.mask,
        aggregate=masked.AGGREGATES[aggregate])[0]
    value, grad = jax.value_and_grad(loss)(padded)
    self.assertTrue(np.isfinite(value))
    np.testing.assert_array_equal(grad[~self.mask], 0.0)
    self.assertTrue(np.all(np.asarray(grad)[self.mask] != 0.0))

  def test_no_gradient_flows_through_signal_and_weight(self):
    for kernel in (signals.opd, lambda p, q: weights.truncated_importance(p, q, 5.0)):
      grads = jax.grad(lambda p, q: kernel(p, q).sum(), argnums=(0, 1))(self.logprobs, self.signal)
      np.testing.assert_array_equal(np.stack(grads), 0.0)

  def test_the_expected_sampled_surrogate_has_the_reverse_kl_gradient(self):
    logits, teacher = np.random.default_rng(1).normal(size=(2, 1, 1, 7)).astype(np.float32)

    def expected_surrogate(x):
      logp, logq = jax.nn.log_softmax(x)[0, 0], jax.nn.log_softmax(teacher)[0, 0]
      sampled = signals.opd(logp[None], logq[None])[0]
      return -jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * sampled * logp)

    np.testing.assert_allclose(
        jax.grad(expected_surrogate)(logits),
        jax.grad(lambda x: divergences.reverse_kl(x, teacher).sum())(logits), atol=1e-6)

  @parameterized.parameters(divergences.forward_kl, divergences.reverse_kl, divergences.jsd)
  def test_divergences_survive_extreme_and_banned_logits(self, kernel):
    student = np.random.default_rng(2).normal(size=(1, 3, 8)).astype(np.float32)
    teacher = student.copy()
    student[0, 0, 0], teacher[0, 0, 1] = 1e4, -1e4
    student[0, 1, 2] = teacher[0, 1, 2] = -np.inf
    value, grad = jax.value_and_grad(lambda x: kernel(x, teacher).sum())(student)
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.all(np.isfinite(grad)))
    np.testing.assert_allclose(kernel(student, teacher)[0, 2], 0.0, atol=1e-6)  # equal: no gap

  def test_jsd_refuses_the_ends_where_its_formula_is_not_the_kl(self):
    with self.assertRaisesRegex(ValueError, "forward_kl"):
      divergences.jsd(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)), beta=0.0)


if __name__ == "__main__":
  absltest.main()
