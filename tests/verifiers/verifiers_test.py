"""Verifiers reward right answers, never raise, and cannot hold up a run."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.verifiers import exact_match


class ExactMatchTest(parameterized.TestCase):

  @parameterized.parameters(
      ("3+4=7\n#### 7", "7", 1.0), ("#### 7\n#### 8", "8", 1.0), ("####1,234 ", "1234", 1.0),
      ("#### 7.", "7", 1.0), ("#### 7", "8", 0.0), ("the answer is 7", "7", 0.0), ("", "7", 0.0),
      ("####", "7", 0.0), ("#### 7\ntrailing talk", "7", 1.0),
  )
  def test_rewards_exactly_the_right_answer(self, text, answer, reward):
    self.assertEqual(exact_match.verify(text, answer).reward, reward)

  def test_feedback_never_reveals_the_answer(self):
    for text in ("#### 5", "no marker", "####"):
      self.assertNotIn("731", exact_match.verify(text, "731").feedback)


class MathAnswerTest(parameterized.TestCase):

  def test_equal_in_mathematics_is_equal_and_hostile_text_costs_its_time_limit(self):
    cases = [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0), ("#### 72", "72", 1.0),
        ("#### 1,000", "1000", 1.0), ("the result is 12", "12", 1.0), ("\\boxed{13}", "12", 0.0),
        ("", "12", 0.0), ("\\boxed{", "12", 0.0), ("\x00\ud83d", "12", 0.0),
    ]
    hostile = ["#### 9**9**9**9**9", "\\boxed{10^{10^{10^{10}}}}", "#### (((((((((10!)!)!)!)!)!)!)!)!)"]
    texts, answers, rewards = zip(*cases)
    with verifiers.make("math_answer", workers=2, timeout_s=3.0) as verify:
      self.assertEqual([v.reward for v in verify(texts, answers)], list(rewards))
      start = time.monotonic()
      verdicts = verify([*hostile, "#### 3"], ["7"] * len(hostile) + ["3"])
      self.assertEqual([v.reward for v in verdicts], [0.0] * len(hostile) + [1.0])
      self.assertLess(time.monotonic() - start, 60.0)
      self.assertEqual(verify(["#### 4"], ["4"])[0].reward, 1.0)  # replaced workers work

  def test_workers_do_not_import_jax(self):
    code = "import sys, opd_jax.verifiers.pool; sys.exit('jax' in sys.modules)"
    self.assertEqual(subprocess.run([sys.executable, "-c", code]).returncode, 0)

  def test_unknown_verifier_is_named(self):
    with self.assertRaisesRegex(ValueError, "exact_match, math_answer"):
      with verifiers.make("maths", 1, 1.0):
        pass

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_every_gsm8k_solution_verifies(self):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"]) / "gsm8k/train.jsonl.gz"
    with gzip.open(path, "rt") as lines:
      rows = [json.loads(line) for line in lines]
    for row in rows:
      self.assertEqual(exact_match.verify(row["solution"], row["answer"]).reward, 1.0, row["id"])
    with verifiers.make("math_answer", workers=2, timeout_s=5.0) as verify:
      verdicts = verify([r["solution"] for r in rows[:300]], [r["answer"] for r in rows[:300]])
    self.assertEqual([v.reward for v in verdicts], [1.0] * 300)


if __name__ == "__main__":
  absltest.main()
