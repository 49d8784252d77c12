"""A teacher that reads every response behind a context of its own, which the student does not see.

    contexts -> blocks of like length -> the teacher's states and log-probabilities -> a batch

Contexts differ in length, responses align: column t of all that is found speaks about token t.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import sharding
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.teachers import contexts

# (params, batch, its contexts) -> the batch with the teacher's arrays, and metrics.
Read = Callable[[Any, Batch, Sequence[contexts.Context]], tuple[Batch, dict[str, float]]]


def make(section: ml_collections.ConfigDict, states: bool, model: Any, pad_id: int,
         mesh: Mesh) -> Read:
  """The function that has a teacher read.

  A row whose context gained nothing is not read and carries no loss; neither does a token that the
  teacher gives no probability.

  Args:
    section: the `context` section: budget, buckets, tokens.
    states: whether the teacher's states are wanted beside its log-probabilities, as they are by
      the distribution-level losses.
    model: the teacher's, a module or a scorer.Mixture.
    pad_id: of the teacher's tokenizer.
    mesh: rows are spread over its `replica` and `data` axes.
  """
  spread = sharding.of_batch(mesh)
  start, hear, whole = compiled(model, states)

  def read(params: Any, batch: Batch,
           made: Sequence[contexts.Context]) -> tuple[Batch, dict[str, float]]:
    gained = contexts.gained(made)
    rows, columns = batch.response.shape
    blocks = contexts.pack(made, np.flatnonzero(gained).tolist(), widths(section),
                           at_a_time(section, rows, columns, sharding.ways("batch", mesh)), pad_id)
    found = start(params, batch)
    for block in blocks:
      found = hear(params, found, batch, sharding.put(block, spread))
    lengths = sharding.fetch(batch.mask).sum(axis=1)
    metrics = contexts.metrics(made) | contexts.packing(blocks, made, lengths, columns)
    return whole(batch, found, sharding.put(gained, spread)), metrics

  return read


def compiled(model: Any, states: bool) -> tuple[Callable, Callable, Callable]:
  """The device's part of reading: `unheard`, `heard` and `finished`, to be compiled."""
  return (jax.jit(functools.partial(unheard, model, states)),
          jax.jit(functools.partial(heard, model, states), donate_argnums=1), jax.jit(finished))


def widths(section: ml_collections.ConfigDict) -> tuple[int, ...]:
  """The lengths that contexts are padded to."""
  return (*section.buckets, section.budget)


def at_a_time(section: ml_collections.ConfigDict, rows: int, columns: int,
              multiple: int) -> Callable[[int], int]:
  """How many rows are read in one call: a function of the width of their contexts.

  As many as context.tokens allow. Where it does not say all `rows`, or with buckets a quarter of
  them: in one block of all the longest context would decide how wide the others are.
  """
  if section.tokens:
    return lambda width: contexts.block_rows(section.tokens, width, columns, multiple)
  most = math.ceil(rows / 4) if section.buckets else rows
  return lambda width: math.ceil(most / multiple) * multiple


def check_lengths(config: ml_collections.ConfigDict, policy: policies.Policy) -> None:
  """Refuses contexts that together with a response exceed what their reader allows."""
  allowed, rollout = policy.model.config.max_positions, config.rollout
  longest = widths(config.context)[-1]
  if config.context.budget < rollout.max_prompt:
    raise ValueError(f"context.budget is {config.context.budget} tokens, but a prompt alone may "
                     f"have rollout.max_prompt = {rollout.max_prompt}")
  if longest + rollout.max_response > allowed:
    raise ValueError(f"context.budget + rollout.max_response is {longest} + "
                     f"{rollout.max_response} tokens, but the teacher allows {allowed}; shorten "
                     "one")


def heads(model: Any, params: Any) -> Array:
  """A teacher's head in its compute dtype."""
  dtype = model.model.dtype if isinstance(model, scorer.Mixture) else model.dtype
  return scorer.head(model, params).astype(dtype)


def unheard(model: Any, states: bool, params: Any, batch: Batch) -> dict[str, Array]:
  """What `heard` fills in, all zeros."""
  blank = {"teacher_logprobs": jnp.zeros(batch.response.shape, jnp.float32)}
  if states:
    shape = jax.eval_shape(functools.partial(scorer.hidden, model), params, batch)
    blank["teacher_hidden"] = jnp.zeros(shape.shape, shape.dtype)
  return blank


def heard(model: Any, states: bool, params: Any, found: dict[str, Array], batch: Batch,
          block: contexts.Block) -> dict[str, Array]:
  """The teacher's words on the responses of a block's rows, each behind its own context."""
  mine = lambda x: x.at[block.row].get(mode="clip")
  part = Batch(block.prompt, block.prompt_mask, mine(batch.response), mine(batch.mask))
  hidden = scorer.hidden(model, params, part)
  logprobs, _ = scorer.token_logprobs(model, params, hidden, part.response)
  new = {"teacher_logprobs": logprobs} | ({"teacher_hidden": hidden} if states else {})
  return {name: x.at[block.row].set(new[name], mode="drop") for name, x in found.items()}


def finished(batch: Batch, found: dict[str, Array], gained: Array) -> Batch:
  """The batch with what was heard; of rows whose context gained nothing no token is learned."""
  learn = batch.learn & gained[:, None] & jnp.isfinite(found["teacher_logprobs"])
  return batch.replace(**found, learn=learn)
