"""Diversity is that of plain loops; of one response there is none, not 0; samples are read back."""

import collections
import functools
import itertools
import json
import math
import pathlib
import re

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax import config as configs
from opd_jax.claims import markdown
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders.arithmetic import chains
from opd_jax.evals import diversity, metrics, paired, run, saved
from opd_jax.evals.saved import Group
from opd_jax.pipelines import evaluation
from opd_jax.verifiers import exact_match, unit_tests


def sentences(seed, count=5, longest=14):
  rng = np.random.default_rng(seed)
  return [" ".join(rng.choice(list("abcde"), rng.integers(1, longest))) for _ in range(count)]


def bleu(candidate, references):
  """As the definition has it: every n-gram against every reference."""
  size, score = min(4, len(candidate)), 0.0
  for n in range(1, size + 1):
    grams = [tuple(candidate[i:i + n]) for i in range(len(candidate) - n + 1)]
    matched = 0
    for gram in set(grams):
      inside = lambda text: sum(tuple(text[i:i + n]) == gram for i in range(len(text) - n + 1))
      matched += min(inside(candidate), max(map(inside, references)))
    more = 0 if n == 1 else 1
    if matched + more == 0:
      return 0.0
    score += math.log((matched + more) / (len(grams) + more)) / size
  gaps = sorted((abs(len(r) - len(candidate)), len(r)) for r in references)
  return math.exp(score) * min(1.0, math.exp(1 - gaps[0][1] / len(candidate)))


def levenshtein(a, b):
  @functools.cache
  def of(i, j):
    if not i or not j:
      return i + j
    return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
  return of(len(a), len(b))


def group(responses, rewards, name="p"):
  return Group(name, [{"role": "user", "content": "?"}], "", list(responses), list(rewards),
               [True] * len(responses))


class TextTest(parameterized.TestCase):

  @parameterized.parameters(range(8))
  def test_self_bleu_is_that_of_a_loop_over_references(self, seed):
    texts = sentences(seed)
    rows = [text.split() for text in texts]
    want = [bleu(row, rows[:i] + rows[i + 1:]) for i, row in enumerate(rows)]
    self.assertAlmostEqual(diversity.self_bleu4(texts), sum(want) / len(want))

  def test_self_bleu_by_hand(self):
    # "a b c d e" against "a b c d f": precisions 4/5, (3+1)/(4+1), (2+1)/(3+1), (1+1)/(2+1).
    one = (4 / 5 * 4 / 5 * 3 / 4 * 2 / 3)**0.25
    self.assertAlmostEqual(diversity.self_bleu4(["a b c d e", "a b c d f"]), one)
    # "a" has one precision, 1, and exp(1 - 3/1); "a b c" has 1/3, 1/3, 1/2.
    short, long = math.exp(-2), (1 / 3 * 1 / 3 * 1 / 2)**(1 / 3)
    self.assertAlmostEqual(diversity.self_bleu4(["a", "a b c"]), (short + long) / 2)
    self.assertEqual(diversity.self_bleu4(["a b c", "d e f"]), 0.0)
    self.assertEqual(diversity.self_bleu4(["", "a"]), 0.0)
    for copies in (["a b c d e"] * 3, ["a"] * 2, ["", ""], ["3+4=7\n#### 7"] * 4):
      self.assertEqual(diversity.self_bleu4(copies), 1.0)

  def test_tokens_are_words_numbers_and_single_marks(self):
    self.assertEqual(diversity.tokens("3+47=50\n#### 50, café_2 ≠ x"), [
        "3", "+", "47", "=", "50", "#", "#", "#", "#", "50", ",", "café_2", "≠", "x"])

  @parameterized.parameters(range(6))
  def test_the_edit_distance_is_that_of_the_recursion(self, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
      a, b = ("".join(rng.choice(list("abé\n"), rng.integers(0, 12))) for _ in range(2))
      self.assertEqual(diversity.edit_distance(a, b), levenshtein(a, b), (a, b))

  def test_the_edit_distance_of_texts_longer_than_a_machine_word(self):
    rng = np.random.default_rng(0)
    a, b = ("".join(rng.choice(list("abcdefgh"), n)) for n in (300, 240))
    self.assertEqual(diversity.edit_distance(a, b), _by_rows(a, b))
    self.assertEqual(diversity.edit_distance(b, a), _by_rows(a, b))
    self.assertEqual(diversity.edit_distance(a, a[:100] + "x" + a[103:]), 3)

  def test_the_distance_of_texts_is_a_share_of_the_longer(self):
    texts = ["abc", "abd", ""]
    self.assertAlmostEqual(diversity.text_distance(texts), (1 / 3 + 1 + 1) / 3)
    self.assertEqual(diversity.text_distance(["", ""]), 0.0)
    long = "a" * diversity.LONGEST
    self.assertEqual(diversity.text_distance([long + "b", long + "c" * 9]), 0.0)

  def test_distinct_and_unique_are_shares(self):
    texts = ["a b a", "b a", "c"]
    self.assertEqual(diversity.distinct(texts, 1), 3 / 6)
    self.assertEqual(diversity.distinct(texts, 2), 2 / 3)  # ab, ba, ba: none across texts
    self.assertTrue(np.isnan(diversity.distinct(["c", "d"], 2)))
    self.assertEqual(diversity.unique(["a  b", " a\nb", "ab", "a b c"]), 3 / 4)


def _by_rows(a, b):
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    row, last = [i], row
    for j, y in enumerate(b, 1):
      row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
  return row[-1]


class TreeTest(parameterized.TestCase):

  def test_names_and_constants_do_not_count_and_structure_does(self):
    self.assertEqual(diversity.tree_distance(["x = 1", "total = 'text'  # so"]), 0.0)
    # Module Assign Name Store Constant, and with Add and BinOp and a second Constant.
    self.assertAlmostEqual(diversity.tree_distance(["x = 1", "x = 1 + 2"]), 1 - 5 / 8)

  def test_it_is_the_jaccard_distance_of_a_loop(self):
    programs = ["for i in x:\n  print(i)", "[print(i) for i in x]",
                "def f(n):\n  return n or f(n - 1)", "while True: pass"]
    found = []
    for a, b in itertools.combinations(map(diversity.node_types, programs), 2):
      kinds = set(a) | set(b)
      found.append(1 - sum(min(a[k], b[k]) for k in kinds) / sum(max(a[k], b[k]) for k in kinds))
    self.assertAlmostEqual(diversity.tree_distance(programs), sum(found) / 6)

  def test_what_does_not_parse_is_left_out(self):
    self.assertEqual(diversity.tree_distance(["x = 1", "y = 2", "for"]), 0.0)
    self.assertTrue(np.isnan(diversity.tree_distance(["x = 1", "for"])))

  @parameterized.parameters(
      "def", "\x00", "\ud83d", "(" * 5000, "-" * 50_000 + "1", "x" + ".a" * 50_000,
      "1" + "+1" * 50_000, "[" * 90 + "]" * 90 + "]", "0" * 10_000 + "1", "1" * 10_000,
      "lambda:" * 20_000, "if x:\n  pass\nel", "\t\n x", "\u200b")
  def test_no_text_makes_it_raise(self, text):
    self.assertIn(type(diversity.node_types(text)), (collections.Counter, type(None)))

  def test_a_program_with_an_unknown_escape_parses_in_silence(self):
    with self.assertNoLogs():
      self.assertIsNotNone(diversity.node_types("re.match('\\d', x) is 1"))


class StudyTest(absltest.TestCase):

  GROUPS = [
      group(["a b c", "a b d", "e f g", "e f g"], [1, 1, 0, 0], "two"),
      group(["x y", "x y", "x z", "w"], [1, 1, 1, 1], "all"),
      group(["x y", "u v", "s t", "q r"], [0, 0, 1, 0.5], "one"),
      group(["x y"], [1], "single"),
  ]

  def test_each_metric_is_that_of_the_group_and_of_its_successes(self):
    found = diversity.per_prompt(self.GROUPS, (1, 4))
    for name, metric in diversity.METRICS.items():
      for p, one in enumerate(self.GROUPS[:3]):
        self.assertEqual(found[name][p], metric(one.responses))
      right = [[t for t, r in zip(one.responses, one.rewards) if r == 1] for one in self.GROUPS]
      self.assertEqual(found[f"success_{name}"][0], metric(right[0]))
      self.assertEqual(found[f"success_{name}"][1], metric(right[1]))
    np.testing.assert_array_equal(found["pass@1"], [0.5, 1.0, 0.25, 1.0])
    np.testing.assert_array_equal(
        found["pass@4"], [metrics.pass_at_k(4, c, 4) for c in (2, 4, 1)] + [np.nan])

  def test_fewer_than_two_are_undefined_and_counted_not_0(self):
    found = diversity.per_prompt(self.GROUPS, (1,), program=str)
    for name, values in found.items():
      undefined = [False, False, name.startswith("success_"), True]
      if name == "pass@1":
        undefined = [False] * 4
      elif "tree" in name:
        undefined = [True] * 4  # of these texts only "w" is a program
      np.testing.assert_array_equal(np.isnan(values), undefined, name)
    means = diversity.study({"run": self.GROUPS})["means"]["run"]
    self.assertEqual(means["unique"]["prompts"], 3)
    self.assertAlmostEqual(means["unique"]["mean"], (3 / 4 + 3 / 4 + 1) / 3)
    self.assertEqual(means["success_unique"]["prompts"], 2)
    self.assertEqual(means["pass@8"]["prompts"], 0)
    self.assertIsNone(means["pass@8"]["mean"])

  def test_programs_of_responses_as_the_verifier_reads_them(self):
    fenced = "Here:\n```python\n{}\n```\nIt is done."
    groups = [group([fenced.format("x = 1"), fenced.format("y = 2"),
                     fenced.format("for i in x:\n  print(i)")], [1, 1, 0])]
    found = diversity.per_prompt(groups, (1,), unit_tests.extract)
    # Two assignments are one tree, the loop has nothing in common with them but Module and Load.
    pairs = [diversity.tree_distance([unit_tests.extract(text) for text in two])
             for two in itertools.combinations(groups[0].responses, 2)]
    self.assertEqual(pairs[0], 0.0)
    self.assertEqual(pairs[1], pairs[2])
    self.assertGreater(pairs[1], 0.5)
    self.assertAlmostEqual(found["tree_distance"][0], sum(pairs) / 3)
    self.assertEqual((found["success_tree_distance"][0], found["unparsed"][0]), (0.0, 0.0))

  def test_programs_are_taken_from_responses_and_those_that_do_not_parse_counted(self):
    program = lambda text: re.sub("^.*:: ", "", text)
    groups = [group(["So:: x = 1", "Thus:: y = 2", "no program", "in:: a b"], [1, 1, 0, 0])]
    found = diversity.per_prompt(groups, (1,), program)
    self.assertEqual((found["tree_distance"][0], found["unparsed"][0]), (0.0, 0.5))
    self.assertEqual((found["success_tree_distance"][0], found["success_unparsed"][0]), (0.0, 0.0))
    self.assertNotIn("tree_distance", diversity.per_prompt(groups, (1,)))

  def test_runs_are_compared_prompt_by_prompt(self):
    same = [one._replace(responses=["x"] * len(one.responses)) for one in self.GROUPS]
    found = diversity.study({"before": self.GROUPS, "after": same})
    change = found["differences"]["after"]["unique"]
    self.assertEqual(change["prompts"], 3)
    self.assertAlmostEqual(change["mean"], 1 / 4 - (3 / 4 + 3 / 4 + 1) / 3)
    self.assertEqual(found["responses"], {"before": 13, "after": 13})
    self.assertEqual(found["cut"], {"before": 0, "after": 0})
    header, *_ = markdown.table(*paired.table(found["means"])).split("\n")
    self.assertEqual(header, "| metric | before | after | prompts |")
    self.assertEqual([axis.get_title() for axis in diversity.picture(found).axes if
                      axis.get_visible()], list(found["means"]["after"]))

  def test_other_prompts_are_refused(self):
    with self.assertRaisesRegex(ValueError, "'b' has other prompts than 'a' \\(3 and 4\\)"):
      diversity.study({"a": self.GROUPS, "b": self.GROUPS[:3]})
    with self.assertRaisesRegex(ValueError, "'a' has no prompts"):
      diversity.study({"a": []})


class SavedTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    self.config = configs.on_policy(
        data=dict(builder_kw=dict(train=1, test=6, mix=dict(plain=1.0)),
                  cache=self.create_tempdir().full_path),
        rollout=dict(max_prompt=96), eval=dict(prompts=5, batch=2, samples=3, ks=(1,)))
    pathlib.Path(self.workdir, "config.json").write_text(self.config.to_json())

  def evaluate(self):
    """What the pipeline leaves of a policy that always answers 7."""
    tokenizer = tokenizers.byte_tokenizer()
    rows, _ = evaluation.read_rows(self.config, evaluation.policies.Policy(None, None, tokenizer))

    def sample(params, batch, key):
      ids = tokenizer.encode("#### 7") + [tokenizer.eos_ids[0]]
      count = len(batch.prompt)
      return batch.replace(response=np.array([ids] * count), mask=np.ones((count, len(ids)), bool))

    verify = lambda texts, answers: [exact_match.verify(*pair) for pair in zip(texts, answers)]
    scores, records = run.evaluate(self.config.eval, rows, None, sample, tokenizer, verify, (96,))
    evaluation.write(pathlib.Path(self.workdir), "step_000003", scores, rows, records,
                     guarded=False)
    return rows, scores

  def test_what_an_evaluation_leaves_comes_back_with_its_prompts(self):
    rows, scores = self.evaluate()
    self.assertEqual(saved.names(self.workdir), ["step_000003"])
    groups = saved.read(self.workdir, "step_000003")
    self.assertEqual([one.id for one in groups], [row["id"] for row in rows])
    for one in groups:
      answer = chains.answer(chains.parse(one.prompt[-1]["content"]))
      self.assertEqual((one.answer, one.responses), (answer, ["#### 7"] * 3))
      self.assertEqual(one.rewards, [float(answer == "7")] * 3)
    found = diversity.study({"run": groups}, ks=(1,))["means"]["run"]
    self.assertAlmostEqual(found["pass@1"]["mean"], scores["pass@1"])
    self.assertEqual(found["self_bleu4"]["mean"], 1.0)

  def test_what_is_not_there_is_named(self):
    with self.assertRaisesRegex(ValueError, "has no evaluation 'last'; there are: none"):
      saved.read(self.workdir, "last")
    self.evaluate()
    path = pathlib.Path(self.workdir, "eval", "step_000003.json")
    left = json.loads(path.read_text())
    left["records"][1]["id"] = "chain-9-9"
    path.write_text(json.dumps(left))
    with self.assertRaisesRegex(ValueError, "lacks 1 of the 5 rows .*'chain-9-9' is the first"):
      saved.read(self.workdir, "step_000003")
    del left["records"][2]["texts"]
    path.write_text(json.dumps(left))
    with self.assertRaisesRegex(ValueError, "no texts of 1 prompts .* guarded"):
      saved.read(self.workdir, "step_000003")
    pathlib.Path(self.workdir, "config.json").unlink()
    left["records"].pop(2)
    path.write_text(json.dumps(left))
    with self.assertRaisesRegex(ValueError, "no config.json"):
      saved.read(self.workdir, "step_000003")


if __name__ == "__main__":
  absltest.main()
