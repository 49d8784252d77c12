"""Weights equal a loop, keep to their bounds, and coincide where they should."""

import fractions
import math

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax.losses import weights

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(-2.0, 1.0, (2, 4, 6)).astype(np.float32)
MASK = np.arange(6) < np.array([[6], [3], [0], [1]])


def iw_loop(student, teacher, mask, most, signed, unit_mean):
  """METHODS 3, row by row in float64."""
  out = np.ones(mask.shape)
  for b in range(len(mask)):
    real = [t for t in range(mask.shape[1]) if mask[b, t]]
    gap = [float(teacher[b, t]) - float(student[b, t]) for t in real]
    gap = gap if signed else [abs(d) for d in gap]
    for i, t in enumerate(real):
      drifted = sum(gap[:i]) / (sum(gap) + 1e-8)
      out[b, t] = 1 + (most - 1) * min(max(1 - drifted, 0), 1)
    if unit_mean and real:
      out[b, real] /= np.mean(out[b, real])
  return out


class IwOpdTest(parameterized.TestCase):

  @parameterized.product(most=(1.0, 1.5, 4.0), signed=(False, True), unit_mean=(False, True))
  def test_iw_opd_equals_a_loop(self, most, signed, unit_mean):
    kernel = jax.jit(weights.iw_opd, static_argnums=(3, 4, 5))
    got = kernel(STUDENT, TEACHER, MASK, most, signed, unit_mean)
    want = iw_loop(STUDENT, TEACHER, MASK, most, signed, unit_mean)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_the_first_token_weighs_most_and_none_weighs_more_than_the_one_before(self):
    got = np.asarray(weights.iw_opd(STUDENT, TEACHER, MASK, max_weight=2.0))
    np.testing.assert_allclose(got[MASK.any(axis=1), 0], 2.0)
    self.assertTrue(np.all(np.diff(got[0]) <= 0.0))
    self.assertTrue(np.all((got >= 1.0) & (got <= 2.0)))

  def test_max_weight_1_is_no_weight(self):
    np.testing.assert_array_equal(weights.iw_opd(STUDENT, TEACHER, MASK, max_weight=1.0),
                                  weights.uniform(STUDENT, TEACHER, MASK))

  @parameterized.parameters(True, False)
  def test_a_student_equal_to_its_teacher_has_not_drifted(self, signed):
    got = weights.iw_opd(TEACHER, TEACHER, MASK, signed=signed)
    np.testing.assert_array_equal(got, np.where(MASK, np.float32(1.5), 1.0))

  def test_unit_mean_leaves_the_learning_rate_alone(self):
    got = np.asarray(weights.iw_opd(STUDENT, TEACHER, MASK, max_weight=5.0, unit_mean=True))
    for row in (0, 1, 3):
      np.testing.assert_allclose(got[row, MASK[row]].mean(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(got[~MASK], 1.0)

  @parameterized.parameters(np.nan, -np.inf, 1e30)
  def test_padding_may_hold_anything(self, filler):
    fill = lambda x: np.where(MASK, x, filler).astype(np.float32)
    kernel = jax.jit(weights.iw_opd)
    np.testing.assert_array_equal(kernel(fill(STUDENT), fill(TEACHER), MASK),
                                  kernel(STUDENT, TEACHER, MASK))

  @parameterized.product(signed=(True, False), unit_mean=(True, False))
  def test_extreme_and_banned_tokens_give_no_nan(self, signed, unit_mean):
    student = np.array([[-1.0, -2e4, -np.inf, -1.0, -np.inf, 0.0]], np.float32)
    teacher = np.array([[-np.inf, 0.0, -1.0, -2e4, -np.inf, 0.0]], np.float32)
    got = jax.jit(lambda p, q: weights.iw_opd(p, q, np.ones((1, 6), bool), signed=signed,
                                              unit_mean=unit_mean))(student, teacher)
    self.assertTrue(np.all(np.isfinite(got) & (got > 0.0)), got)

  def test_a_weight_below_one_is_refused(self):
    with self.assertRaisesRegex(ValueError, "max_weight is 0.5"):
      weights.iw_opd(STUDENT, TEACHER, MASK, max_weight=0.5)


class PositionTest(parameterized.TestCase):
  mask = np.arange(100) < np.array([[100], [11], [3], [1], [0]])

  @parameterized.product(fraction=(0.0, 0.07, 0.3, 0.5, 1 / 3, 0.9, 1.0),
                         side=("prefix", "suffix"))
  def test_position_is_the_ceiling_of_the_fraction_of_each_length(self, fraction, side):
    got = np.asarray(jax.jit(weights.position, static_argnums=(1, 2))(self.mask, fraction, side))
    for row, mask in zip(got, self.mask):
      real = np.flatnonzero(mask)
      count = math.ceil(fractions.Fraction(str(round(fraction, 9))).limit_denominator(1000)
                        * len(real))
      want = real[:count] if side == "prefix" else real[len(real) - count:]
      np.testing.assert_array_equal(np.flatnonzero(row), want)

  def test_holes_in_the_mask_are_not_counted(self):
    mask = np.array([[0, 1, 0, 1, 1, 0, 1]], bool)
    np.testing.assert_array_equal(weights.position(mask, 0.5, "prefix"), [[0, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(weights.position(mask, 0.5, "suffix"), [[0, 0, 0, 0, 1, 0, 1]])

  def test_all_of_it_is_the_mask(self):
    for side in ("prefix", "suffix"):
      np.testing.assert_array_equal(weights.position(self.mask, 1.0, side), self.mask)

  @parameterized.parameters((0.5, "middle", "middle"), (1.2, "prefix", "1.2"),
                            (-0.1, "suffix", "-0.1"))
  def test_other_sides_and_fractions_are_refused(self, fraction, side, found):
    with self.assertRaisesRegex(ValueError, found):
      weights.position(self.mask, fraction, side)


class TruncatedImportanceTest(parameterized.TestCase):

  @parameterized.parameters(0.5, 2.0, 5.0, math.inf)
  def test_truncated_importance_equals_a_loop(self, cap):
    got = jax.jit(weights.truncated_importance)(STUDENT, TEACHER, cap)
    for place in np.ndindex(STUDENT.shape):
      want = min(math.exp(float(STUDENT[place]) - float(TEACHER[place])), cap)
      np.testing.assert_allclose(got[place], want, rtol=1e-5)

  def test_agreeing_policies_weigh_exactly_one(self):
    np.testing.assert_array_equal(weights.truncated_importance(STUDENT, STUDENT, 2.0), 1.0)

  def test_ratios_stop_at_twenty_nats(self):
    now = np.array([[-2e4, 0.0, -np.inf]], np.float32)
    then = np.array([[0.0, -2e4, -1.0]], np.float32)
    np.testing.assert_allclose(weights.truncated_importance(now, then, math.inf),
                               [[math.exp(-20), math.exp(20), math.exp(-20)]], rtol=1e-5)


class SelfNormalizedTest(parameterized.TestCase):

  @parameterized.parameters(0.0, 0.5, 1.0, 3.0)
  def test_self_normalized_equals_a_loop(self, ratio):
    got = jax.jit(weights.self_normalized, static_argnums=2)(STUDENT, TEACHER, ratio)
    for weak, reference, weight in zip(STUDENT, TEACHER, got):
      raw = [math.exp(ratio * (float(a) - float(b))) for a, b in zip(weak, reference)]
      np.testing.assert_allclose(weight, [len(raw) * r / sum(raw) for r in raw], rtol=1e-5)

  def test_ratio_0_is_uniform_and_a_large_one_picks_the_best(self):
    np.testing.assert_allclose(weights.self_normalized(STUDENT, TEACHER, 0.0), 1.0, rtol=1e-6)
    best = np.argmax(STUDENT - TEACHER, axis=1)
    np.testing.assert_allclose(weights.self_normalized(STUDENT, TEACHER, 1e4),
                               6.0 * np.eye(6)[best], atol=1e-5)

  def test_log_probabilities_of_long_responses_do_not_overflow(self):
    got = weights.self_normalized(1e5 * STUDENT, 1e5 * TEACHER)
    np.testing.assert_allclose(np.mean(got, axis=1), 1.0, rtol=1e-6)

  def test_what_a_prompt_adds_to_all_its_responses_cancels(self):
    shift = np.array([[0.0], [5.0], [-80.0], [300.0]], np.float32)
    np.testing.assert_allclose(weights.self_normalized(STUDENT + shift, TEACHER),
                               weights.self_normalized(STUDENT, TEACHER), rtol=1e-3)

  def test_one_response_weighs_one(self):
    np.testing.assert_array_equal(weights.self_normalized(STUDENT[:, :1], TEACHER[:, :1]), 1.0)

  @parameterized.parameters(-1.0, math.inf, math.nan)
  def test_impossible_ratios_are_refused(self, ratio):
    with self.assertRaisesRegex(ValueError, str(ratio)):
      weights.self_normalized(STUDENT, TEACHER, ratio)


class ShapesTest(absltest.TestCase):

  def test_shapes_that_would_broadcast_are_refused(self):
    for kernel in (lambda: weights.iw_opd(STUDENT, TEACHER, MASK[:1]),
                   lambda: weights.uniform(STUDENT, TEACHER, MASK[:1]),
                   lambda: weights.truncated_importance(STUDENT, TEACHER[:1], 2.0),
                   lambda: weights.self_normalized(STUDENT, TEACHER[:1]),
                   lambda: weights.position(MASK[0], 0.5, "prefix")):
      with self.assertRaises(AssertionError):
        kernel()


if __name__ == "__main__":
  absltest.main()
