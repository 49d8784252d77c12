"""A judge: a model that answers a rubric with yes or no, by which of them it finds likelier.

It is shown the question, the answer and the critique, never what would be right.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from opd_jax import sharding
from opd_jax.data import chat
from opd_jax.losses import masked
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer

PLACEHOLDERS = ("question", "answer", "critique")
WORDS = ("yes", "no")


class Case(NamedTuple):
  """What is judged."""

  messages: chat.Messages  # the conversation whose last turn is the question
  answer: str
  critique: str


# (params, cases) -> (log p(yes), log p(no)) each, nats; None for a case that is too long.
Judge = Callable[[Any, Sequence[Case]], list[tuple[float, float] | None]]


def read_rubric(path: str) -> str:
  """The text of a rubric. Raises: ValueError if it cannot be read or lacks a placeholder."""
  try:
    text = pathlib.Path(path).read_text()
  except OSError as error:
    raise ValueError(f"rubric is {path!r}, which cannot be read: {error.strerror}") from error
  missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in text]
  if missing:
    raise ValueError(f"the rubric {path} lacks {', '.join(missing)}; it must hold "
                     + ", ".join(f"{{{name}}}" for name in PLACEHOLDERS))
  return text


def write(rubric: str, case: Case) -> chat.Messages:
  """The request: the rubric with the case in its placeholders, after the same system turn."""
  shown = dict(question=case.messages[-1]["content"], answer=case.answer, critique=case.critique)
  # At once: a placeholder in a critique is text.
  text = re.sub(r"\{(question|answer|critique)\}", lambda match: shown[match[1]], rubric)
  return [*(x for x in case.messages if x["role"] == "system"), {"role": "user", "content": text}]


def make(policy: policies.Policy, rubric: str, widths: Sequence[int], rows: int,
         mesh: Mesh) -> Judge:
  """The judge that a model makes with a rubric.

  Where "yes" and "no" are several tokens each, their log-probabilities are summed: a word of
  more tokens is then at a disadvantage, the same for all cases.

  Args:
    policy: whose model and tokenizer are used; its parameters are given at each call.
    rubric: from `read_rubric`.
    widths: lengths that requests are padded to; longer ones are not judged.
    rows: cases at a time.
    mesh: rows are spread over its `data` axis.
  """
  tokenizer, spread = policy.tokenizer, sharding.of_batch(mesh)
  words = [tokenizer.encode(word) for word in WORDS]
  score = jax.jit(functools.partial(word_logprobs, policy.model))

  def judge(params: Any, cases: Sequence[Case]) -> list[tuple[float, float] | None]:
    requests = [tokenizer.encode_chat(write(rubric, case)) for case in cases]
    found: list[tuple[float, float] | None] = [None] * len(cases)
    fits = [i for i, ids in enumerate(requests) if len(ids) <= max(widths)]
    for start in range(0, len(fits), rows):
      here = fits[start:start + rows]
      filled = here + here[-1:] * (rows - len(here))  # one shape for all
      prompts = batches.prompts([requests[i] for i in filled], len(WORDS), widths, tokenizer.pad_id)
      batch = batches.answered(prompts, words * rows, (max(map(len, words)),), tokenizer.pad_id)
      both = np.asarray(score(params, jax.device_put(batch, spread))).reshape(rows, len(WORDS))
      for i, pair in zip(here, both.tolist()):
        found[i] = tuple(pair)
    return found

  return judge


def word_logprobs(model: Any, params: Any, batch: batches.Batch) -> jax.Array:
  """f32[B]: the log-probability of each row's response as a beginning, nats."""
  return masked.row_sum(scorer.logprobs(model, params, batch)[0], batch.mask)
