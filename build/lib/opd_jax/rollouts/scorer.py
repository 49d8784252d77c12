"""Scoring given responses. The only file that shifts logits.

The hidden state of the slot *before* a token predicts it, so column t of everything here
speaks about `response[:, t]`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.rollouts.batch import Batch


def hidden(model: nn.Module, params: Any, batch: Batch) -> Array:
  """Hidden states that predict the response: [B, T, D] in the compute dtype."""
  width = batch.prompt.shape[1]
  tokens = jnp.concatenate([batch.prompt, batch.response], axis=1)[:, :-1]
  real = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)[:, :-1]
  positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
  states, _ = model.apply({"params": params}, tokens, positions, real.astype(jnp.int32))
  return states[:, width - 1:]


def logits(model: nn.Module, params: Any, states: Array) -> Array:
  """Hidden states [B, T, D] -> f32[B, T, V]."""
  return model.apply({"params": params}, states, method="logits")


def _chunked(function: Any, chunk: int, states: Array, *columns: Array) -> Any:
  """Applies `function(states, *columns)` to chunks of T columns, so [B, T, V] never exists whole.

  The backward pass recomputes each chunk's logits. chunk=0 means one chunk.
  """
  length = states.shape[1]
  if chunk == 0 or chunk >= length:
    return function(states, *columns)
  pieces = -(-length // chunk)

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], pieces * chunk, *x.shape[3:])[:, :length]

  out = jax.lax.map(lambda args: jax.checkpoint(function)(*args), (cut(states), *map(cut, columns)))
  return jax.tree.map(join, out)


def logprobs(model: nn.Module, params: Any, batch: Batch, chunk: int = 0) -> tuple[Array, Array]:
  """Log-probability of each response token, and the entropy of the distribution it came from.

  Args:
    model, params: who is asked.
    batch: prompt, response and their masks.
    chunk: columns of T whose logits exist at a time; 0 for all.
  Returns: (f32[B, T], f32[B, T]) in nats; columns outside the mask are meaningless.
  """
  return token_logprobs(model, params, hidden(model, params, batch), batch.response, chunk)


def token_logprobs(model: nn.Module, params: Any, states: Array, tokens: Array,
                   chunk: int = 0) -> tuple[Array, Array]:
  """`logprobs` from hidden states [B, T, D] that are already there; tokens i32[B, T]."""
  def one(states, tokens):
    scores = jax.nn.log_softmax(logits(model, params, states), axis=-1)
    chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    # p * log p is 0 at p = 0, also where a banned token has log p = -inf.
    weighted = jnp.where(jnp.isneginf(scores), 0.0, jnp.exp(scores) * scores)
    return chosen, -jnp.sum(weighted, axis=-1)
  return _chunked(one, chunk, states, tokens)


def topk_logprobs(model: nn.Module, params: Any, batch: Batch, k: int,
                  chunk: int = 0) -> tuple[Array, Array]:
  """The k most likely tokens of each column: (ids i32[B, T, k], log-probs f32[B, T, k])."""
  def one(states):
    scores, ids = jax.lax.top_k(logits(model, params, states), k)
    total = jax.nn.logsumexp(logits(model, params, states), axis=-1, keepdims=True)
    return ids, scores - total
  return _chunked(one, chunk, hidden(model, params, batch))


def divergence(kernel: Callable[[Array, Array], Array], student_states: Array, student_head: Array,
               teacher_states: Array, teacher_head: Array, chunk: int = 0) -> Array:
  """A divergence between two models over the vocabulary they share.

  Args:
    kernel: (student logits, teacher logits) [B, T, V] -> [B, T], from losses/divergences.
    student_states, teacher_states: [B, T, D] of each model, from `hidden`.
    student_head, teacher_head: [D, V]; a longer one is padding beyond the shared ids.
    chunk: columns of T whose logits exist at a time; 0 for all.
  Returns: f32[B, T], nats per token, unmasked.
  """
  shared = min(student_head.shape[1], teacher_head.shape[1])
  project = lambda states, head: jnp.einsum(
      "btd,dv->btv", states, head[:, :shared].astype(states.dtype),
      preferred_element_type=jnp.float32)
  return _chunked(lambda s, t: kernel(project(s, student_head), project(t, teacher_head)), chunk,
                  student_states, teacher_states)
