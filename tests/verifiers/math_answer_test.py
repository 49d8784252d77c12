"""Mathematically equal final answers are right, and no text makes the verifier raise."""

import gzip
import json
import os
import pathlib

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.verifiers import exact_match, math_answer


class MathAnswerTest(parameterized.TestCase):

  @parameterized.parameters(
      ("\\boxed{\\frac{1}{2}}", "0.5"), ("#### 72", "72"), ("#### $1,000.", "1000"),
      ("#### \\boxed{5}", "5"), ("#### x", "x"), ("#### 7", "\\frac{14}{2}"),
      ("\\boxed{\\frac{\\sqrt{12}}{2}}", "\\sqrt{3}"), ("\\boxed{(x+1)^2}", "x^2+2x+1"),
      ("\\boxed{(1, 2)}", "(1,2)"), ("the result is 12", "12"), ("we get 3, then 4", "4"),
      ("\\boxed{3} and also 9", "3"),
  )
  def test_equal_in_mathematics_is_right(self, text, answer):
    self.assertEqual(math_answer.verify(text, answer).reward, 1.0)

  @parameterized.parameters(
      ("\\boxed{2}. Wait, no: \\boxed{4}", "4", "2"), ("#### 2\n#### 4", "4", "2"),
      ("The final answer is $5$. I hope it is. \\boxed{6}", "6", "5"),
      ("\\boxed{2} or \\boxed{4", "2", "4"), ("\\boxed{9}\n#### 8", "8", "9"),
  )
  def test_the_last_answer_counts_and_no_other(self, text, last, other):
    self.assertEqual(math_answer.verify(text, last).reward, 1.0)
    self.assertEqual(math_answer.verify(text, other).reward, 0.0)

  @parameterized.parameters("#### 1 or 2", "#### 1, 2", "#### 1$ $2", "\\boxed{1,2}",
                            "\\boxed{1\\text{ or }2}", "#### 1$ or $2")
  def test_listing_candidates_does_not_pay(self, text):
    for answer in ("1", "2"):
      self.assertEqual(math_answer.verify(text, answer).reward, 0.0)

  @parameterized.parameters(
      "", " ", "####", "\\boxed{", "\\boxed{}", "\\boxed{}}}", "\x00", "\ud83d", "$" * 999,
      "\\frac{1}{0}", "\\boxed{\\frac{0}{0}}", "\\boxed{10^{5000}}", "#### 10^{5000}",
      "\\begin{matrix}", "#### import os", "\\boxed{" * 200, "#### " + "(" * 200, "∞", "#### NaN",
  )
  def test_strange_text_earns_nothing_and_never_raises(self, text):
    verdict = math_answer.verify(text, "731")
    self.assertEqual(verdict.reward, 0.0)
    self.assertNotIn("731", verdict.feedback)
    self.assertLess(len(verdict.feedback), 80)

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_every_gsm8k_solution_verifies(self):
    folder = pathlib.Path(os.environ["OPD_JAX_DATA"]) / "gsm8k"
    rows = [json.loads(line) for line in (folder / "test_half.jsonl").open(encoding="utf-8")]
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
      rows += [json.loads(next(lines)) for _ in range(200)]
    self.assertGreater(len(rows), 800)
    with verifiers.make("math_answer", workers=1, timeout_s=10.0) as verify:
      verdicts = verify([r["solution"] for r in rows], [r["answer"] for r in rows])
    for row, verdict in zip(rows, verdicts):
      self.assertEqual(verdict.reward, 1.0, row["id"])
      self.assertEqual(exact_match.verify(row["solution"], row["answer"]).reward, 1.0, row["id"])


if __name__ == "__main__":
  absltest.main()
