"""The four accuracies of IFEval and IFBench, of a saved evaluation on their prompts.

By prompt, all of whose instructions must be followed, and by instruction; strictly and loosely, as
`verifiers/instructions.py` says. By instruction every instruction counts alike, so that a prompt
with three weighs three times as much as one with one. Several responses to a prompt are averaged.
"""

from collections.abc import Sequence
import json

import numpy as np

from opd_jax import verifiers
from opd_jax.evals.saved import Group


def accuracies(groups: Sequence[Group], workers: int, timeout_s: float) -> dict[str, float]:
  """Checks all responses anew.

  Args:
    groups: from `saved.read`, of a run on the data set `instructions`.
    workers, timeout_s: of the verifier; a response that takes longer follows nothing.
  Returns: "prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose", in [0, 1].
  Raises: ValueError if there are no responses, or a package of the verifier is missing.
  """
  texts = [text for group in groups for text in group.responses]
  answers = [group.answer for group in groups for _ in group.responses]
  if not texts:
    raise ValueError("there are no responses to check; name an evaluation that has some")
  count = np.array([len(json.loads(answer)) for answer in answers])
  out = {}
  for form, name in (("strict", "instructions_share"), ("loose", "instructions_share_loose")):
    with verifiers.make(name, workers, timeout_s) as verify:
      share = np.array([verdict.reward for verdict in verify(texts, answers)])
    out[f"prompt_{form}"] = float(np.mean(share == 1.0))
    out[f"instruction_{form}"] = float(np.sum(share * count) / np.sum(count))
  return out
