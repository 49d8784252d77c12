"""A model as a function from conversations to responses, for pipelines that talk in text.

Models that talk in text may have different tokenizers, and chat templates that think or do not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections

from opd_jax import sharding
from opd_jax.data import chat
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts.sampler import Sampling


class Response(NamedTuple):
  """What a model said, and how it stopped."""

  text: str
  ids: list[int]   # of the model's own tokenizer, with the EOS that ends them
  ended: bool      # False: cut off by the length limit


# (params, conversations, key) -> a response each, or a group of them one behind the other; None to
# a conversation that is too long.
Respond = Callable[[Any, Sequence[chat.Messages], jax.Array], list[Response | None]]


def make(policy: policies.Policy, rollout: ml_collections.ConfigDict, sampling: Sampling,
         rows: int, mesh: Mesh, group: int = 1) -> Respond:
  """The function of one model, whose parameters are given at each call.

  What a conversation gets depends on its text, its place and the key, and on no other's.

  Args:
    policy: whose model and tokenizer are used.
    rollout: the `rollout` section; a conversation of more than its max_prompt tokens is too long.
    sampling: how tokens are drawn.
    rows: conversations at a time, one shape for all.
    group: responses to each, that of place i from i * group on.
    mesh: rows are spread over its `replica` and `data` axes.
  """
  tokenizer = policy.tokenizer
  sample = policies.make_sampler(policy.model, tokenizer, rollout, sampling)
  spread = sharding.of_batch(mesh)

  def respond(params: Any, conversations: Sequence[chat.Messages],
              key: jax.Array) -> list[Response | None]:
    encoded = [tokenizer.encode_chat(messages) for messages in conversations]
    found: list[Response | None] = [None] * (len(encoded) * group)
    for start in range(0, len(encoded), rows):
      fits = {i: ids for i, ids in enumerate(encoded[start:start + rows], start)
              if len(ids) <= rollout.max_prompt}
      if not fits:
        continue
      # A row's randomness is that of its place: those that do not fit keep theirs, with filler.
      filler = next(iter(fits.values()))
      ids = [fits.get(i, filler) for i in range(start, start + rows)]
      prompts = batches.prompts(ids, group, policies.buckets(rollout), tokenizer.pad_id)
      batch = sample(params, sharding.put(prompts, spread), jax.random.fold_in(key, start))
      response, mask = sharding.fetch(batch.response), sharding.fetch(batch.mask)
      for place in (i * group + j for i in fits for j in range(group)):
        row = place - start * group
        said = response[row][mask[row]].tolist()
        found[place] = Response(tokenizer.decode(said), said, said[-1] in tokenizer.eos_ids)
    return found

  return respond
