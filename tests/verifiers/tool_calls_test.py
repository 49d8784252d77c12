"""Tool calls are right if names and arguments are, as values, each as often as wanted."""

import itertools
import json
import os
import pathlib
import re

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.data.builders import tool_use
from opd_jax.verifiers import tool_calls


def wanted(*calls, ordered=False):
  rows = [{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls]
  return json.dumps({"ordered": True, "calls": rows} if ordered else rows)


def said(*calls):
  return "\n".join(f"Thought: I must.\nAction: {name}\nAction Input: {json.dumps(arguments)}"
                   for name, arguments in calls)


def multiset(text):
  """Another reader of the same form: one line a call, compared as sorted JSON."""
  pairs = re.findall(r"^Action: (.*)\nAction Input: (.*)$", text, re.MULTILINE)
  return sorted((name, json.dumps(json.loads(x), sort_keys=True)) for name, x in pairs)


ONE = ("search", {"color": "wild", "page": 1, "tags": ["a", "b"], "near": {"x": 1.5, "y": None}})
TWO = ("facts", {})
THREE = ("facts", {"limit": 3})


class ToolCallsTest(parameterized.TestCase):

  def test_agrees_with_multisets_on_every_short_sequence(self):
    calls = (TWO, THREE, ("facts", {"limit": 4}))
    sequences = [s for n in range(1, 4) for s in itertools.product(calls, repeat=n)]
    for found, want in itertools.product(sequences, repeat=2):
      equal = multiset(said(*found)) == multiset(said(*want))
      self.assertEqual(tool_calls.verify(said(*found), wanted(*want)).reward, float(equal))
      in_order = tool_calls.verify(said(*found), wanted(*want, ordered=True))
      self.assertEqual(in_order.reward, float(found == want))

  @parameterized.parameters(
      'Action: search\nAction Input: {"tags": ["a", "b"], "near": {"y": null, "x": 1.5}, '
      '"page": 1.0, "color": "wild"}',
      '**Action:** search\n**Action Input:** {"color": "wild", "page": 1, "tags": ["a", "b"],\n'
      '  "near": {"x": 15e-1, "y": null}}\n\nObservation: fine',
      'Action: `search`\nAction Input:\n```json\n{"color": "wild", "page": 1, "tags": ["a", "b"], '
      '"near": {"x": 1.5, "y": null}}\n```\nDone.',
      f"<think>{said(TWO)}</think>\n{said(ONE)}\n",
  )
  def test_arguments_are_values(self, text):
    verdict = tool_calls.verify(text, wanted(ONE))
    self.assertEqual((verdict.reward, verdict.feedback), (1.0, "The calls are correct."))

  @parameterized.parameters(
      (dict(page=2), "page"), (dict(page=True), "page"), (dict(page="1"), "page"),
      (dict(tags=["b", "a"]), "tags"), (dict(color="Wild"), "color"), (dict(more=1), "more"),
      (dict(near={"x": 1.5}), "near"), (dict(page=2, color=None), "color, page"),
  )
  def test_wrong_arguments_are_named_and_right_ones_not_told(self, change, names):
    verdict = tool_calls.verify(said(("search", {**ONE[1], **change})), wanted(ONE))
    self.assertEqual(verdict.reward, 0.0)
    self.assertEqual(verdict.feedback, f"Call 1 (search) has wrong arguments: {names}.")

  @parameterized.parameters(
      ("", 'The response has no line "Action: ...".'),
      ("I call search.", 'The response has no line "Action: ...".'),
      ("Action: facts", 'The call 1 (facts) has no line "Action Input: ...".'),
      ("Action: facts\nAction Input: ",
       "The input of call 1 (facts) is not JSON: Expecting value."),
      ("Action: facts\nAction Input: {'limit': 3}",
       "The input of call 1 (facts) is not JSON: Expecting property name enclosed in double "
       "quotes."),
      ("Action: facts\nAction Input: [3]", "The input of call 1 (facts) is not a JSON object."),
      ('Action: facts\nAction Input: {"limit": 3} or so',
       "The input of call 1 (facts) is followed by something else on its line."),
      ('Action: facts\nAction Input: {"limit": 4, "limit": 3}',
       "The input of call 1 (facts) is not JSON: a key is given twice."),
      ('Action: facts\nAction Input: {"limit": NaN}',
       "The input of call 1 (facts) is not JSON: NaN is no JSON."),
      (said(("facts", {})), "Call 1 (facts) lacks an argument."),
      (said(("Facts", {"limit": 3})), "Call 1 (Facts) is not wanted at this place."),
      (said(THREE, THREE), "Call 2 (facts) is not wanted: too many calls."),
  )
  def test_what_is_wrong_is_said(self, text, feedback):
    verdict = tool_calls.verify(text, wanted(THREE))
    self.assertEqual((verdict.reward, verdict.feedback), (0.0, feedback))

  def test_too_few_calls_are_said_to_be(self):
    verdict = tool_calls.verify(said(TWO), wanted(TWO, THREE))
    self.assertEqual((verdict.reward, verdict.feedback), (0.0, "There are too few calls."))

  @parameterized.parameters(True, False)
  def test_optional_calls_may_be_missing_and_nothing_else_may(self, ordered):
    want = wanted(TWO, ("[Optional]facts", {"limit": 3}), ONE, ordered=ordered)
    self.assertEqual(tool_calls.verify(said(TWO, THREE, ONE), want).reward, 1.0)
    self.assertEqual(tool_calls.verify(said(TWO, ONE), want).reward, 1.0)
    self.assertEqual(tool_calls.verify(said(TWO, THREE), want).reward, 0.0)
    self.assertEqual(tool_calls.verify(said(TWO, THREE, THREE, ONE), want).reward, 0.0)
    self.assertEqual(tool_calls.verify(said(THREE, TWO, ONE), want).reward, float(not ordered))

  @parameterized.parameters("Action: x\nAction Input: " + "[" * 100_000,
                            "Action: x\nAction Input: " + '{"a":' * 100_000, "\x00\ud83d",
                            "Action: \ud83d\nAction Input: {}", "Action:" * 20_000,
                            "Action:\nAction Input: {}\n" * 5_000, "Action: x\n" + " " * 200_000,
                            'Action: x\nAction Input: {"a": 1' + "0" * 10_000 + "}",
                            "\nAction:" + "*_ " * 50_000)
  def test_strange_text_earns_nothing_and_never_raises(self, text):
    verdict = tool_calls.verify(text, wanted(ONE))
    self.assertEqual(verdict.reward, 0.0)
    self.assertNotEmpty(verdict.feedback)
    self.assertLess(len(verdict.feedback), 300)

  @parameterized.parameters("", "1", "{}", "[1]", '[{"Action": "x"}]', "null",
                            '[{"Action": "x", "Action_Input": "[]"}]')
  def test_unreadable_answers_are_nobodys_success(self, answer):
    self.assertEqual(tool_calls.verify(said(TWO), answer).reward, 0.0)

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_every_call_of_the_data_is_right_for_its_own_question_only(self):
    for name in ("tooluse/part.jsonl", "toolalpaca_real/all.jsonl"):
      path = pathlib.Path(os.environ["OPD_JAX_DATA"], name)
      rows = list(tool_use.splits(test=str(path))["test"]())
      with verifiers.make("tool_calls", workers=0, timeout_s=0.0) as verify:
        verdicts = verify([r["response"] for r in rows], [r["answer"] for r in rows])
        others = verify([r["response"] for r in rows], [r["answer"] for r in rows[1:] + rows[:1]])
      self.assertEmpty([(r["id"], v) for r, v in zip(rows, verdicts) if v.reward != 1.0])
      same = [multiset(a["response"]) == multiset(b["response"])
              for a, b in zip(rows, rows[1:] + rows[:1])]
      self.assertEqual([v.reward for v in others], list(map(float, same)))


if __name__ == "__main__":
  absltest.main()
