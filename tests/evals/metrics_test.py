"""Accuracy over samples and the share of a gap recovered, at their edges.

That pass@k counts subsets is in evals_test, the golden keys in losses/golden_test.
"""

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax.evals import metrics


class PassAtKTest(parameterized.TestCase):

  def test_pass_at_1_is_the_share_of_correct_samples(self):
    for n, c in ((1, 0), (1, 1), (7, 3), (1000, 1)):
      self.assertAlmostEqual(metrics.pass_at_k(n, c, 1), c / n)

  def test_it_rises_with_k_from_0_to_1_and_no_further(self):
    curve = [metrics.pass_at_k(16, 5, k) for k in range(1, 17)]
    self.assertTrue(np.all(np.diff(curve) >= 0.0))
    self.assertEqual(curve[11:], [1.0] * 5)  # 12 of 16 cannot all be among the 11 wrong ones
    self.assertEqual(metrics.pass_at_k(16, 0, 16), 0.0)

  def test_many_samples_do_not_overflow(self):
    # 1 - C(9900, 5000) / C(10000, 5000), where the binomials themselves overflow.
    self.assertAlmostEqual(metrics.pass_at_k(10_000, 100, 5_000), 1.0)
    self.assertAlmostEqual(metrics.pass_at_k(10_000, 1, 5_000), 0.5)

  @parameterized.parameters((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5))
  def test_impossible_counts_are_refused(self, n, c, k):
    with self.assertRaisesRegex(ValueError, f"found n={n}, c={c}, k={k}"):
      metrics.pass_at_k(n, c, k)


class MeanAtKTest(absltest.TestCase):

  def test_each_prompt_has_the_mean_of_its_own_samples(self):
    rewards = np.random.default_rng(0).uniform(size=(3, 4))
    want = [sum(row) / len(row) for row in rewards.tolist()]
    np.testing.assert_allclose(metrics.mean_at_k(rewards), want)

  def test_for_verdicts_it_is_pass_at_1(self):
    verdicts = np.array([[1, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(metrics.mean_at_k(verdicts),
                               [metrics.pass_at_k(4, c, 1) for c in (2, 0)])


class PerformanceGapRecoveredTest(absltest.TestCase):

  def test_the_teacher_is_0_the_ceiling_1_and_half_way_a_half(self):
    curve = metrics.performance_gap_recovered(-2.0, np.array([-2.0, 1.0, 4.0]), 4.0)
    np.testing.assert_allclose(curve, [0.0, 0.5, 1.0])

  def test_a_student_outside_the_gap_is_outside_0_and_1(self):
    self.assertAlmostEqual(metrics.performance_gap_recovered(0.2, 0.1, 0.8), -1 / 6)
    self.assertAlmostEqual(metrics.performance_gap_recovered(0.2, 1.1, 0.8), 1.5)

  def test_no_gap_is_refused(self):
    for strong in (0.5, 0.3, float("nan")):
      with self.assertRaisesRegex(ValueError, f"weak scores 0.5, strong {strong}: there is no gap"):
        metrics.performance_gap_recovered(0.5, 0.7, strong)


if __name__ == "__main__":
  absltest.main()
