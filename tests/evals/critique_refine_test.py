"""Selection of critiques on hand-made tables, pass@k against its definition, and the report."""

from collections import Counter
import itertools
import json
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax import progress
from opd_jax.evals import critique_refine, metrics, paired, position_bias


def picked(before, after, k, kind, seeds=200):
  """Over many orders: which chains are selected, and whether it ever or always fell back."""
  found = [critique_refine.select(np.array(before), np.array(after), k, kind, (seed, 3, k))
           for seed in range(seeds)]
  return {choice.chain for choice in found}, {choice.fell_back for choice in found}


class SelectTest(parameterized.TestCase):
  #          chain:     0    1    2    3    4    5
  BEFORE, AFTER = ([0.0, 1.0, 0.0, 1.0, 0.5, 1.0],   # 1 and 5 get worse; 2 and 4 get right
                   [0.0, 0.0, 1.0, 1.0, 1.0, 0.5])

  @parameterized.parameters(
      (6, "best", {2, 4}, False),
      (6, "worst", {1, 5}, False),
      (6, "random", {0, 1, 2, 3, 4, 5}, False),
      (5, "worst", {1}, False),          # 5 is beyond
      (4, "best", {2}, False),
      (2, "best", {0, 1}, True),         # none has been turned right: any
      (2, "worst", {1}, False),
      (1, "worst", {0}, True),
      (1, "random", {0}, False),
  )
  def test_the_kind_is_found_among_the_first_k_or_any_is_taken(self, k, kind, chains, fell_back):
    self.assertEqual(picked(self.BEFORE, self.AFTER, k, kind), (chains, {fell_back}))

  @parameterized.parameters(*critique_refine.KINDS)
  def test_each_critique_of_a_kind_is_equally_likely(self, kind):
    wanted = {"best": (2, 4), "worst": (1, 5), "random": range(6)}[kind]
    found = Counter(critique_refine.select(np.array(self.BEFORE), np.array(self.AFTER), 6, kind,
                                           (seed,)).chain for seed in range(3000))
    for chain in wanted:
      self.assertAlmostEqual(found[chain] / 3000, 1 / len(wanted), delta=0.03)

  def test_kinds_differ_only_where_they_must(self):
    same = lambda before, after, k, seed: len({critique_refine.select(
        np.array(before), np.array(after), k, kind, (seed,)).chain
                                               for kind in critique_refine.KINDS}) == 1
    for seed in range(50):
      for before, after in itertools.product((0.0, 1.0), repeat=2):
        self.assertTrue(same([before], [after], 1, seed))
      self.assertTrue(same([0.0, 1.0] * 4, [0.0, 1.0] * 4, 8, seed))  # no critique did anything
    self.assertFalse(all(same(self.BEFORE, self.AFTER, 6, seed) for seed in range(50)))

  @parameterized.parameters(
      (4, "worse", "one of random, best, worst, found 'worse'"),
      (0, "best", "of 6 chains the first 0"), (7, "best", "of 6 chains the first 7"))
  def test_the_impossible_is_refused(self, k, kind, message):
    with self.assertRaisesRegex(ValueError, message):
      picked(self.BEFORE, self.AFTER, k, kind)


class PassTest(parameterized.TestCase):

  def test_over_all_orders_of_the_chains_it_is_the_unbiased_estimate(self):
    for right in itertools.product((False, True), repeat=5):
      orders = np.array(list(itertools.permutations(right)))
      for k in range(1, 6):
        found = critique_refine.pass_at(orders, [k])[f"pass@{k}"]
        self.assertAlmostEqual(found.mean(), metrics.pass_at_k(5, sum(right), k))

  def test_it_never_falls_as_k_grows(self):
    right = np.random.default_rng(0).random((40, 8)) < 0.2
    found = list(critique_refine.pass_at(right, range(1, 9)).values())
    self.assertTrue(all(np.all(a <= b) for a, b in zip(found, found[1:])))


def table():
  """Three prompts, two chains; k = 1 and 2. Only prompt b's second critique turns one right."""
  rows = lambda rewards, **more: [
      {"prompt": prompt, "chain": chain, "reward": reward, "tokens": 4, "how": "ended", "text": "x",
       **more} for prompt, each in zip("abc", rewards) for chain, reward in enumerate(each)]
  chosen = lambda first, both, fell_back: [
      row for prompt, x, y, back in zip("abc", first, both, fell_back) for row in
      [{"prompt": prompt, "chain": 0, "k": 1, "reward": x, "fell_back": True},
       *({"prompt": prompt, "chain": i, "k": 2, "reward": r, "fell_back": back}
         for i, r in enumerate(y))]]
  more = lambda found: [{"tokens": 4, "how": "ended", "text": "x", **row} for row in found]
  critiques = [{key: value for key, value in row.items() if key != "reward"}
               for row in rows([[0, 0]] * 3)]
  critiques[0]["how"], critiques[0]["tokens"] = "cut off", 10
  return {
      "answers": rows([[1, 0], [0, 0], [0, 0]]),
      "weak_answers": rows([[0, 0], [0, 0], [0, 0.5]]),
      "critiques": critiques,
      "refinements": rows([[0, 0], [0, 1], [0, 0]]),
      "selected_random": more(chosen([0, 0, 0], [[0, 0], [0, 0], [0, 0]], [False] * 3)),
      "selected_best": more(chosen([0, 0, 0], [[0, 1], [1, 1], [0, 0]], [True, False, True])),
      "selected_worst": more(chosen([0, 0, 0], [[0, 0], [0, 0], [0, 0]], [False, True, True])),
  }


class StudyTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.results = critique_refine.study(table(), [1, 2], seed=0)

  def test_means_and_differences_are_those_of_the_table(self):
    mean = lambda what, name: [self.results[what][name][f"pass@{k}"]["mean"] for k in (1, 2)]
    for method, want in (("S only", [1 / 3, 1 / 3]), ("W only", [0, 0]),
                         ("S + W critic", [0, 1 / 3]), ("S + best critic", [0, 2 / 3]),
                         ("S + random critic", [0, 0]), ("S + worst critic", [0, 0])):
      np.testing.assert_allclose(mean("means", method), want)
    np.testing.assert_allclose(mean("differences", "S + W critic - S only"), [-1 / 3, 0])
    np.testing.assert_allclose(mean("differences", "S + best critic - S + random critic"),
                               [0, 2 / 3])
    draws = position_bias.resample(3, 0)
    self.assertEqual(self.results["differences"]["S + W critic - S only"]["pass@2"],
                     paired.over_prompts({"x": np.array([-1.0, 1.0, 0.0])}, draws)["x"])
    self.assertAlmostEqual(self.results["chains_right"]["S only"]["mean"], 1 / 6)
    self.assertNotIn("S + best critic", self.results["chains_right"])

  def test_what_critiques_did_is_counted(self):
    np.testing.assert_allclose(
        [self.results["turned"][name] for name in ("wrong to right", "right to wrong",
                                                   "right to right", "wrong to wrong")],
        [1 / 6, 1 / 6, 0, 4 / 6])
    self.assertEqual(self.results["fell_back"], {"best": {"1": 3, "2": 2},
                                                 "worst": {"1": 3, "2": 2}})
    self.assertEqual(self.results["how"]["critiques"], {"cut off": 1, "ended": 5})
    self.assertEqual(self.results["tokens"]["critiques"], 5.0)
    notes = "\n".join(critique_refine.notes(self.results))
    self.assertIn("turned 16.7% of the answers from wrong to right, 16.7% from right", notes)
    self.assertIn("no best critique among the first k, so any: 3 of 3 prompts at k=1, 2 of 3 prom",
                  notes)
    self.assertIn("critiques: 1 of 6 cut off", notes)
    self.assertNotIn("answers: ", notes.split("\n")[-1])

  def test_the_table_is_the_papers(self):
    tables = []
    with mock.patch.object(progress, "table", lambda *given: tables.append(given)):
      critique_refine.report(self.results)
    (_, columns, rows), (_, _, differences) = tables
    self.assertEqual(columns, ["", "pass@1", "pass@2"])
    self.assertEqual([row[0] for row in rows], list(critique_refine.METHODS))
    self.assertEqual(rows[3][:2], ["S + best critic", "0.0\n[0,0]"])
    self.assertStartsWith(rows[3][2], "66.7\n[")
    self.assertStartsWith(differences[0][1], "-33.3\n[-100,+0]")
    json.dumps(self.results, allow_nan=False)

  def test_without_selected_critiques_there_are_three_methods(self):
    found = {name: rows for name, rows in table().items() if "selected" not in name}
    results = critique_refine.study(found, [1, 2], seed=0)
    self.assertEqual(list(results["means"]), ["S only", "W only", "S + W critic"])
    self.assertEqual((list(results["differences"]), results["fell_back"]),
                     (["S + W critic - S only", "S only - W only"], {}))
    self.assertLen(critique_refine.picture(results).axes[0].lines, 3)

  def test_the_picture_has_a_line_a_method_and_the_gap_between_the_two(self):
    axis, = critique_refine.picture(self.results).axes
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    np.testing.assert_allclose(lines["S + best critic"], [[1, 0], [2, 200 / 3]])
    self.assertCountEqual(lines, critique_refine.METHODS)
    (gap,) = [c for c in axis.collections if hasattr(c, "get_paths") and len(c.get_facecolor())
              and len(c.get_paths()) == 1 and len(c.get_paths()[0].vertices) > 4]
    corners = {tuple(point) for point in gap.get_paths()[0].vertices.round(3).tolist()}
    self.assertContainsSubset({(1.0, 33.333), (1.0, 0.0), (2.0, 33.333)}, corners)

  def test_one_prompt_has_means_and_no_intervals(self):
    found = {name: [row for row in rows if row["prompt"] == "a"] for name, rows in table().items()}
    results = critique_refine.study(found, [1, 2], seed=0)
    self.assertIsNone(results["means"]["S only"]["pass@1"]["low"])
    critique_refine.report(results)
    critique_refine.picture(results)

  def test_a_transcript_is_one_chain(self):
    self.assertEqual(critique_refine.transcript(table(), 3), "\n".join([
        "--- answers, ended, reward 0", "x", "--- critiques, ended", "x",
        "--- refinements, ended, reward 1", "x"]))
    with self.assertRaisesRegex(ValueError, "have no texts; those of guarded data"):
      critique_refine.transcript({"answers": [{"prompt": "a", "reward": 1.0}]}, 0)


if __name__ == "__main__":
  absltest.main()
