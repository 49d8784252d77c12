"""Intervals are Student's, verdicts follow from them, and a trend breaks where it turns."""

import math

from absl.testing import absltest, parameterized
import numpy as np
from scipy import stats

from opd_jax.evals import claims
from opd_jax.evals.claims import Interval


class IntervalTest(parameterized.TestCase):

  @parameterized.parameters(2, 3, 5, 10)
  def test_it_is_scipys_and_that_of_a_table(self, n):
    x = np.random.default_rng(n).normal(0.1, 0.3, n)
    found = claims.interval(list(x))
    low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose(found, (x.mean(), low, high, n))
    quantile = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}[n]  # t, 97.5%, n - 1 degrees of freedom
    self.assertAlmostEqual((high - low) / 2, quantile * x.std(ddof=1) / n**0.5, delta=1e-3)

  def test_a_paired_difference_is_scipys_paired_test(self):
    rng = np.random.default_rng(0)
    common = rng.normal(size=8)
    a, b = (dict(enumerate(common + 0.1 * rng.normal(size=8))) for _ in range(2))
    found = claims.interval(list(claims.difference(a, b).values()))
    test = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), test)

  def test_equal_values_are_a_point_and_too_few_are_no_interval(self):
    self.assertEqual(claims.interval([0.5, 0.5, 0.5]), Interval(0.5, 0.5, 0.5, 3))
    one = claims.interval([0.5])
    self.assertEqual((one.mean, one.n), (0.5, 1))
    self.assertTrue(math.isnan(one.low) and math.isnan(one.high))
    self.assertTrue(math.isnan(claims.interval([]).mean))

  def test_only_seeds_that_both_have_are_paired(self):
    self.assertEqual(claims.difference({0: 3.0, 1: 5.0, 7: 9.0}, {1: 1.0, 0: 1.0, 3: 0.0}),
                     {0: 2.0, 1: 4.0})
    self.assertEqual(claims.share({0: 1.0, 1: 5.0, 2: 1.0}, {0: 2.0, 1: 0.0}), {0: 0.5})


class VerdictTest(parameterized.TestCase):

  @parameterized.parameters(
      (0.01, 0.05, 0.02, "reproduced"),
      (0.01, 0.05, 0.50, "reproduced"),    # less than claimed, but there
      (-0.05, -0.01, 0.02, "reversed"),
      (-0.01, 0.05, 0.02, "inconclusive"),  # holds 0 and the claimed effect
      (0.0, 0.05, 0.02, "inconclusive"),    # 0 is in it
      (-0.01, 0.02, 0.02, "inconclusive"),
      (-0.01, 0.01, 0.02, "not seen"),      # holds 0, and excludes the claimed effect
      (-0.03, 0.0, 0.02, "not seen"),
      (-0.05, -0.01, -0.02, "reproduced"),  # a claim of less
      (0.01, 0.05, -0.02, "reversed"),
      (-0.05, 0.01, -0.02, "inconclusive"),
      (-0.01, 0.01, -0.02, "not seen"),
      (math.nan, math.nan, 0.02, "open"),
  )
  def test_verdict(self, low, high, effect, word):
    self.assertEqual(claims.verdict(Interval((low + high) / 2, low, high, 5), effect), word)

  @parameterized.parameters(
      (0.95, 1.05, 1.0, "reproduced"), (0.9, 1.1, 1.0, "reproduced"),
      (0.85, 1.05, 1.0, "inconclusive"), (0.5, 1.5, 1.0, "inconclusive"),
      (0.2, 0.8, 1.0, "not seen"), (1.2, 1.3, 1.0, "not seen"),
      (-0.05, 0.02, 0.0, "reproduced"), (0.15, 0.3, 0.0, "not seen"),
      (math.nan, math.nan, 1.0, "open"))
  def test_equivalence_within_a_tenth(self, low, high, expected, word):
    found = Interval((low + high) / 2, low, high, 5)
    self.assertEqual(claims.equivalence(found, expected, 0.1), word)


class ExpertsTest(absltest.TestCase):

  def test_the_smallest_lead_counts_and_not_the_average(self):
    student = {"sort": {0: 0.9, 1: 0.8}, "count": {0: 0.5, 1: 0.75, 2: 0.9}}
    found = claims.smallest_lead(student, {"sort": 0.5, "count": 0.7})
    self.assertEqual(found.keys(), {0, 1})
    self.assertAlmostEqual(found[0], -0.2)  # wins by 0.4 in the one, loses in the other
    self.assertAlmostEqual(found[1], 0.05)
    self.assertEqual(claims.smallest_lead(student, {}), {})


class TrendTest(absltest.TestCase):

  POINTS = (0.0, 0.5, 1.0, 2.0)

  def trend(self, *rows):
    """Rows are seeds."""
    return claims.trend(self.POINTS, [dict(enumerate(column)) for column in zip(*rows)])

  def test_a_rising_measure_is_monotone(self):
    found = self.trend((1.0, 2.0, 3.0, 4.0), (1.1, 2.2, 2.9, 4.4), (0.9, 2.1, 3.3, 4.2))
    self.assertEqual((found.rho, found.breaks, found.verdict),
                     (Interval(1.0, 1.0, 1.0, 3), [], "reproduced"))
    falling = self.trend((4.0, 3.0, 2.0, 1.0), (4.4, 3.3, 2.2, 1.1))
    self.assertEqual((falling.rho.mean, falling.verdict), (-1.0, "reproduced"))

  def test_a_sure_turn_is_a_break_and_says_where(self):
    found = self.trend((1.0, 2.0, 3.0, 2.5), (1.1, 2.2, 3.1, 2.6), (0.9, 2.1, 3.2, 2.7))
    self.assertEqual([i for i, _ in found.breaks], [2])
    self.assertAlmostEqual(found.breaks[0][1].mean, -0.5)
    self.assertEqual(found.verdict, "not seen")
    self.assertGreater(found.rho.low, 0)

  def test_a_turn_within_the_noise_is_none(self):
    found = self.trend((1.0, 2.0, 3.0, 4.0), (1.1, 2.2, 3.1, 2.6), (0.9, 2.1, 3.2, 3.3))
    self.assertEqual(found.breaks, [])
    self.assertEqual(found.verdict, "reproduced" if found.rho.low > 0 else "inconclusive")

  def test_rank_correlation_is_scipys_with_ties_and_0_where_nothing_changes(self):
    x, y = [0, 1, 2, 3, 4], [3, 1, 1, 5, 4]
    self.assertAlmostEqual(claims.spearman(x, y), stats.spearmanr(x, y).statistic)
    self.assertEqual(claims.spearman(x, [2] * 5), 0.0)
    self.assertEqual(self.trend((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0)).verdict, "inconclusive")

  def test_seeds_that_a_point_lacks_are_left_out(self):
    curves = [{0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0, 5: 0.0}, {0: 3.0}, {0: 4.0, 1: 0.0}]
    found = claims.trend(self.POINTS, curves)
    self.assertEqual((found.rho.n, found.verdict), (1, "open"))


class AreaTest(absltest.TestCase):

  def test_the_faster_of_two_curves_with_the_same_ends_has_the_larger_area(self):
    slow, fast = [(0, 0.2), (50, 0.4), (100, 0.6)], [(0, 0.2), (50, 0.6), (100, 0.6)]
    self.assertAlmostEqual(claims.area(slow), 0.4)
    self.assertAlmostEqual(claims.area(fast), 0.5)
    self.assertAlmostEqual(claims.area([(0, 0.0), (10, 1.0), (100, 1.0)]), 0.95)
    self.assertTrue(math.isnan(claims.area([(100, 0.5)])))


if __name__ == "__main__":
  absltest.main()
