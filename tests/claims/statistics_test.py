"""Intervals are Student's, verdicts follow from them, and a trend breaks where it turns."""

import math

from absl.testing import absltest, parameterized
import numpy as np
from scipy import stats

from opd_jax.claims import statistics
from opd_jax.claims.statistics import Interval


class IntervalTest(parameterized.TestCase):

  @parameterized.parameters(2, 3, 5, 10)
  def test_it_is_scipys_and_that_of_a_table(self, n):
    x = np.random.default_rng(n).normal(0.1, 0.3, n)
    found = statistics.interval(list(x))
    low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose(found, (x.mean(), low, high, n))
    quantile = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}[n]  # t, 97.5%, n - 1 degrees of freedom
    self.assertAlmostEqual((high - low) / 2, quantile * x.std(ddof=1) / n**0.5, delta=1e-3)

  def test_a_paired_difference_is_scipys_paired_test(self):
    rng = np.random.default_rng(0)
    common = rng.normal(size=8)
    a, b = (dict(enumerate(common + 0.1 * rng.normal(size=8))) for _ in range(2))
    found = statistics.interval(list(statistics.difference(a, b).values()))
    test = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), test)

  @parameterized.parameters((10, 5), (5, 10), (2, 3))
  def test_an_unpaired_difference_is_scipys_welch_test(self, n, m):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.3, 0.1, n), rng.normal(0.1, 0.4, m)
    found = statistics.welch(list(a), list(b))
    test = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(found, (a.mean() - b.mean(), *test, min(n, m)))

  def test_an_unpaired_difference_needs_two_of_each_and_may_be_a_point(self):
    self.assertTrue(math.isnan(statistics.welch([0.5, 0.6], [0.1]).low))
    self.assertTrue(math.isnan(statistics.welch([], []).mean))
    self.assertEqual(statistics.welch([0.5, 0.5], [0.25] * 3), Interval(0.25, 0.25, 0.25, 2))

  def test_an_independent_error_is_added_in_quadrature(self):
    found = statistics.widened(Interval(0.1, 0.07, 0.13, 5), 0.04 / 1.959964)
    np.testing.assert_allclose(found, (0.1, 0.05, 0.15, 5), rtol=1e-5)
    self.assertEqual(statistics.widened(Interval(0.5, 0.25, 0.75, 5), 0.0),
                     Interval(0.5, 0.25, 0.75, 5))
    self.assertTrue(math.isnan(statistics.widened(Interval(0.1, math.nan, math.nan, 1), 0.1).low))

  def test_equal_values_are_a_point_and_too_few_are_no_interval(self):
    self.assertEqual(statistics.interval([0.5, 0.5, 0.5]), Interval(0.5, 0.5, 0.5, 3))
    one = statistics.interval([0.5])
    self.assertEqual((one.mean, one.n), (0.5, 1))
    self.assertTrue(math.isnan(one.low) and math.isnan(one.high))
    self.assertTrue(math.isnan(statistics.interval([]).mean))

  def test_only_seeds_that_both_have_are_paired(self):
    self.assertEqual(statistics.difference({0: 3.0, 1: 5.0, 7: 9.0}, {1: 1.0, 0: 1.0, 3: 0.0}),
                     {0: 2.0, 1: 4.0})
    self.assertEqual(statistics.share({0: 1.0, 1: 5.0, 2: 1.0}, {0: 2.0, 1: 0.0}), {0: 0.5})


class VerdictTest(parameterized.TestCase):

  @parameterized.parameters(
      (0.01, 0.05, 0.02, "reproduced"),
      (0.01, 0.05, 0.50, "reproduced, smaller than claimed"),
      (-0.05, -0.01, 0.02, "reversed"),
      (-0.01, 0.05, 0.02, "inconclusive"),  # holds 0 and the claimed effect
      (0.0, 0.05, 0.02, "inconclusive"),    # 0 is in it
      (-0.01, 0.02, 0.02, "inconclusive"),
      (-0.01, 0.01, 0.02, "not seen"),      # holds 0, and excludes the claimed effect
      (-0.03, 0.0, 0.02, "not seen"),
      (-0.05, -0.01, -0.02, "reproduced"),  # a claim of less
      (-0.02, -0.01, -0.03, "reproduced, smaller than claimed"),
      (0.01, 0.05, -0.02, "reversed"),
      (-0.05, 0.01, -0.02, "inconclusive"),
      (-0.01, 0.01, -0.02, "not seen"),
      (math.nan, math.nan, 0.02, "open"),
  )
  def test_verdict(self, low, high, effect, word):
    self.assertEqual(statistics.verdict(Interval((low + high) / 2, low, high, 5), effect), word)

  @parameterized.parameters(
      (0.95, 1.05, 1.0, "reproduced"), (0.9, 1.1, 1.0, "reproduced"),
      (0.85, 1.05, 1.0, "inconclusive"), (0.5, 1.5, 1.0, "inconclusive"),
      (0.2, 0.8, 1.0, "not seen"), (1.2, 1.3, 1.0, "not seen"),
      (-0.05, 0.02, 0.0, "reproduced"), (0.15, 0.3, 0.0, "not seen"),
      (math.nan, math.nan, 1.0, "open"))
  def test_equivalence_within_a_tenth(self, low, high, expected, word):
    found = Interval((low + high) / 2, low, high, 5)
    self.assertEqual(statistics.equivalence(found, expected, 0.1), word)


class ExpertsTest(absltest.TestCase):

  def beats(self, sort, count, effect=0.01, error=0.0):
    """What values by seed of a student say; `error` is of the expert in `count`."""
    student = {"sort": dict(enumerate(sort)), "count": dict(enumerate(count))}
    return statistics.beats_all(student, {"sort": (0.5, 0.0), "count": (0.7, error)}, effect)

  def test_all_must_be_beaten_and_not_the_average(self):
    high, low = (0.88, 0.9, 0.92), (0.74, 0.75, 0.76)
    self.assertEqual(self.beats(high, low), "reproduced")
    self.assertEqual(self.beats(high, (0.6, 0.61, 0.62)), "reversed")    # by 0.4, and by -0.09
    self.assertEqual(self.beats(high, (0.6, 0.7, 0.8)), "inconclusive")
    self.assertEqual(self.beats(high, (0.6, 0.7, 0.8), effect=0.5), "not seen")
    self.assertEqual(self.beats(high, low, effect=0.2), "reproduced, smaller than claimed")
    self.assertEqual(self.beats((0.9,), (0.9,)), "open")
    self.assertEqual(statistics.beats_all({}, {}, 0.01), "open")

  def test_the_experts_own_error_widens_every_lead(self):
    sort, count = (0.88, 0.9, 0.92), (0.74, 0.75, 0.76)
    self.assertEqual(self.beats(sort, count, error=0.02), "reproduced")
    self.assertEqual(self.beats(sort, count, error=0.03), "inconclusive")
    found = statistics.lead({0: 0.74, 1: 0.76}, 0.7, 0.01)
    half = math.hypot(12.706 * 0.01, 1.96 * 0.01)  # t of 1; the standard error of 2 seeds is 0.01
    np.testing.assert_allclose(found, (0.05, 0.05 - half, 0.05 + half, 2), atol=1e-4)

  def test_one_domain_that_loses_is_held_to_a_level_for_all_of_them(self):
    sort, count = (0.88, 0.9, 0.92), (0.66, 0.67, 0.682)
    at = lambda level: statistics.lead(dict(enumerate(count)), 0.7, 0.0, level)
    self.assertLess(at(0.95).high, 0)
    self.assertGreater(at(0.975).high, 0)
    self.assertEqual(self.beats(sort, count, effect=0.05), "not seen")
    self.assertEqual(statistics.beats_all({"count": dict(enumerate(count))}, {"count": (0.7, 0.0)},
                                      0.05), "reversed")

  def test_a_student_that_equals_its_experts_is_seldom_reversed(self):
    # The smallest of its 5 noisy leads lies below 0 nearly always: that would be "reversed".
    rng, words, below = np.random.default_rng(0), [], 0
    experts = dict.fromkeys("abcde", (0.5, 0.0))
    for _ in range(200):
      student = {domain: dict(enumerate(rng.normal(0.5, 0.02, 10))) for domain in experts}
      words.append(statistics.beats_all(student, experts, 0.01))
      smallest = [min(values[seed] - 0.5 for values in student.values()) for seed in range(10)]
      below += statistics.interval(smallest).high < 0
    self.assertGreater(below, 190)
    self.assertLess(words.count("reversed"), 200 * 0.05)
    self.assertEqual(words.count("reproduced"), 0)


class TrendTest(absltest.TestCase):

  POINTS = (0.0, 0.5, 1.0, 2.0)

  def trend(self, *rows):
    """Rows are seeds."""
    return statistics.trend(self.POINTS, [dict(enumerate(column)) for column in zip(*rows)])

  def test_a_rising_measure_is_monotone(self):
    found = self.trend((1.0, 2.0, 3.0, 4.0), (1.1, 2.2, 2.9, 4.4), (0.9, 2.1, 3.3, 4.2))
    self.assertEqual((found.rho, found.direction), (Interval(1.0, 1.0, 1.0, 3), "rises"))
    self.assertEqual([i for i, _ in found.steps], [0])  # of the others the noise is too large
    falling = self.trend((4.0, 3.0, 2.0, 1.0), (4.4, 3.3, 2.2, 1.1))
    self.assertEqual((falling.rho.mean, falling.direction), (-1.0, "falls"))

  def test_a_sure_turn_says_where(self):
    found = self.trend((1.0, 2.0, 3.0, 2.5), (1.1, 2.2, 3.1, 2.6), (0.9, 2.1, 3.2, 2.7))
    self.assertEqual([i for i, _ in found.steps], [0, 1, 2])
    self.assertAlmostEqual(found.steps[2][1].mean, -0.5)
    self.assertEqual(found.direction, "turns")
    self.assertGreater(found.rho.low, 0)
    # At 5% over three steps.
    wanted = statistics.interval([1.0, 0.9, 1.1], 1 - 0.05 / 3)
    np.testing.assert_allclose(found.steps[1][1], wanted)

  def test_up_and_down_again_turns_though_no_way_prevails(self):
    rows = [(1.0, 2.5, 2.0, 1.2), (1.1, 2.7, 2.1, 0.9), (0.9, 2.5, 2.0, 1.1)]
    found = self.trend(*rows)
    self.assertLess(found.rho.low, 0)
    self.assertGreater(found.rho.high, 0)
    self.assertEqual((found.direction, [i for i, _ in found.steps]), ("turns", [0, 1, 2]))
    mirrored = self.trend(*[[-x for x in row] for row in rows])
    self.assertEqual((mirrored.direction, [i for i, _ in mirrored.steps]), ("turns", [0, 1, 2]))

  def test_one_sure_step_is_no_turn_whatever_the_sign_of_no_trend(self):
    for sign in (1.0, -1.0):
      found = self.trend(*[[sign * x for x in row] for row in (
          (2.0, 1.0, 1.0, 2.1), (2.0, 1.1, 1.4, 1.1), (2.0, 0.9, 1.9, 3.9))])
      self.assertBetween(0.0, found.rho.low, found.rho.high)
      self.assertGreaterEqual(found.rho.low, -1.0)
      self.assertEqual((found.direction, [i for i, _ in found.steps]), ("unclear", [0]))

  def test_a_turn_within_the_noise_is_none(self):
    found = self.trend((1.0, 2.0, 3.0, 4.0), (1.1, 2.2, 3.1, 2.6), (0.9, 2.1, 3.2, 3.3))
    self.assertNotIn(2, [i for i, _ in found.steps])
    self.assertEqual(found.direction, "rises" if found.rho.low > 0 else "unclear")

  def test_rank_correlation_is_scipys_with_ties_and_0_where_nothing_changes(self):
    x, y = [0, 1, 2, 3, 4], [3, 1, 1, 5, 4]
    self.assertAlmostEqual(statistics.spearman(x, y), stats.spearmanr(x, y).statistic)
    self.assertEqual(statistics.spearman(x, [2] * 5), 0.0)
    self.assertEqual(self.trend((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0)).direction, "unclear")

  def test_seeds_that_a_point_lacks_are_left_out(self):
    curves = [{0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0, 5: 0.0}, {0: 3.0}, {0: 4.0, 1: 0.0}]
    found = statistics.trend(self.POINTS, curves)
    self.assertEqual((found.rho.n, found.direction), (1, "open"))


if __name__ == "__main__":
  absltest.main()
