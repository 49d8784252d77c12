"""Signals equal a loop, and their special cases coincide."""

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax.losses import signals

RNG = np.random.default_rng(0)
STUDENT, TEACHER, REFERENCE = RNG.normal(-2.0, 1.0, (3, 3, 5)).astype(np.float32)
TEACHERS = RNG.normal(-2.0, 1.0, (4, 3, 5)).astype(np.float32)


def loop(function, *arrays):
  """function of the numbers at each place, in float64."""
  out = np.zeros(arrays[0].shape)
  for place in np.ndindex(out.shape):
    out[place] = function(*(float(x[place]) for x in arrays))
  return out


class SignalsTest(parameterized.TestCase):

  def test_opd_equals_a_loop(self):
    want = loop(lambda p, q: q - p, STUDENT, TEACHER)
    np.testing.assert_allclose(jax.jit(signals.opd)(STUDENT, TEACHER), want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(0.0, 0.5, 1.0, 1.25, 3.0)
  def test_g_opd_equals_a_loop(self, lam):
    want = loop(lambda p, q, b: lam * (q - b) - (p - b), STUDENT, TEACHER, REFERENCE)
    got = jax.jit(signals.g_opd)(STUDENT, TEACHER, REFERENCE, lam)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1.0, 1e4)
  def test_lam_1_is_opd_bit_for_bit_whatever_the_reference(self, scale):
    got = signals.g_opd(STUDENT, TEACHER, scale * REFERENCE, lam=1.0)
    np.testing.assert_array_equal(got, signals.opd(STUDENT, TEACHER))

  def test_lam_0_is_opd_towards_the_reference(self):
    got = signals.g_opd(STUDENT, TEACHER, REFERENCE, lam=0.0)
    np.testing.assert_allclose(got, signals.opd(STUDENT, REFERENCE), atol=1e-6)

  def test_a_teacher_equal_to_the_reference_is_opd_at_every_lam(self):
    got = signals.g_opd(STUDENT, TEACHER, TEACHER, lam=7.0)
    np.testing.assert_array_equal(got, signals.opd(STUDENT, TEACHER))

  def test_a_student_equal_to_its_teacher_has_nothing_to_learn(self):
    np.testing.assert_array_equal(signals.opd(TEACHER, TEACHER), 0.0)

  def test_the_default_extrapolates(self):
    np.testing.assert_array_equal(signals.g_opd(STUDENT, TEACHER, REFERENCE),
                                  signals.g_opd(STUDENT, TEACHER, REFERENCE, lam=1.25))

  def test_select_teacher_gives_each_row_the_teacher_it_names(self):
    ids = np.array([3, 0, 3])
    got = jax.jit(signals.select_teacher)(TEACHERS, ids)
    np.testing.assert_array_equal(got, np.stack([TEACHERS[n, b] for b, n in enumerate(ids)]))

  def test_one_teacher_is_no_choice(self):
    got = signals.select_teacher(TEACHERS[:1], np.zeros(3, np.int32))
    np.testing.assert_array_equal(got, TEACHERS[0])

  def test_an_unknown_teacher_is_nan_and_never_another_teacher(self):
    got = np.asarray(jax.jit(signals.select_teacher)(TEACHERS, np.array([-1, 1, 4])))
    self.assertTrue(np.all(np.isnan(got[[0, 2]])))
    np.testing.assert_array_equal(got[1], TEACHERS[1, 1])

  def test_shapes_that_would_broadcast_are_refused(self):
    for kernel, arrays in ((signals.opd, (STUDENT, TEACHER[:1])),
                           (signals.g_opd, (STUDENT, TEACHER, REFERENCE[:1])),
                           (signals.select_teacher, (TEACHERS, np.zeros(2, np.int32))),
                           (signals.group_advantage, (STUDENT[0],))):
      with self.assertRaises(AssertionError):
        kernel(*arrays)


class GroupAdvantageTest(parameterized.TestCase):
  rewards = RNG.uniform(size=(5, 4)).astype(np.float32)

  @parameterized.parameters(True, False)
  def test_group_advantage_equals_a_loop(self, normalize_std):
    got = jax.jit(signals.group_advantage, static_argnums=1)(self.rewards, normalize_std)
    for group, advantage in zip(self.rewards.astype(np.float64), got):
      mean = sum(group) / len(group)
      std = (sum((r - mean)**2 for r in group) / (len(group) - 1))**0.5
      want = [(r - mean) / (std + 1e-6 if normalize_std else 1.0) for r in group]
      np.testing.assert_allclose(advantage, want, rtol=1e-4, atol=1e-6)

  def test_a_group_sums_to_zero_and_its_scale_cancels(self):
    advantage = signals.group_advantage(self.rewards)
    np.testing.assert_allclose(np.sum(advantage, axis=1), 0.0, atol=1e-5)
    np.testing.assert_allclose(signals.group_advantage(100.0 * self.rewards - 7.0), advantage,
                               atol=1e-3)

  @parameterized.product(normalize_std=(True, False), reward=(0.0, 0.1, 1e4))
  def test_groups_of_one_and_of_equal_rewards_have_exactly_no_advantage(
      self, normalize_std, reward):
    for size in (1, 3, 7):
      got = signals.group_advantage(np.full((2, size), reward, np.float32), normalize_std)
      np.testing.assert_array_equal(got, np.zeros((2, size), np.float32))

  def test_whole_number_rewards_are_numbers(self):
    got = signals.group_advantage(np.array([[0, 1]]), normalize_std=False)
    np.testing.assert_array_equal(got, [[-0.5, 0.5]])


class VerifiedTest(parameterized.TestCase):

  @parameterized.parameters((1.0, [1, 0, 0, 0, 0, 1]), (0.5, [1, 0, 1, 1, 0, 1]))
  def test_who_reaches_success_is_learned_from_and_others_not_at_all(self, success, want):
    rewards = np.array([[1.0, 0.0, 0.5], [0.75, np.nan, 2.0]], np.float32)
    got = jax.jit(signals.verified, static_argnums=1)(rewards, success)
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_array_equal(got, np.reshape(want, rewards.shape))
    np.testing.assert_array_equal(signals.verified(rewards), signals.verified(rewards, 1.0))


if __name__ == "__main__":
  absltest.main()
