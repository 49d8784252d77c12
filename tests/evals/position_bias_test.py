"""Responses are cut, finished and summed up as said, against plain loops."""

import fractions
import math

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax.evals import position_bias

P, G, K, T = 4, 3, 2, 12


def rollouts(seed=0):
  """Rows r = 0..P*G-1 of prompt r mod P, of 1 to T tokens that tell the rows apart."""
  rng = np.random.default_rng(seed)
  lengths = np.array([1, T, 2, *rng.integers(1, T + 1, P * G - 3)])
  return lengths, [list(range(100 * r, 100 * r + n)) for r, n in enumerate(lengths)]


class CutTest(parameterized.TestCase):

  @parameterized.parameters(0.0, 0.07, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
  def test_it_keeps_the_ceiling_and_never_the_last_token(self, fraction):
    lengths = np.arange(1, 201)
    exact = fractions.Fraction(str(fraction))
    want = [min(math.ceil(exact * n), n - 1) for n in range(1, 201)]
    np.testing.assert_array_equal(position_bias.cut(lengths, fraction), want)

  @parameterized.parameters(-0.1, 1.01)
  def test_other_fractions_are_refused(self, fraction):
    with self.assertRaisesRegex(ValueError, f"fraction is {fraction}"):
      position_bias.cut(np.array([3]), fraction)


class RescueTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.lengths, self.responses = rollouts()
    self.prompts = [[-1 - r % P] for r in range(P * G)]
    self.judged = []

  def judge(self, responses, each):
    self.assertLen(responses, each * P * G)
    self.judged.append([list(x) for x in responses])
    return np.array([sum(x) % 2 for x in responses], float)

  def rescue(self, cuts, **finishers):
    return position_bias.rescue(self.prompts, self.responses, cuts, K, T, finishers, self.judge)

  def test_who_finishes_a_prefix_as_the_student_did_has_its_verdict_at_every_cut(self):
    cuts, calls = (0.0, 0.1, 0.5, 0.9), []

    def repeat(asked, limits, call):
      calls.append(call)
      rows = [self.responses[r] for r in range(P * G) for _ in range(K)]
      counts = position_bias.cut(self.lengths, cuts[call - 1])
      np.testing.assert_array_equal(limits, np.repeat(T - counts, K))
      self.assertGreaterEqual(min(limits), 1)
      for row, prompt in enumerate(asked):
        n = counts[row // K]
        self.assertEqual(prompt, [*self.prompts[row // K], *rows[row][:n]])
      return [row[n:] for row, n in zip(rows, np.repeat(counts, K))]

    found = self.rescue(cuts, student=repeat)["student"]
    own = np.array([sum(x) % 2 for x in self.responses], float)
    np.testing.assert_array_equal(found, np.broadcast_to(own[:, None], (4, P * G, K)))
    self.assertEqual(calls, [1, 2, 3, 4])  # each its own random numbers
    for whole in self.judged[1:]:  # put together as ids, each as often as it was finished
      self.assertEqual(whole, [x for x in self.responses for _ in range(K)])

  def test_nobody_finishes_a_whole_response(self):
    def never(*_):
      raise AssertionError("asked")

    found = self.rescue((1.0,), student=never, teacher=never)
    own = [[sum(x) % 2] * K for x in self.responses]
    np.testing.assert_array_equal(found["student"], [own])
    np.testing.assert_array_equal(found["teacher"], [own])


class SumsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(1)
    self.lengths, _ = rollouts()
    self.mask = np.arange(T) < self.lengths[:, None]
    self.columns = {name: np.where(self.mask, rng.normal(size=self.mask.shape), np.nan)
                    for name in ("reverse_kl", "student", "teacher")}
    self.draws = position_bias.resample(P, seed=0)

  def test_deciles_and_prefixes_are_those_of_a_loop(self):
    found = position_bias.along(self.columns, self.mask, P, self.draws)
    gap = self.columns["student"] - self.columns["teacher"]
    for name, values in (*self.columns.items(), ("sampled_kl", gap)):
      tokens = [[] for _ in range(10)]
      for r, n in enumerate(self.lengths):
        for t in range(n):
          tokens[10 * t // n].append(values[r, t])
      want = [np.mean(x) for x in tokens] + [np.mean(sum(tokens, []))]
      np.testing.assert_allclose(found[name]["mean"], want)
    for who in ("student", "teacher"):
      want = [np.mean([self.columns[who][r, :math.ceil(k * n / 10)].sum()
                       for r, n in enumerate(self.lengths)]) for k in range(1, 11)]
      np.testing.assert_allclose(found[f"{who}_prefix"]["mean"], want)

  def test_deciles_end_where_responses_are_cut(self):
    tokens = position_bias.by_decile(np.ones(self.mask.shape), self.mask, len(self.lengths))
    for k in range(1, 10):
      kept = np.minimum(tokens[:k].sum(axis=0), self.lengths - 1)
      np.testing.assert_array_equal(position_bias.cut(self.lengths, k / 10), kept)

  @parameterized.parameters((0.3, "prefix"), (0.3, "suffix"), (0.5, "suffix"), (1.0, "prefix"))
  def test_a_share_is_that_of_a_loop(self, fraction, side):
    values = np.abs(self.columns["reverse_kl"])
    found = position_bias.share(values, self.mask, fraction, side, P, self.draws)
    part = 0.0
    for r, n in enumerate(self.lengths):
      count = math.ceil(fractions.Fraction(str(fraction)) * int(n))
      part += values[r, :count].sum() if side == "prefix" else values[r, n - count:n].sum()
    self.assertAlmostEqual(found["mean"], part / np.nansum(values))
    self.assertBetween(found["mean"], found["low"] - 1e-9, found["high"] + 1e-9)

  def test_curves_are_shares_of_all_and_of_what_ended_wrong(self):
    rng = np.random.default_rng(2)
    found = {name: rng.integers(0, 2, (3, P * G, K)).astype(float)
             for name in ("student", "teacher")}
    right = np.arange(P * G) % 3 == 0
    curves = position_bias.curves(found, right.astype(float), P, self.draws)
    for name, x in found.items():
      np.testing.assert_allclose(curves[name]["mean"], x.mean(axis=(1, 2)))
      np.testing.assert_allclose(curves[f"{name}_of_wrong"]["mean"], x[:, ~right].mean(axis=(1, 2)))
    np.testing.assert_allclose(curves["difference"]["mean"],
                               (found["teacher"] - found["student"]).mean(axis=(1, 2)))
    none = position_bias.curves(found, np.ones(P * G), P, self.draws)
    self.assertEqual(none["teacher_of_wrong"]["mean"], [None] * 3)  # nothing ended wrong

  def test_rows_belong_to_their_prompts(self):
    np.testing.assert_array_equal(position_bias.by_prompt(np.arange(6.0)[None], 3), [[3, 5, 7]])


class IntervalTest(absltest.TestCase):

  def test_it_is_the_normal_interval_for_many_prompts(self):
    rng = np.random.default_rng(3)
    sums = rng.binomial(4, rng.beta(1, 1, 400)).astype(float)
    found = position_bias.interval(sums, 4.0, position_bias.resample(400, seed=0))
    error = 1.96 * np.std(sums / 4) / 20
    self.assertAlmostEqual(found["mean"], sums.mean() / 4)
    self.assertAlmostEqual(found["low"], found["mean"] - error, delta=0.1 * error)
    self.assertAlmostEqual(found["high"], found["mean"] + error, delta=0.1 * error)

  def test_a_prompt_weighs_what_it_counts_and_the_certain_has_no_width(self):
    draws = position_bias.resample(3, seed=0)
    self.assertEqual(set(draws.sum(axis=1)), {3})
    self.assertEqual(position_bias.interval([2.0, 3.0, 0.0], [2.0, 3.0, 0.0], draws),
                     dict(mean=1.0, low=1.0, high=1.0))
    self.assertAlmostEqual(position_bias.interval([1.0, 0.0, 0.0], [1.0, 3.0, 0.0], draws)["mean"],
                           0.25)

  def test_where_nothing_is_counted_nothing_is_said(self):
    draws = position_bias.resample(2, seed=0)
    found = position_bias.interval([[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], draws)
    self.assertEqual(found, dict(mean=[1.0, None], low=[1.0, None], high=[1.0, None]))


if __name__ == "__main__":
  absltest.main()
