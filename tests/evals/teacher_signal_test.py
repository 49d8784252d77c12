"""The metrics are those of plain loops and of scipy; what is undefined is left out, not 0."""

import itertools
import json
import math

from absl.testing import absltest, parameterized
import numpy as np
from scipy import stats

from opd_jax.claims import markdown
from opd_jax.evals import paired, position_bias, teacher_signal

P, G = 12, 6


def candidates(seed, levels):
  """f64[n] scores in nats, some of them tied, and f64[n] rewards of `levels` different values."""
  rng = np.random.default_rng(seed)
  n = rng.integers(5, 12)
  reward = rng.integers(0, levels, n) / (levels - 1)
  reward[:2] = 0.0, 1.0  # both kinds
  return np.round(-rng.exponential(1.0, n) + reward, 1), reward


def ranks(x):
  """From 1, the mean of the places that ties would take."""
  return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def pearson(x, y):
  n = len(x)
  mean_x, mean_y = sum(x) / n, sum(y) / n
  cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
  return cov / math.sqrt(sum((a - mean_x)**2 for a in x) * sum((b - mean_y)**2 for b in y))


def tau_b(x, y):
  agree = differ = ties_x = ties_y = 0
  for (a, b), (c, d) in itertools.combinations(zip(x, y), 2):
    agree += (a - c) * (b - d) > 0
    differ += (a - c) * (b - d) < 0
    ties_x += a == c
    ties_y += b == d
  pairs = len(x) * (len(x) - 1) / 2
  return (agree - differ) / math.sqrt((pairs - ties_x) * (pairs - ties_y))


def ordered_alike(x, y):
  points = [1.0 if a > c else 0.5 if a == c else 0.0
            for (a, b), (c, d) in itertools.product(zip(x, y), repeat=2) if b > d]
  return sum(points) / len(points)


def expected_hit(x, y):
  """Over all orders of the candidates: whether the first of the best ones is right."""
  hits = []
  for order in itertools.permutations(range(len(x))):
    top = max(order, key=lambda i: x[i])
    hits.append(float(y[top] >= 1.0))
  return sum(hits) / len(hits)


class MetricsTest(parameterized.TestCase):

  @parameterized.parameters(*itertools.product(range(6), (2, 4)))
  def test_they_equal_plain_loops_and_scipy(self, seed, levels):
    score, reward = candidates(seed, levels)
    x, y = score.tolist(), reward.tolist()
    right = [float(r == 1.0) for r in y]
    found = {name: metric(score, reward) for name, metric in teacher_signal.METRICS.items()}
    wins = stats.mannwhitneyu(score[reward == 1.0], score[reward < 1.0]).statistic
    low, high = min(x), max(x)
    want = {
        "spearman": pearson(ranks(x), ranks(y)), "kendall": tau_b(x, y),
        "pairwise_accuracy": ordered_alike(x, y),
        "auc": wins / (sum(right) * (len(right) - sum(right))),
        "point_biserial": pearson(x, right),
        "brier_sigmoid": sum((1 / (1 + math.exp(-a)) - b)**2 for a, b in zip(x, right)) / len(x),
        "brier_minmax": sum(((a - low) / (high - low) - b)**2 for a, b in zip(x, right)) / len(x),
        "top1": sum(b for a, b in zip(x, right) if a == high) / x.count(high)}
    self.assertEqual(found.keys(), want.keys())
    for name in want:
      self.assertAlmostEqual(found[name], want[name], msg=name)
    if levels == 2:
      self.assertAlmostEqual(found["auc"], found["pairwise_accuracy"])

  def test_they_equal_scikit_learn(self):
    """By scikit-learn 1.9.1: roc_auc_score, and brier_score_loss of the scores as probabilities."""
    score = np.array([-0.3, -1.2, -0.7, -2.5, -0.7, -1.9, -0.1, -1.4])
    reward = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    for name, want in (("auc", 0.78125), ("brier_sigmoid", 0.25216741568399126),
                       ("brier_minmax", 0.21223958333333334)):
      self.assertAlmostEqual(teacher_signal.METRICS[name](score, reward), want, places=12)

  @parameterized.parameters(
      ([0.0, -1.0, -2.0], [1, 0, 0]), ([-2.0, -1.0, -1.0], [0, 1, 0]),
      ([-1.0, -1.0, -1.0, -3.0], [1, 0, 0, 1]), ([-1.0, -1.0, -2.0], [1, 0.5, 1]),
      ([-1.0] * 5, [1, 1, 0, 0, 0]))
  def test_a_tied_top_is_a_hit_as_often_as_a_fair_choice_is(self, score, reward):
    found = teacher_signal.top1(np.array(score), np.array(reward, float))
    self.assertAlmostEqual(found, expected_hit(score, reward))

  def test_a_score_that_follows_the_reward_is_perfect_and_its_reverse_the_opposite(self):
    score, reward = np.array([-0.1, -0.2, -1.5, -2.0]), np.array([1.0, 1.0, 0.0, 0.0])
    for name, perfect, reverse in (("pairwise_accuracy", 1, 0), ("auc", 1, 0), ("top1", 1, 0)):
      self.assertEqual(teacher_signal.METRICS[name](score, reward), perfect)
      self.assertEqual(teacher_signal.METRICS[name](-score, reward), reverse)
    graded = np.array([1.0, 0.7, 0.3, 0.0])
    for name in ("spearman", "kendall"):
      self.assertAlmostEqual(teacher_signal.METRICS[name](score, graded), 1.0)
      self.assertAlmostEqual(teacher_signal.METRICS[name](-score, graded), -1.0)
    self.assertEqual(teacher_signal.brier_minmax(reward - 1.0, reward), 0.0)
    self.assertEqual(teacher_signal.brier_minmax(-reward, reward), 1.0)

  def test_only_order_matters_to_the_metrics_of_order(self):
    score, reward = candidates(0, 3)
    for name in ("spearman", "kendall", "pairwise_accuracy", "auc", "top1"):
      metric = teacher_signal.METRICS[name]
      self.assertAlmostEqual(metric(np.exp(2.0 * score) - 7.0, reward), metric(score, reward))
    metric = teacher_signal.METRICS["brier_minmax"]
    self.assertAlmostEqual(metric(3.0 * score - 7.0, reward), metric(score, reward))

  @parameterized.parameters(
      ([-1.0, -2.0], [1, 1], {"brier_sigmoid", "brier_minmax"}),          # all right
      ([-1.0, -2.0], [0, 0], {"brier_sigmoid", "brier_minmax"}),          # all wrong
      ([-1.0, -2.0], [0.2, 0.4], {"spearman", "kendall", "pairwise_accuracy", "brier_sigmoid",
                                  "brier_minmax"}),                       # all wrong, not equally
      ([-1.0, -1.0], [1, 0], {"pairwise_accuracy", "auc", "brier_sigmoid", "top1"}),  # no opinion
      ([-1.0], [1], {"brier_sigmoid"}),                                   # one candidate
      ([], [], set()))
  def test_what_means_nothing_is_nan_and_nothing_else_is(self, score, reward, defined):
    score, reward = np.array(score, float), np.array(reward, float)
    with np.errstate(all="raise"):
      found = {name: metric(score, reward) for name, metric in teacher_signal.METRICS.items()}
    self.assertEqual({name for name, x in found.items() if not np.isnan(x)}, defined)


class StudyTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.rewards = (rng.uniform(size=(P, G)) < 0.5).astype(float)
    self.rewards[0], self.rewards[1] = 0.0, 1.0
    self.scores = {"plain": rng.normal(size=(P, G)) - 2.0,
                   "success": rng.normal(size=(P, G)) + 2.0 * self.rewards - 2.0}

  def values(self, name, metric):
    """Of each prompt, by a loop; None where it is undefined."""
    out = []
    for score, reward in zip(self.scores[name], self.rewards):
      real = ~np.isnan(np.sum([x for x in self.scores.values()], axis=0)[len(out)])
      x = teacher_signal.METRICS[metric](score[real], reward[real])
      out.append(None if np.isnan(x) else x)
    return out

  def test_undefined_prompts_are_left_out_and_counted(self):
    found = teacher_signal.study(self.scores, self.rewards)
    mixed = [p for p in range(P) if 0 < sum(self.rewards[p]) < G]
    self.assertLess(len(mixed), P - 1)
    for name in self.scores:
      auc = found["means"][name]["auc"]
      self.assertEqual(auc["prompts"], len(mixed))
      self.assertAlmostEqual(auc["mean"], np.mean([x for x in self.values(name, "auc")
                                                   if x is not None]))
      self.assertEqual(found["means"][name]["brier_sigmoid"]["prompts"], P)
    self.assertEqual((found["prompts"], found["candidates"]), (P, P * G))

  def test_differences_are_paired_and_intervals_are_scipys_bootstrap(self):
    found = teacher_signal.study(self.scores, self.rewards)
    before, after = self.values("plain", "auc"), self.values("success", "auc")
    changes = np.array([b - a for a, b in zip(before, after) if a is not None])
    gain = found["differences"]["success"]["auc"]
    self.assertEqual((found["against"], list(found["differences"])), ("plain", ["success"]))
    self.assertAlmostEqual(gain["mean"], changes.mean())
    # Prompts without a value are resampled too, which widens the interval by a little: here scipy
    # gets the ratio of the sums.
    sums, counts = np.zeros(P), np.zeros(P)
    sums[:len(changes)], counts[:len(changes)] = changes, 1.0
    want = stats.bootstrap((sums, counts), lambda x, n, axis: x.sum(axis) / n.sum(axis),
                           paired=True, n_resamples=20_000, method="percentile",
                           rng=np.random.default_rng(1)).confidence_interval
    width = want.high - want.low
    self.assertAlmostEqual(gain["low"], want.low, delta=0.06 * width)
    self.assertAlmostEqual(gain["high"], want.high, delta=0.06 * width)
    own = found["means"]["success"]["auc"]
    self.assertLess(own["low"], own["mean"])
    self.assertEqual(found, teacher_signal.study(self.scores, self.rewards))  # the seed decides

  def test_contexts_are_compared_on_the_candidates_that_have_all(self):
    self.scores["success"][2, :3] = np.nan  # these have no peer that is right
    self.scores["plain"][3, 4:] = np.nan    # a smaller group
    self.scores["success"][3, 4:] = np.nan
    self.rewards[3, 4:] = np.nan
    found = teacher_signal.study(self.scores, self.rewards)
    self.assertEqual(found["have"], {"plain": P * G - 2, "success": P * G - 5})
    self.assertEqual(found["candidates"], P * G - 5)
    for metric in teacher_signal.METRICS:
      for name in self.scores:
        defined = [x for x in self.values(name, metric) if x is not None]
        self.assertAlmostEqual(found["means"][name][metric]["mean"], np.mean(defined))
        self.assertEqual(found["means"][name][metric]["prompts"], len(defined))

  def test_where_no_prompt_counts_nothing_is_said_and_one_has_no_interval(self):
    found = teacher_signal.study(self.scores, np.ones((P, G)))
    self.assertEqual(found["means"]["success"]["auc"],
                     {"mean": None, "low": None, "high": None, "prompts": 0})
    json.dumps(found, allow_nan=False)
    one = np.ones((P, G))
    one[0, 0] = 0.0
    found = teacher_signal.study(self.scores, one)["means"]["success"]["auc"]
    self.assertEqual((found["prompts"], found["low"], found["high"]), (1, None, None))
    self.assertIsNotNone(found["mean"])

  def test_the_best_context_of_each_metric(self):
    self.scores["copy"] = self.scores["success"]
    best = teacher_signal.best(teacher_signal.study(self.scores, self.rewards))
    self.assertEqual(best["auc"], ["success", "copy"])
    self.assertEqual(best["brier_minmax"], ["success", "copy"])  # where less is better
    worse = {"plain": self.scores["success"], "success": self.scores["plain"]}
    best = teacher_signal.best(teacher_signal.study(worse, self.rewards))
    self.assertEqual((best["top1"], best["brier_minmax"]), (["plain"], ["plain"]))
    nothing = teacher_signal.best(teacher_signal.study(self.scores, np.ones((P, G))))
    self.assertEqual(nothing["auc"], [])

  def test_what_cannot_be_meant_is_refused(self):
    study = teacher_signal.study
    with self.assertRaisesRegex(ValueError, r"scores are \(12, 6\) and rewards \(12, 5\)"):
      study(self.scores, self.rewards[:, :5])
    with self.assertRaisesRegex(ValueError, r"shapes \[\(12, 5\), \(12, 6\)\]"):
      study({**self.scores, "failure": self.scores["success"][:, :5]}, self.rewards)
    with self.assertRaisesRegex(ValueError, "nothing is known of 'failure', .* there are 'plain', "):
      study(self.scores, self.rewards, against="failure")
    with self.assertRaisesRegex(ValueError, "no prompts"):
      study({"plain": np.zeros((0, G))}, np.zeros((0, G)))
    self.rewards[4, 4] = np.nan
    with self.assertRaisesRegex(ValueError, "1 candidates with a score have no reward"):
      study(self.scores, self.rewards)
    self.scores["plain"][0, 0] = -np.inf
    with self.assertRaisesRegex(ValueError, "1 scores are infinite"):
      study(self.scores, self.rewards)


class PairedTest(absltest.TestCase):

  VALUES = {"a": {"m": np.array([1.0, 0.0, np.nan]), "n": np.array([0.25] * 3)},
            "b": {"m": np.array([1.0, np.nan, np.nan]), "n": np.array([0.5] * 3)}}

  def test_a_table_says_how_many_prompts_count(self):
    found = paired.compare(self.VALUES, "a", seed=0)
    self.assertEqual(
        markdown.table(*paired.table(found["means"])),
        "| metric | a | b | prompts |\n|---|---|---|---|\n"
        "| m | 0.500 [0.000, 1.000] | 1.000 | 1 to 2 |\n"
        "| n | 0.250 [0.250, 0.250] | 0.500 [0.500, 0.500] | 3 |")
    self.assertEqual(paired.table(found["differences"], sign=True)[1],
                     [["m", "+0.000", "1"], ["n", "+0.250 [+0.250, +0.250]", "3"]])
    draws = position_bias.resample(3, seed=0)
    nothing = {"a": paired.over_prompts({"m": np.full(3, np.nan)}, draws)}
    self.assertEqual(paired.table(nothing)[1], [["m", "-", "0"]])

  def test_the_picture_shows_each_mean_with_its_interval_in_its_panel(self):
    found = paired.compare(self.VALUES, "a", seed=0)
    figure = paired.picture(found["means"], {"m": 0.75})
    m, n = figure.axes
    self.assertEqual((m.get_title(), n.get_title()), ("m", "n"))
    self.assertEqual([label.get_text() for label in m.get_yticklabels()], ["a", "b"])
    dots = [line.get_xydata()[0].tolist() for line in m.lines if line.get_marker() == "o"]
    self.assertEqual(dots, [[0.5, 0], [1.0, 1]])
    self.assertEqual([line.get_xdata()[0] for line in m.lines if line.get_linestyle() == ":"],
                     [0.75])
    self.assertLen(m.collections, 1)  # b has one prompt, and no interval
    self.assertLen(n.collections, 2)
    path = self.create_tempfile("picture.png").full_path
    figure.savefig(path)
    with open(path, "rb") as file:
      self.assertEqual(file.read(4), b"\x89PNG")


if __name__ == "__main__":
  absltest.main()
