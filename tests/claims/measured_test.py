"""A run's numbers are computed from its files by code that counts as theirs."""

import ast
import math

from absl.testing import absltest

from opd_jax.claims import identity, measured


class AreaTest(absltest.TestCase):

  def test_the_faster_of_two_curves_with_the_same_ends_has_the_larger_area(self):
    slow, fast = [(0, 0.2), (50, 0.4), (100, 0.6)], [(0, 0.2), (50, 0.6), (100, 0.6)]
    self.assertAlmostEqual(measured.area(slow), 0.4)
    self.assertAlmostEqual(measured.area(fast), 0.5)
    self.assertAlmostEqual(measured.area([(0, 0.0), (10, 1.0), (100, 1.0)]), 0.95)
    self.assertTrue(math.isnan(measured.area([(100, 0.5)])))


class CurveTest(absltest.TestCase):

  def test_where_a_curve_is_highest_and_how_far_it_falls(self):
    curve = [(1, 0.3), (10, 0.6), (50, 0.6), (100, 0.45)]
    self.assertEqual(measured.peak(curve, 100), 0.1)
    self.assertAlmostEqual(measured.fall(curve), 0.15)
    rising = [(1, 0.3), (100, 0.6)]
    self.assertEqual((measured.peak(rising, 100), measured.fall(rising)), (1.0, 0.0))
    self.assertTrue(math.isnan(measured.fall([])))

  def test_the_error_of_a_mean_is_that_over_prompts(self):
    records = [dict(rewards=x) for x in ([0.0, 1.0], [1.0, 1.0], [0.0, 0.0])]  # 0.5, 1, 0
    self.assertAlmostEqual(measured.error(records), 0.5 / math.sqrt(3))
    self.assertTrue(math.isnan(measured.error(records[:1])))


class ReaderTest(absltest.TestCase):

  def test_no_number_comes_from_the_module_that_judges_numbers(self):
    # What is made of numbers later is no part of a cell's identity, so a cell may hold none of it.
    imported = set(identity._imported(ast.parse(identity._file(identity.READER).read_text())))
    self.assertNotIn("opd_jax.claims.statistics", imported)
    self.assertFalse(hasattr(measured, "claims"))
    self.assertNotIn(identity.READER, identity.APART)


if __name__ == "__main__":
  absltest.main()
