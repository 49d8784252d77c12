"""A judge: a model that answers a rubric with one of a few words, by which it finds likelier.

OPCD's says yes or no to a critique: it is shown the question, the answer and the critique, never
what would be right. That of pipelines/judged.py chooses between two responses.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
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


# (params, requests) -> the words' log-probabilities each, nats; None for one that is too long.
Ask = Callable[[Any, Sequence[chat.Messages]], list[tuple[float, ...] | None]]
# (params, cases) -> (log p(yes), log p(no)) each.
Judge = Callable[[Any, Sequence[Case]], list[tuple[float, ...] | None]]


def read_rubric(path: str, placeholders: Sequence[str] = PLACEHOLDERS) -> str:
  """The text of a rubric. Raises: ValueError if it cannot be read or lacks a placeholder."""
  try:
    text = pathlib.Path(path).read_text()
  except OSError as error:
    raise ValueError(f"rubric is {path!r}, which cannot be read: {error.strerror}") from error
  missing = [f"{{{name}}}" for name in placeholders if f"{{{name}}}" not in text]
  if missing:
    raise ValueError(f"the rubric {path} lacks {', '.join(missing)}; it must hold "
                     + ", ".join(f"{{{name}}}" for name in placeholders))
  return text


def write(rubric: str, case: Case) -> chat.Messages:
  """The request about a case."""
  return chat.fill(rubric, case.messages, dict(answer=case.answer, critique=case.critique))


def make(policy: policies.Policy, rubric: str, widths: Sequence[int], rows: int,
         mesh: Mesh) -> Judge:
  """The judge that a model makes with a rubric; arguments as of `choose`."""
  ask = choose(policy, WORDS, widths, rows, mesh)
  return lambda params, cases: ask(params, [write(rubric, case) for case in cases])


def choose(policy: policies.Policy, words: Sequence[str], widths: Sequence[int], rows: int,
           mesh: Mesh) -> Ask:
  """A model as a function from requests to how likely it finds each of some words as the reply.

  Where words are several tokens each, their log-probabilities are summed: a word of more tokens is
  then at a disadvantage, the same for all requests.

  Args:
    policy: whose model and tokenizer are used; its parameters are given at each call.
    words: the replies.
    widths: lengths that requests are padded to; longer ones are not judged.
    rows: requests at a time.
    mesh: rows are spread over its `replica` and `data` axes.
  Raises: FloatingPointError, when asked, if the model finds a word NaN likely.
  """
  tokenizer, spread = policy.tokenizer, sharding.of_batch(mesh)
  replies = [tokenizer.encode(word) for word in words]
  score = jax.jit(functools.partial(word_logprobs, policy.model))

  def ask(params: Any, requests: Sequence[chat.Messages]) -> list[tuple[float, ...] | None]:
    encoded = [tokenizer.encode_chat(messages) for messages in requests]
    found: list[tuple[float, ...] | None] = [None] * len(encoded)
    fits = [i for i, ids in enumerate(encoded) if len(ids) <= max(widths)]
    for start in range(0, len(fits), rows):
      here = fits[start:start + rows]
      filled = here + here[-1:] * (rows - len(here))  # one shape for all
      prompts = batches.prompts([encoded[i] for i in filled], len(words), widths, tokenizer.pad_id)
      batch = batches.answered(prompts, replies * rows, (max(map(len, replies)),),
                               tokenizer.pad_id)
      each = sharding.fetch(score(params, sharding.put(batch, spread))).reshape(rows, len(words))
      if np.isnan(each).any():  # which is neither yes nor no, and would be counted as no
        raise FloatingPointError(f"the judge's log-probabilities of {', '.join(words)} are NaN; "
                                 "look at its weights and its compute dtype")
      for i, values in zip(here, each.tolist()):
        found[i] = tuple(values)
    return found

  return ask


def word_logprobs(model: Any, params: Any, batch: batches.Batch) -> jax.Array:
  """f32[B]: the log-probability of each row's response as a beginning, nats."""
  return masked.row_sum(scorer.logprobs(model, params, batch)[0], batch.mask)
