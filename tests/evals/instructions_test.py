"""Four accuracies, of prompts and of instructions, are what counting by hand gives."""

import importlib.util
import json

from absl.testing import absltest
import pytest

from opd_jax.evals import instructions
from opd_jax.evals.saved import Group

INSTALLED = all(map(importlib.util.find_spec, ("if_verifiable", "llama_index")))
COMMA = {"id": "punctuation:no_comma", "kwargs": {}}
TITLE = {"id": "detectable_format:title", "kwargs": {}}
QUOTED = {"id": "startend:quotation", "kwargs": {}}


def group(wanted, *responses):
  return Group("x", [], json.dumps(wanted), list(responses), [0.0] * len(responses),
               [True] * len(responses))


class AccuraciesTest(absltest.TestCase):

  @pytest.mark.skipif(not INSTALLED, reason="EXTRAS=ifeval bash launch/env.sh brings the checks")
  def test_by_prompt_and_by_instruction_strictly_and_loosely(self):
    # Followed of each: 1/1 and 0/1 strictly; 1/3 strictly and, without a line, 3/3 loosely; 2/3.
    found = instructions.accuracies([
        group([COMMA], "a b", "a, b"),
        group([COMMA, TITLE, QUOTED], 'Well, here:\n"<<A>> b"', '<<A>> "b'),
    ], workers=1, timeout_s=20.0)
    self.assertEqual({name: round(x, 6) for name, x in found.items()}, dict(
        prompt_strict=0.25, instruction_strict=0.5, prompt_loose=0.5, instruction_loose=0.75))

  def test_nothing_to_check_is_no_accuracy(self):
    with self.assertRaisesRegex(ValueError, "no responses to check"):
      instructions.accuracies([], workers=1, timeout_s=1.0)


if __name__ == "__main__":
  absltest.main()
