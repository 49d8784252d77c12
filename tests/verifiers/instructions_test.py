"""Instructions are followed, strictly and loosely, exactly when if-verifiable says so."""

import importlib.util
import json
import logging
import os
import pathlib
import random
from unittest import mock

from absl.testing import absltest, parameterized
import pytest

from opd_jax import verifiers
from opd_jax.data.builders import instructions as builder
from opd_jax.verifiers import instructions

INSTALLED = all(map(importlib.util.find_spec, ("if_verifiable", "llama_index")))
needs_package = pytest.mark.skipif(
    not INSTALLED, reason="EXTRAS=ifeval bash launch/env.sh brings the checks")

REWARDS = {  # if-verifiable's name of each of our rewards
    instructions.verify: "binary_strict", instructions.verify_loose: "binary_loose",
    instructions.verify_share: "partial_strict",
    instructions.verify_share_loose: "partial_loose"}

ENGLISH = "the weather is nice today and we are going to the beach with our friends"
SPANISH = "el tiempo es muy bueno hoy y vamos a la playa con nuestros amigos"

# kind, arguments, a response that follows it, one that does not.
CASES = (
    ("keywords:existence", {"keywords": ["river", "stone"]}, "A Stone in a river.", "A stone."),
    ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": "at least"},
     "Owl and owl.", "An owl."),
    ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": "less than"},
     "An owl.", "Owl and owl."),
    ("keywords:forbidden_words", {"forbidden_words": ["owl"]}, "Owls fly.", "An owl flies."),
    ("keywords:letter_frequency",
     {"letter": "Z", "let_frequency": 3, "let_relation": "at least"}, "Zzz", "zz"),
    ("language:response_language", {"language": "es"}, SPANISH, ENGLISH),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"},
     "Dr. Smith met Mr. Jones. They spoke.", "One came. Two left. Three stayed."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
     "One came. Two left! Did three stay?", "It cost 3.50 dollars, e.g. in the U.S. yesterday."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"},
     "one two three-four", "one two three"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
     "First this.\n\nThen, that.", "First this.\n\nAnd then that."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [date]",
     "[name] and (date)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Dear you\n\nP.S. I am well",
     "Dear you"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n1. two"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*",
     "*one* and two"),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2},
     "PART 1\na\nPART 2\nb", "PART 1\na\nB"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": [1]}\n```", "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\nText", "A title\nText"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "Well. That is all.",
     "That is all. Well."),
    ("startend:quotation", {}, '"All of it"', '"All" of it'),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, "It is a BIG, BIG thing.",
     "It is a BIG thing."),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, SPANISH),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one two", "one two three four"),
    ("count:unique_word_count", {"N": 3}, "one two three", "one two one two"),
    ("ratio:stop_words", {"percentage": 50}, "the quick fox is brown", "it is the one of them"),
    ("ratio:sentence_type", {}, "It is. It was. Was it?", "It is. Was it?"),
    ("count:conjunctions", {"small_n": 2}, "you and me or them", "you and me and them"),
    ("count:numbers", {"N": 2}, "5 of 1,000", "five of 1000"),
    ("words:palindrome", {}, "level " * 10, "level " * 9),
    ("words:prime_lengths", {}, "we are", "we were"),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c}])"),
    ("format:options", {"options": "yes/no/maybe"}, "Yes.", "Yes, I think."),
    ("format:newline", {}, "one\ntwo", "one two"),
    ("format:emoji", {}, "Well done 🎉.", "Well done."),
    ("sentence:keyword", {"word": "owl", "N": 2}, "A bird. An owl. A tree.", "An owl. A bird."),
    ("sentence:increment", {"small_n": 1}, "One. Two words. Now three words.", "One. One."),
    ("words:words_position", {"keyword": "owl"}, "an owl is an owl !", "the owl is here"),
    ("words:keywords_specific_position", {"keyword": "owl", "n": 2, "m": 3},
     "One. There is owl here.", "One. An owl is here."),
    ("format:title_case", {}, "The Whole Title", "The whole title"),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d e", "n_start": 1, "n_end": 3}, "b c", "b"),
    ("format:no_whitespace", {}, "one_two", "one two"),
)

# Of every shape that an instruction asks for, and of none.
RESPONSES = (
    *(text for case in CASES for text in case[2:]), "!", "...", "\n \n", "<think>no comma, none",
    "<think>a, b</think>\nOne and two.", "Here it is:\n" + ENGLISH.upper() + "\n**Done**",
    "Sure, I can!\n* one\n* two\n* three", "# Title\n\n" + ENGLISH.title() + ".\n\nP.S. " + SPANISH)


def answer_of(*pairs):
  return json.dumps([{"id": kind, "kwargs": kwargs} for kind, kwargs in pairs])


def theirs(name, response, kinds, kwargs):
  """if-verifiable's four scores, or None where it cannot bear the response."""
  instructions.library()  # which knows where the data of NLTK is
  from if_verifiable import IFEvalSample, evaluate_output_for_sample
  try:
    return evaluate_output_for_sample(name, IFEvalSample(0, "", kinds, kwargs), response)[1]
  except IndexError:
    return None


@needs_package
class InstructionsTest(parameterized.TestCase):

  @parameterized.parameters(*CASES)
  def test_hand_written_responses_get_what_they_deserve(self, kind, kwargs, good, bad):
    answer = answer_of((kind, kwargs))
    self.assertEqual(instructions.verify(good, answer).reward, 1.0)
    for verify in (instructions.verify, instructions.verify_share):
      self.assertEqual(verify(bad, answer).reward, 0.0)

  def test_every_kind_of_ifeval_has_a_case(self):
    from if_verifiable import ifeval
    self.assertEmpty(set(ifeval.INSTRUCTION_DICT) - {case[0] for case in CASES})

  def test_the_four_rewards_are_if_verifiables_own(self):
    rng = random.Random(0)
    ifeval = [case for case in CASES if case[0].partition(":")[0] in (
        "keywords", "language", "length_constraints", "detectable_content", "detectable_format",
        "combination", "startend", "change_case", "punctuation")]
    seen = set()
    for _ in range(150):
      name, cases = rng.choice((("ifeval", ifeval), ("ifbench", CASES[len(ifeval):])))
      chosen = rng.sample(cases, rng.choice((1, 2, 3)))
      response = rng.choice(RESPONSES)
      want = theirs(name, response, [x[0] for x in chosen], [x[1] for x in chosen])
      for verify, score in REWARDS.items():
        got = verify(response, answer_of(*(x[:2] for x in chosen))).reward
        if want is not None:
          self.assertAlmostEqual(got, getattr(want, score), msg=f"{score} of {response!r}")
          seen.add((score, got))
    self.assertGreaterEqual(len(seen), 12)  # wins, losses and parts, not all one

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  @parameterized.parameters("ifeval", "ifbench")
  def test_the_four_rewards_are_if_verifiables_own_on_real_rows(self, name):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"], name, "half.jsonl")
    rng, parts = random.Random(0), 0
    by_key = {str(row["key"]): row for row in map(json.loads, path.read_text().splitlines())}
    for row in list(builder.splits(test=str(path))["test"]())[::2]:
      record = by_key[row["id"]]
      for response in (record["prompt"], *rng.sample(RESPONSES, 2)):
        want = theirs(name, response, record["instruction_id_list"], record["kwargs"])
        verdicts = {score: verify(response, row["answer"]) for verify, score in REWARDS.items()}
        for score, verdict in verdicts.items():
          self.assertNotIn("cannot be checked", verdict.feedback)
          if want is not None:
            self.assertAlmostEqual(verdict.reward, getattr(want, score))
          parts += 0 < verdict.reward < 1
    self.assertGreater(parts, 0)

  def test_loosely_the_first_line_the_last_and_asterisks_do_not_count(self):
    answer = answer_of(("punctuation:no_comma", {}), ("startend:quotation", {}))
    for text in ('Sure, here:\n"It is so"', '"It is so"\nWell, well.', '*"It is so"*',
                 'Sure, here:\n**"It is so"**\nWell, well.'):
      self.assertEqual(instructions.verify(text, answer).reward, 0.0)
      self.assertEqual(instructions.verify_loose(text, answer).reward, 1.0)

  def test_thinking_does_not_count(self):
    answer = answer_of(("punctuation:no_comma", {}))
    self.assertEqual(instructions.verify("<think>a, b</think>a b", answer).reward, 1.0)
    self.assertEqual(instructions.verify("<think>a b", answer).reward, 0.0)

  def test_feedback_names_what_is_not_followed_and_nothing_else(self):
    answer = answer_of(("punctuation:no_comma", {}), ("detectable_format:title", {}),
                       ("length_constraints:number_words",
                        {"num_words": 300, "relation": "at least"}))
    verdict = instructions.verify_share("<<Title>> One, two.", answer)
    self.assertAlmostEqual(verdict.reward, 1 / 3)
    self.assertEqual(verdict.feedback, (
        "The response does not follow: In your entire response, refrain from the use of any "
        "commas.; Answer with at least 300 words."))
    self.assertEqual(instructions.verify("<<A>> " + "x " * 300, answer).feedback,
                     "The response follows all instructions.")

  @parameterized.parameters(
      ("", "they are no list of id and kwargs"), ("1", "they are no list of id and kwargs"),
      ('[{"id": "punctuation:no_comma"}]', "they are no list of id and kwargs"),
      ("[]", "there are none"),
      (answer_of(("punctuation:no_comma", {}), ("made:up", {})), "there is no check of made:up"),
      (answer_of(("words:start_verb", {})), "there is no check of words:start_verb"),
      (answer_of(("punctuation:no_comma", {"letter": "a"})),
       "punctuation:no_comma cannot have these arguments: "),
      (answer_of(("keywords:letter_frequency",
                  {"letter": "#", "let_frequency": 1, "let_relation": "less than"})),
       "keywords:letter_frequency cannot have these arguments: something is left to chance"),
      (answer_of(("length_constraints:number_words", {"num_words": 1})),
       "length_constraints:number_words cannot have these arguments: something is left to chance"),
  )
  def test_answers_that_cannot_be_checked_are_nobodys_success(self, answer, reason):
    for verify in REWARDS:
      verdict = verify("one two", answer)
      self.assertEqual(verdict.reward, 0.0)
      self.assertStartsWith(verdict.feedback,
                            f"The instructions of this question cannot be checked: {reason}")

  @parameterized.parameters("", " \n", "\x00", "\ud83d", "[" * 1_000, "{" * 2_000, "*" * 1_000,
                            "\"" * 1_000, "😀" * 500, ". " * 300)
  def test_strange_text_never_raises(self, text):
    for kind, kwargs, *_ in CASES:
      for verify in (instructions.verify, instructions.verify_share_loose):
        verdict = verify(text, answer_of((kind, kwargs)))
        self.assertIn(verdict.reward, (0.0, 1.0))
        self.assertLess(len(verdict.feedback), 300)

  def test_nothing_is_logged_downloaded_or_drawn(self):
    answer = answer_of(("language:response_language", {"language": "en"}))
    with mock.patch("nltk.download") as download, mock.patch.object(
        random, "choice") as choice, self.assertNoLogs(level=logging.DEBUG):
      verdicts = {instructions.verify(text, answer).reward for text in ["?!"] * 2}
    self.assertEqual(verdicts, {1.0})  # no language is every language, as in the benchmarks
    download.assert_not_called()
    choice.assert_not_called()
    self.assertEqual(logging.root.manager.disable, 0)

  def test_a_text_that_takes_too_long_does_not_hold_up_the_others(self):
    answer = answer_of(("detectable_content:number_placeholders", {"num_placeholders": 1}))
    with verifiers.make("instructions_loose", workers=1, timeout_s=1.0) as verify:
      verdicts = verify(["[" * 100_000, "[a]", "a"], [answer] * 3)
      worker = pathlib.Path(f"/proc/{verify._workers[0].process.pid}/maps").read_text()
    self.assertEqual([verdict.reward for verdict in verdicts], [0.0, 1.0, 0.0])
    self.assertEqual(verdicts[0].feedback, "Checking the response took longer than 1 s.")
    self.assertNotIn("jaxlib", worker)


class MissingTest(absltest.TestCase):

  def test_a_run_says_what_is_missing_before_it_begins(self):
    find = importlib.util.find_spec
    for absent in ("if_verifiable", "nltk"):
      with mock.patch.object(importlib.util, "find_spec",
                             lambda name, absent=absent: None if name == absent else find(name)):
        with self.assertRaisesRegex(ValueError, f"needs .*{absent}.*: EXTRAS=ifeval bash"):
          with verifiers.make("instructions", workers=1, timeout_s=1.0):
            pass

  @needs_package
  def test_a_run_says_when_data_of_nltk_are_missing(self):
    with mock.patch("nltk.data.path", []), mock.patch.object(
        importlib.util, "find_spec", lambda name: None if name == "llama_index" else True):
      with self.assertRaisesRegex(ValueError, "needs tokenizers/punkt_tab, corpora/stopwords: EXT"):
        instructions.check_installed()


if __name__ == "__main__":
  absltest.main()
