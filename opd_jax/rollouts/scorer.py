"""Scoring given responses. The only file that shifts logits.

The hidden state of the slot *before* a token predicts it, so column t of everything here
speaks about `response[:, t]`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
from jax import Array
import jax.numpy as jnp

from opd_jax.losses import fused
from opd_jax.models import build as models
from opd_jax.rollouts.batch import Batch
from opd_jax.sharding import constrain


class Mixture(NamedTuple):
  """One model with several parameters: its logits are theirs, added up in these shares.

  Their states stand side by side, [B, T, N D], and their heads one above the other, [N D, V], so
  the product of the two is that sum, and whoever takes states and a head takes a mixture's.
  """

  model: nn.Module
  shares: tuple[float, ...]  # N of them, one for each tree in `params`


def hidden(model: nn.Module | Mixture, params: Any, batch: Batch) -> Array:
  """Hidden states that predict the response: [B, T, D] in the compute dtype."""
  if isinstance(model, Mixture):
    return jnp.concatenate([hidden(model.model, each, batch) for each in params], axis=-1)
  width = batch.prompt.shape[1]
  tokens = jnp.concatenate([batch.prompt, batch.response], axis=1)[:, :-1]
  real = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)[:, :-1]
  positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
  states, _ = model.apply({"params": params}, tokens, positions, real.astype(jnp.int32))
  return states[:, width - 1:]


def head(model: nn.Module | Mixture, params: Any) -> Array:
  """The matrix [D, V] that turns hidden states into logits, laid out for use block by block."""
  if isinstance(model, Mixture):
    return jnp.concatenate([share * head(model.model, each)
                            for share, each in zip(model.shares, params, strict=True)])
  # Gathered along D here, once: inside a loop over blocks it would be gathered for each of them.
  return constrain(models.head(params, model.config), None, "vocab")


def logprobs(model: nn.Module | Mixture, params: Any, batch: Batch) -> tuple[Array, Array]:
  """Log-probability of each response token, and the entropy of the distribution it came from.

  Args:
    model, params: who is asked.
    batch: prompt, response and their masks.
  Returns: (f32[B, T], f32[B, T]) in nats; columns outside the mask are meaningless.
  """
  return token_logprobs(model, params, hidden(model, params, batch), batch.response)


def token_logprobs(model: nn.Module | Mixture, params: Any, states: Array,
                   tokens: Array) -> tuple[Array, Array]:
  """`logprobs` from hidden states [B, T, D] that are already there; tokens i32[B, T]."""
  return fused.fused_logprobs(states, head(model, params), tokens)


def topk_logprobs(model: nn.Module, params: Any, batch: Batch, k: int) -> tuple[Array, Array]:
  """The k most likely tokens of each column: (ids i32[B, T, k], log-probs f32[B, T, k])."""
  return fused.fused_topk(hidden(model, params, batch), head(model, params), k)
