"""Divergences equal a loop over the vocabulary; their special cases and gradients are right."""

import functools
import math

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, masked, policy_gradient, signals

B, T, V, K = 2, 3, 7, 3
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(0.0, 2.0, (2, B, T, V)).astype(np.float32)
KLS = {"forward_kl": divergences.forward_kl, "reverse_kl": divergences.reverse_kl}


def softmax(logits):
  """float64, one column."""
  raw = [math.exp(float(x) - float(max(logits))) for x in logits]
  return [r / sum(raw) for r in raw]


def loop_kl(p, q):
  return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def loop(p, q, kind, beta):
  """The divergence of student p from teacher q, two lists of probabilities."""
  if kind == "forward_kl":
    return loop_kl(q, p)
  if kind == "reverse_kl":
    return loop_kl(p, q)
  m = [beta * b + (1 - beta) * a for a, b in zip(p, q)]
  return beta * loop_kl(q, m) + (1 - beta) * loop_kl(p, m)


def loop_topk(p, q, ids, kind, beta, tail):
  def keep(x):
    kept = [x[i] for i in ids]
    return kept + [1 - sum(kept)] if tail == "bucket" else [k / sum(kept) for k in kept]
  return loop(keep(p), keep(q), kind, beta)


def columns(student=STUDENT, teacher=TEACHER):
  for b, t in np.ndindex(student.shape[:2]):
    yield (b, t), softmax(student[b, t]), softmax(teacher[b, t])


def log_topk(logits, ids):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)


class VocabularyTest(parameterized.TestCase):

  @parameterized.parameters(("forward_kl", 0.5), ("reverse_kl", 0.5),
                            *(("jsd", beta) for beta in (0.01, 0.3, 0.5, 0.9)))
  def test_divergence_equals_a_loop(self, kind, beta):
    kernel = KLS.get(kind, functools.partial(divergences.jsd, beta=beta))
    got = jax.jit(kernel)(STUDENT, TEACHER)
    self.assertEqual(got.shape, (B, T))
    for place, p, q in columns():
      np.testing.assert_allclose(got[place], loop(p, q, kind, beta), rtol=1e-5, atol=1e-7)

  @parameterized.parameters("forward_kl", "reverse_kl", "jsd")
  def test_tokens_banned_by_both_are_as_if_they_did_not_exist(self, kind):
    kernel = jax.jit(KLS.get(kind, divergences.jsd))
    banned = np.arange(V) >= 4
    ban = lambda x: np.where(banned, -np.inf, x).astype(np.float32)
    np.testing.assert_allclose(kernel(ban(STUDENT), ban(TEACHER)),
                               kernel(STUDENT[..., :4], TEACHER[..., :4]), rtol=1e-5)

  def test_a_ban_of_one_side_is_expensive_and_its_gradient_points_away(self):
    teacher = STUDENT.copy()
    teacher[..., 2] = -np.inf
    value, grad = jax.value_and_grad(lambda x: divergences.reverse_kl(x, teacher).sum())(STUDENT)
    self.assertGreater(value, 100.0)
    self.assertTrue(np.all(grad[..., 2] > 0.0))  # descent takes mass off the token

  def test_swapping_the_models_swaps_the_kls(self):
    np.testing.assert_array_equal(divergences.forward_kl(STUDENT, TEACHER),
                                  divergences.reverse_kl(TEACHER, STUDENT))

  def test_jsd_is_symmetric_bounded_and_leans_to_forward_kl(self):
    jsd = jax.jit(divergences.jsd, static_argnums=2)
    np.testing.assert_allclose(jsd(STUDENT, TEACHER, 0.3), jsd(TEACHER, STUDENT, 0.7), rtol=1e-5)
    self.assertTrue(np.all(jsd(1e4 * STUDENT, 1e4 * TEACHER, 0.5) <= math.log(2) + 1e-6))
    with jax.enable_x64(True):  # JSD(beta) / beta -> KL(q || p); in float32 the beta is lost
      student, teacher = STUDENT.astype(np.float64), TEACHER.astype(np.float64)
      np.testing.assert_allclose(jsd(student, teacher, 1e-7) / 1e-7,
                                 divergences.forward_kl(student, teacher), rtol=1e-4)

  def test_what_is_added_to_all_logits_cancels(self):
    for kernel in (*KLS.values(), divergences.jsd):
      np.testing.assert_allclose(kernel(STUDENT + 64.0, TEACHER - 32.0), kernel(STUDENT, TEACHER),
                                 rtol=1e-4)

  @parameterized.parameters("forward_kl", "reverse_kl", "jsd")
  def test_bfloat16_logits_are_computed_in_float32(self, kind):
    kernel = jax.jit(KLS.get(kind, divergences.jsd))
    half = [jnp.bfloat16(x) for x in (STUDENT, TEACHER)]
    got = kernel(*half)
    self.assertEqual(got.dtype, jnp.float32)
    np.testing.assert_array_equal(got, kernel(*(x.astype(jnp.float32) for x in half)))

  def test_gradients_are_those_of_the_formulas(self):
    forward, reverse = (jax.jit(jax.grad(lambda x, k=k: k(x, TEACHER).sum()))(STUDENT)
                        for k in KLS.values())
    for place, p, q in columns():
      p, q = np.array(p), np.array(q)
      np.testing.assert_allclose(forward[place], p - q, atol=1e-6)
      gap = np.log(p) - np.log(q)
      np.testing.assert_allclose(reverse[place], p * (gap - np.sum(p * gap)), atol=1e-6)

  @parameterized.parameters(0.0, 1.0, -0.5, 2.0)
  def test_jsd_refuses_the_ends_where_its_formula_is_not_the_kl(self, beta):
    with self.assertRaisesRegex(ValueError, f"beta is {beta}.*forward_kl"):
      divergences.jsd(STUDENT, TEACHER, beta=beta)

  def test_shapes_that_would_broadcast_are_refused(self):
    for kernel in (*KLS.values(), divergences.jsd):
      with self.assertRaises(AssertionError):
        kernel(STUDENT, TEACHER[:1])
      with self.assertRaises(AssertionError):
        kernel(STUDENT[0], TEACHER[0])


class TopkTest(parameterized.TestCase):
  ids = np.argsort(-STUDENT, axis=-1)[..., :K]  # the student's most likely tokens

  def setUp(self):
    super().setUp()
    self.student, self.teacher = log_topk(STUDENT, self.ids), log_topk(TEACHER, self.ids)

  @parameterized.product(kind=divergences.KINDS, tail=("bucket", "renormalize"), beta=(0.3, 0.5))
  def test_topk_divergence_equals_a_loop(self, kind, tail, beta):
    kernel = jax.jit(divergences.topk_divergence, static_argnums=(2, 3, 4))
    got = kernel(self.student, self.teacher, kind, beta, tail)
    for place, p, q in columns():
      want = loop_topk(p, q, self.ids[place], kind, beta, tail)
      np.testing.assert_allclose(got[place], want, rtol=1e-4, atol=1e-6)

  @parameterized.product(kind=divergences.KINDS, tail=("bucket", "renormalize"))
  def test_k_equal_to_v_is_the_full_vocabulary(self, kind, tail):
    full = KLS.get(kind, divergences.jsd)
    def topk(x):
      return divergences.topk_divergence(jax.nn.log_softmax(x), jax.nn.log_softmax(TEACHER), kind,
                                         tail=tail)
    np.testing.assert_allclose(jax.jit(topk)(STUDENT), full(STUDENT, TEACHER), atol=2e-6)
    np.testing.assert_allclose(jax.grad(lambda x: topk(x).sum())(STUDENT),
                               jax.grad(lambda x: full(x, TEACHER).sum())(STUDENT), atol=1e-5)

  @parameterized.parameters(*divergences.KINDS)
  def test_a_bucket_is_never_negative_and_at_most_the_full_divergence(self, kind):
    full = KLS.get(kind, divergences.jsd)(STUDENT, TEACHER)
    before = np.zeros((B, T))
    for k in range(1, V + 1):  # and a finer partition sees more
      ids = np.argsort(-STUDENT, axis=-1)[..., :k]
      got = divergences.topk_divergence(log_topk(STUDENT, ids), log_topk(TEACHER, ids), kind)
      self.assertTrue(np.all((got >= before - 1e-6) & (got <= full + 1e-5)), (k, got, full))
      before = got

  def test_renormalizing_does_not_see_mass_leave_the_k_tokens(self):
    drained = self.student - 3.0
    renormalized, bucket = (
        divergences.topk_divergence(drained, self.student, "forward_kl", tail=tail)
        for tail in ("renormalize", "bucket"))
    np.testing.assert_allclose(renormalized, 0.0, atol=1e-5)
    self.assertTrue(np.all(bucket > 0.5))

  def test_other_kinds_and_tails_are_refused(self):
    with self.assertRaisesRegex(ValueError, "kind is 'kl'.*forward_kl"):
      divergences.topk_divergence(self.student, self.teacher, "kl")
    with self.assertRaisesRegex(ValueError, "tail is 'drop'.*bucket"):
      divergences.topk_divergence(self.student, self.teacher, "jsd", tail="drop")
    with self.assertRaisesRegex(ValueError, "beta is 1"):
      divergences.topk_divergence(self.student, self.teacher, "jsd", beta=1.0)
    with self.assertRaises(AssertionError):
      divergences.topk_divergence(self.student, self.teacher[..., :1], "jsd")

  @parameterized.product(kind=divergences.KINDS, tail=("bucket", "renormalize"))
  def test_as_a_detached_advantage_it_teaches_nothing_and_differentiated_it_does(self, kind, tail):
    teacher, mask = log_topk(TEACHER, self.ids), np.ones((B, T), bool)

    def divergence(x):
      return divergences.topk_divergence(log_topk(x, self.ids), teacher, kind, tail=tail)

    def expected_surrogate(x):  # the divergence of a state is the same whichever token is drawn
      logprobs = jax.nn.log_softmax(x)
      drawn = [policy_gradient.score_function_loss(
          logprobs[..., v], -divergence(x), mask,
          jax.lax.stop_gradient(jnp.exp(logprobs[..., v])))[0] for v in range(V)]
      return sum(drawn)

    detached = jax.jit(jax.grad(expected_surrogate))(STUDENT)
    direct = jax.jit(jax.grad(lambda x: masked.token_mean(divergence(x), mask)))(STUDENT)
    np.testing.assert_allclose(detached, 0.0, atol=1e-6)
    self.assertGreater(np.max(np.abs(direct)), 1e-3)


class EstimateTest(parameterized.TestCase):
  logp, logq = (np.asarray(jax.nn.log_softmax(x)) for x in (STUDENT, TEACHER))

  @parameterized.parameters("k1", "k2", "k3")
  def test_kl_estimate_equals_a_loop(self, estimator):
    p, q = self.logp[0], self.logq[0]
    got = jax.jit(divergences.kl_estimate, static_argnums=2)(p, q, estimator)
    for place in np.ndindex(p.shape):
      r = float(q[place]) - float(p[place])
      want = {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[estimator]
      np.testing.assert_allclose(got[place], want, rtol=1e-5, atol=1e-6)

  def mean(self, estimator, logp):
    """The estimate's mean over a token drawn from p, by summing over all V."""
    drawn = jax.lax.stop_gradient(jnp.exp(logp))
    each = [divergences.kl_estimate(logp[..., v], self.logq[..., v], estimator) for v in range(V)]
    return jnp.sum(drawn * jnp.stack(each, axis=-1), axis=-1)

  @parameterized.parameters("k1", "k3")
  def test_k1_and_k3_are_unbiased(self, estimator):
    np.testing.assert_allclose(self.mean(estimator, self.logp),
                               divergences.reverse_kl(STUDENT, TEACHER), rtol=1e-4, atol=1e-6)

  def test_k2_and_k3_are_never_negative(self):
    p, q = self.logp.reshape(1, -1), self.logq.reshape(1, -1)
    self.assertTrue(np.all(divergences.kl_estimate(p, q, "k2") >= 0.0))
    self.assertTrue(np.all(divergences.kl_estimate(p, q, "k3") >= -1e-7))

  @parameterized.parameters(("k1", None), ("k2", divergences.reverse_kl),
                            ("k3", divergences.forward_kl))
  def test_mean_gradient_is_the_one_the_docstring_names(self, estimator, kernel):
    got = jax.grad(lambda x: self.mean(estimator, jax.nn.log_softmax(x)).sum())(STUDENT)
    want = jax.grad(lambda x: kernel(x, TEACHER).sum())(STUDENT) if kernel else 0.0
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_other_estimators_are_refused(self):
    with self.assertRaisesRegex(ValueError, "estimator is 'k4'"):
      divergences.kl_estimate(self.logp[0], self.logq[0], "k4")

  def test_k1_of_the_student_is_minus_the_signal_of_opd(self):
    p, q = self.logp[0], self.logq[0]
    np.testing.assert_array_equal(divergences.kl_estimate(p, q, "k1"), -signals.opd(p, q))


if __name__ == "__main__":
  absltest.main()
