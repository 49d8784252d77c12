"""The length-controlled win rate against independent fits, and what a table of judgements says."""

import json
import math
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np
from scipy import optimize

from opd_jax import progress
from opd_jax.evals import judged, position_bias

# What `sample` is asked for, and scikit-learn 1.9.1's LogisticRegression(C=100,
# fit_intercept=False) of it, each pair there as a win and as a loss, weighted by the preference.
SKLEARN = ((0.4, 1.2, 60, 0.6419851472222762), (-0.8, 2.0, 40, 0.4697760514851558),
           (0.0, -1.0, 25, 0.611218009727286))


def sample(shift, slope, pairs, seed=8):
  """Preferences drawn from the model, five of them ties, and differences of length."""
  rng = np.random.default_rng(seed)
  difference = rng.integers(-200, 300, pairs).astype(float)
  p = 1 / (1 + np.exp(-shift - slope * np.tanh(difference / 120)))
  preference = (rng.random(pairs) < p).astype(float)
  preference[:5] = 0.5
  return preference, difference


def slowly(preference, difference):
  """The same fit by a simplex search over the likelihood, pair by pair."""
  mean = sum(difference) / len(difference)
  std = math.sqrt(sum((d - mean) ** 2 for d in difference) / (len(difference) - 1))

  def loss(theta):
    total = judged.RIDGE / 2 * (theta[0] ** 2 + theta[1] ** 2)
    for y, d in zip(preference, difference):
      p = 1 / (1 + math.exp(-theta[0] - theta[1] * math.tanh(d / std)))
      total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    return total

  found = optimize.minimize(loss, [0.1, -0.1], method="Nelder-Mead",
                            options=dict(xatol=1e-9, fatol=1e-12, maxiter=2000))
  return 1 / (1 + math.exp(-found.x[0]))


class LengthControlledTest(parameterized.TestCase):

  @parameterized.parameters(*SKLEARN)
  def test_it_is_scikit_learns(self, shift, slope, pairs, want):
    self.assertAlmostEqual(judged.length_controlled(*sample(shift, slope, pairs)), want, delta=1e-6)

  @parameterized.parameters((0.4, 1.2, 60), (-0.8, 2.0, 40), (0.0, -1.0, 25))
  def test_it_is_that_of_the_likelihood_written_out(self, *arguments):
    pairs = sample(*arguments, seed=3)
    self.assertAlmostEqual(judged.length_controlled(*pairs), slowly(*pairs), delta=1e-6)

  def test_a_pair_that_is_there_twice_is_two(self):
    preference, difference = sample(0.4, 1.2, 30)
    counts = np.random.default_rng(0).integers(0, 3, 30)
    twice = np.repeat(np.arange(30), counts)
    self.assertAlmostEqual(judged.length_controlled(preference, difference, counts),
                           judged.length_controlled(preference[twice], difference[twice]),
                           delta=1e-7)

  def test_where_length_explains_all_it_is_a_half(self):
    difference = np.arange(-100.0, 301.0)  # a is longer, mostly
    difference = difference[difference != 0]
    longer = (difference > 0).astype(float)
    self.assertEqual(longer.mean(), 0.75)
    self.assertAlmostEqual(judged.length_controlled(longer, difference), 0.5, delta=0.02)
    drawn = sample(0.0, 3.0, 4000)  # not always, but by nothing else
    self.assertGreater(drawn[0].mean(), 0.57)
    self.assertAlmostEqual(judged.length_controlled(*drawn), 0.5, delta=0.03)

  def test_where_length_explains_nothing_it_is_the_win_rate(self):
    preference = np.tile([1.0, 1.0, 0.0, 1.0], 50)
    difference = np.repeat([-30.0, 30.0, 10.0, -10.0, 0.0], 40)  # each with the same preferences
    self.assertAlmostEqual(judged.length_controlled(preference, difference), 0.75, delta=1e-3)
    self.assertAlmostEqual(judged.length_controlled(preference, np.zeros(200)), 0.75, delta=1e-3)

  def test_it_is_the_models_term_that_is_found(self):
    preference, difference = sample(0.7, 1.5, 20_000)
    self.assertAlmostEqual(judged.length_controlled(preference, difference),
                           1 / (1 + math.exp(-0.7)), delta=0.015)

  def test_exchanging_the_sides_exchanges_the_shares(self):
    preference, difference = sample(0.4, 1.2, 60)
    self.assertAlmostEqual(judged.length_controlled(preference, difference)
                           + judged.length_controlled(1 - preference, -difference), 1, delta=1e-7)

  def test_who_always_wins_has_nearly_all(self):
    difference = np.random.default_rng(0).normal(0, 50, 100)
    found = judged.length_controlled(np.ones(100), difference)
    self.assertBetween(found, 0.99, 1 - 1e-9)

  def test_without_pairs_or_with_one_difference_alone_it_is_undefined(self):
    self.assertTrue(np.isnan(judged.length_controlled(np.zeros(0), np.zeros(0))))
    self.assertTrue(np.isnan(judged.length_controlled(np.array([1.0, 0.0]), np.full(2, 7.0))))
    self.assertTrue(np.isnan(judged.length_controlled(
        np.array([1.0, 0.0, 1.0]), np.array([7.0, 7.0, 1.0]), np.array([3, 1, 0]))))


def row(number, preferred, flipped=False, a="aaa", b="bb", how="chosen"):
  return dict(prompt=f"p{number}", a=a, b=b, flipped=flipped, preferred=preferred, how=how)


class StudyTest(absltest.TestCase):

  def test_a_table_by_hand(self):
    rows = [row(0, "a", False, a="a" * 9), row(1, "b", False, b="b" * 8), row(2, "b", True),
            row(3, "tie", True), row(4, "tie", how="same", a="x", b="x"),
            row(5, None, how="refused"), row(6, None, how="unreadable"), row(7, "a", True, a="a")]
    with mock.patch.object(position_bias, "RESAMPLES", 50):
      found = judged.study(rows, 0)
    means = found["means"]
    # a, b, b, half, half, a
    self.assertAlmostEqual(means["win rate"]["mean"], 3 / 6)
    self.assertEqual(means["win rate"]["prompts"], 6)
    # first: a of row 0, b of row 2, half of row 3; second: b of row 1, a of row 7. Row 4: not asked
    self.assertAlmostEqual(means["shown first preferred"]["mean"], 2.5 / 5)
    self.assertEqual(means["shown first preferred"]["prompts"], 5)
    self.assertEqual(found["preferred"], dict(a=2, b=2, tie=2, unread=2))
    self.assertEqual(found["how"], dict(chosen=5, same=1, refused=1, unreadable=1))
    self.assertEqual(found["unread"], [dict(prompt="p5", how="refused"),
                                       dict(prompt="p6", how="unreadable")])
    known = [0, 1, 2, 3, 4, 7]
    controlled = means["length-controlled win rate"]
    self.assertAlmostEqual(controlled["mean"], slowly(
        [1.0, 0.0, 0.0, 0.5, 0.5, 1.0], [len(rows[i]["a"]) - len(rows[i]["b"]) for i in known]),
                           delta=1e-6)
    self.assertLess(controlled["low"], controlled["mean"])
    self.assertLess(controlled["mean"], controlled["high"])
    json.dumps(found, allow_nan=False)
    text = "\n".join(judged.notes(found))
    self.assertIn("no preference of 2 of 8 prompts: 1 refused (p5); 1 unreadable (p6)", text)
    self.assertIn("1 pairs are of one text", text)

  def test_a_judge_that_goes_by_the_place_alone_is_seen(self):
    flipped = np.random.default_rng(0).random(200) < 0.5
    rows = [row(i, "b" if flip else "a", bool(flip), a="a" * (i % 7)) for i, flip in
            enumerate(flipped)]
    with mock.patch.object(position_bias, "RESAMPLES", 50):
      means = judged.study(rows, 0)["means"]
    self.assertEqual(means["shown first preferred"]["low"], 1.0)
    self.assertAlmostEqual(means["win rate"]["mean"], 0.5, delta=0.1)

  def test_nothing_that_can_be_read_is_said_to_be_so(self):
    with mock.patch.object(position_bias, "RESAMPLES", 50):
      found = judged.study([row(i, None, how="unreadable") for i in range(5)], 0)
    self.assertEqual([x["mean"] for x in found["means"].values()], [None] * 3)
    text = "\n".join(judged.notes(found))
    self.assertIn("5 unreadable (p0, p1, p2, ...)", text)
    self.assertIn("no length-controlled win rate: nothing was preferred", text)
    with mock.patch.object(progress, "table") as table:
      judged.report(found)
    self.assertEqual(table.call_args.args[2][0], ["win rate", "-", "0"])


if __name__ == "__main__":
  absltest.main()
