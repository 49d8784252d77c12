"""The letter of a response is the one that published harnesses read, and naming all never pays."""

import gzip
import json
import os
import pathlib
import re
import time

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.verifiers import multiple_choice

# Other harnesses' regular expressions, each with forms that it was written for.
HARNESSES = (
    # openai/simple-evals, common.py
    (r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?",
     ("Answer: {}", "ANSWER : {}", "Some thought.\n\nAnswer: ${}$", "So A? No.\nanswer: {}",
      "Answer:{}\n", "Final Answer: {}.")),
    # TIGER-AI-Lab/MMLU-Pro, evaluate_from_local.py
    (r"answer is \(?([A-J])\)?",
     ("The answer is ({}).", "the answer is {}", "Let's think. 1 + 1 = 2. The answer is ({})",
      "Thus, the correct answer is {}, since B is a word.", "answer is {}!\nThank you.")),
    (r".*[aA]nswer:\s*([A-J])", ("Answer:\n{}", "My answer: {} (leaf)", "answer:   {}\nDone.")),
    (r"\b[A-J]\b(?!.*\b[A-J]\b)", ("{}", "({})", "It must be {}.", "We pick {}, then.", "So: {}!")),
    # EleutherAI/lm-evaluation-harness, flexible-extract of multiple choice
    (r"(\([A-Z]\))", ("({}) a bacterial population", "I would say ({})", "({})\n")),
    # SDPO: the prompts of sciknoweval_mcq
    (r"<answer>\s*([A-D])\s*</answer>",
     ("<reasoning>\nA or B?\n</reasoning>\n<answer>\n{}\n</answer>", "<answer>{}</answer>")),
    (r"\\boxed\{\s*(?:\\text\{)?\(?([A-D])",
     (r"so \boxed{{{}}}", r"\boxed{{\text{{({})}}}}", r"$\boxed{{{}. a leaf}}$",
      r"\boxed{{ {} }}.")),
)


class MultipleChoiceTest(parameterized.TestCase):

  @parameterized.parameters(*((pattern, form) for pattern, forms in HARNESSES for form in forms))
  def test_agrees_with_published_harnesses_on_their_forms(self, pattern, form):
    for letter in "ABCD":
      text = form.format(letter)
      theirs = re.findall(pattern, text)[-1].strip("()")
      self.assertEqual(theirs, letter)
      self.assertEqual(multiple_choice.decide(text), theirs)

  @parameterized.parameters(
      ("<answer>b</answer>", "B"), ("**Answer: C**", "C"), ("**Answer:** (C)", "C"),
      ("Answer: **D**", "D"), ("The answer is \\boxed{\\textbf{(D)}}.", "D"), ("#### B", "B"),
      ("The correct option is B) 1.4", "B"), ("Option: C", "C"), ("Correct choice = D", "D"),
      ("The answer is option C.", "C"), ("answer: b", "B"), ("b", "B"), ("(c).", "C"),
      ("Answer: \"B\"", "B"), ("Answer: `A`", "A"), ("The answer is $\\mathbf{B}$.", "B"),
      ("B. a bacterial population", "B"), ("B: -0.01", "B"), ("A", "A"), ("A.", "A"),
      ("<think>Answer: A</think> Answer: B", "B"), ("<think>A or B\n</think>\n\nB", "B"),
      ("Answer: B) A bacterial population", "B"), ("I think it is C.", "C"),
      ("<answer>The answer is B</answer>", "B"), ("Answer: E", "E"),
      ("A cat has four legs, so I pick D.", "D"), ("Option A is correct", "A"),
      ("Answer: C\nI hope this helps!", "C"), ("It is B.\n\nI am sure", "B"),
      ("A: 1\nB: 2\nC: 3\nD: 4\n\nIt is C", "C"), ("Answer: A because plants need light", "A"),
  )
  def test_other_forms_that_models_write(self, text, letter):
    self.assertEqual(multiple_choice.decide(text), letter)

  @parameterized.parameters(
      ("Answer: A. Wait, no. Answer: C", "C"), ("\\boxed{A} and then \\boxed{B}", "B"),
      ("<answer>A</answer> no <answer>D</answer>", "D"), ("Answer: B\n\\boxed{C}", "C"),
      ("\\boxed{C}. So the answer is C", "C"), ("The answer is A.\nThe answer is B.", "B"),
  )
  def test_the_last_decision_counts(self, text, letter):
    self.assertEqual(multiple_choice.decide(text), letter)

  @parameterized.parameters(
      "Answer: A or B", "Answer: A, B, C, D", "The answer is (A) or (B)", "\\boxed{A, B}",
      "<answer>A B</answer>", "<answer>A/B/C/D</answer>", "It is A or B", "A and B",
      "Answer: A & B",
      "Answer: **A** or **B**", "Answer: A, or option B", "not A but B",
  )
  def test_naming_several_options_never_pays(self, text):
    for letter in "ABCD":
      verdict = multiple_choice.verify(text, letter)
      self.assertEqual(verdict.reward, 0.0)
      self.assertStartsWith(verdict.feedback, "The response decides for more than one option: A, B")

  @parameterized.parameters(
      "", " ", "I do not know.", "A: 1\nB: 2\nC: 3\nD: 4", "the answer is a leaf", "\x00\ud83d",
      "A good question", "\\boxed{}", "<answer></answer>", "\\boxed{42}", "Answer:", "1",
      "An A-level student", "<answer>Abc</answer>", "I'm lost", "K", "Answer: K", "answer: a or b",
      "heated to 100 °C", "the product is CC(C)O", "it has $3 \\mathrm{C}$",
  )
  def test_no_decision_is_said_to_be_none(self, text):
    for letter in "ABCD":
      verdict = multiple_choice.verify(text, letter)
      self.assertEqual(verdict.reward, 0.0)
      self.assertEqual(verdict.feedback, "The response decides for no option.")

  def test_feedback_names_the_wrong_option_and_not_the_right_one(self):
    self.assertEqual(multiple_choice.verify("Answer: B", "C").feedback, "The answer is not B.")
    self.assertEqual(multiple_choice.verify("Answer: C", "C").feedback, "The answer is correct.")

  @parameterized.parameters("<answer>", "\\boxed{", "\\boxed{{{", "####", "answer is ",
                            "answer: A, ",
                            "answer", " ", "*", "A, B, ", "\\text", "(", "answer" + " " * 50, "\n",
                            "Answer: \\text{", "A)\n")
  def test_long_texts_take_linear_time(self, part):
    text = part * (200_000 // len(part))
    start = time.monotonic()
    multiple_choice.verify(text, "B")
    self.assertLess(time.monotonic() - start, 2.0)

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_every_question_of_the_data_is_graded(self):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"]) / "sciknoweval_mcq/train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
      rows = [json.loads(line) for line in lines][::4]
    with verifiers.make("multiple_choice", workers=0, timeout_s=0.0) as verify:
      tagged = "<reasoning>\n{prompt}\n</reasoning>\n<answer>\n{answer}\n</answer>"
      for form, reward in ((tagged, 1.0), ("{prompt}\n\nAnswer: {answer}", 1.0), ("{prompt}", 0.0)):
        texts = [form.format(prompt=r["prompt"], answer=r["answer"]) for r in rows]
        verdicts = verify(texts, [r["answer"] for r in rows])
        wrong = [(t, v) for t, v in zip(texts, verdicts) if v.reward != reward]
        self.assertEmpty(wrong)


if __name__ == "__main__":
  absltest.main()
