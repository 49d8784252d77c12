"""Exact match rewards the right last answer and gives nothing away."""

from absl.testing import absltest, parameterized

from opd_jax.verifiers import exact_match


class ExactMatchTest(parameterized.TestCase):

  @parameterized.parameters(
      ("#### 1,234,567", "1234567"), ("#### 12 345", "12345"), ("####\t-7 \n", "-7"),
      ("#### 7.", "7"), ("#### 1\u00a0000", "1000"), ("#### 1234", "1,234"),
      ("#### 3\n#### 8", "8"), ("#### 8\nand more talk", "8"), ("#### 1 000 000", "1,000,000"),
      ("#### - 7", "-7"), ("#### 3 / 4", "3/4"), ("#### ( 1, 2 )", "(1,2)"), ("#### a  b", "a b"),
  )
  def test_space_and_thousands_separators_do_not_count(self, text, answer):
    self.assertEqual(exact_match.verify(text, answer).reward, 1.0)

  @parameterized.parameters("#### 7\n#### 8", "7 ####", "#### 77", "#### -7", "#### 7.0", "7",
                            "### 7", "####", "", "\x00\ud83d", "#### " + "7" * 100_000)
  def test_anything_else_earns_nothing_and_one_short_sentence(self, text):
    verdict = exact_match.verify(text, "7")
    self.assertEqual(verdict.reward, 0.0)
    self.assertLess(len(verdict.feedback), 80)
    self.assertNotIn("\n", verdict.feedback)

  @parameterized.parameters("#### 1, 2", "#### 1,2", "#### 1 2", "#### 1\t2")
  def test_listing_parts_of_the_answer_does_not_pay(self, text):
    self.assertEqual(exact_match.verify(text, "12").reward, 0.0)

  @parameterized.parameters("####", "#### ", "#### \n7", "")
  def test_nothing_is_never_right(self, text):
    self.assertEqual(exact_match.verify(text, "").reward, 0.0)

  def test_a_missing_marker_is_the_reason_given(self):
    self.assertIn("no final answer behind ####", exact_match.verify("it is 7", "7").feedback)

  @parameterized.parameters("#### 5", "it is five", "####", "")
  def test_feedback_never_reveals_the_answer(self, text):
    self.assertNotIn("731", exact_match.verify(text, "731").feedback)


if __name__ == "__main__":
  absltest.main()
