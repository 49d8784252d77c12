"""Sampling: prefill, then a `lax.while_loop` over single tokens with a KV cache."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.models import layers
from opd_jax.sharding import constrain


BLOCK = 256  # near the square root of common vocabularies


class Sampling(NamedTuple):
  """How tokens are drawn. Static: changing it compiles anew."""

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0            # 0: all of the vocabulary
  top_p: float = 1.0


class Rollout(NamedTuple):
  response: Array          # i32[B, T], `pad_id` after the end
  mask: Array              # bool[B, T], true up to and including EOS
  sampler_logprobs: Array  # f32[B, T], nats, 0 outside the mask


def sampling_logprobs(logits: Array, sampling: Sampling) -> Array:
  """Log of the distribution that is sampled from: after temperature, top-k and top-p.

  Args:
    logits: f32[B, V].
    sampling: temperature > 0; the top-k filter keeps ties with the k-th logit; the top-p
      filter keeps the fewest most likely tokens whose mass reaches p.
  Returns: f32[B, V], normalized; -inf for tokens that cannot be drawn.
  """
  logits = logits / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits >= kth, logits, -jnp.inf)
  if sampling.top_p < 1.0:
    ordered = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(mass, axis=-1) - mass < sampling.top_p  # mass before this token
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1)


def draw(logits: Array, keys: Array, sampling: Sampling) -> tuple[Array, Array]:
  """One token a row, with its log-probability under `sampling_logprobs`.

  The Gumbel-max trick in two levels: first a block of `BLOCK` ids by the mass of the blocks, then
  one of its ids. It is the same distribution as over all ids at once, but V / BLOCK + BLOCK random
  numbers do for it instead of V, which a CPU draws in the time of all layers of a 135M model.

  Args:
    logits: f32[B, V].
    keys: [B] PRNG keys.
    sampling: temperature, top-k, top-p; at temperature 0 the most likely token, with
      log-probability 0.
  Returns: ids i32[B], log-probabilities f32[B].
  """
  rows, size = logits.shape
  greedy = sampling.temperature == 0
  scores = logits if greedy else sampling_logprobs(logits, sampling)
  blocks = jnp.pad(scores, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
  blocks = blocks.reshape(rows, -1, BLOCK)
  if greedy:
    masses, noise = jnp.max(blocks, axis=-1), jnp.zeros((rows, 1))
  else:
    masses = jnp.log(jnp.sum(jnp.exp(blocks), axis=-1))
    # The last are the blocks' own, so that ids beyond the vocabulary change no random number.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK + blocks.shape[1],)))(keys)
  block = jnp.argmax(masses + noise[:, -masses.shape[1]:], axis=-1)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  token = block * BLOCK + jnp.argmax(inside + noise[:, :BLOCK], axis=-1)
  chosen = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32), jnp.zeros_like(chosen) if greedy else chosen


def sample(model: nn.Module, params: Any, prompt: Array, prompt_mask: Array, key: Array, *,
           max_response: int, eos_ids: tuple[int, ...], pad_id: int, vocab_size: int,
           sampling: Sampling = Sampling()) -> Rollout:
  """Samples one response a row; stops as soon as every row has ended.

  Randomness belongs to (key, row, position): a row's text depends neither on the other
  rows' lengths nor on padding.

  Args:
    model, params: the policy.
    prompt, prompt_mask: [B, S], left-padded.
    key: scalar PRNG key of this rollout.
    max_response: T, the longest response in tokens, EOS included.
    eos_ids: ids that end a response; pad_id: what stands after it.
    vocab_size: the tokenizer's; ids from there on are padding of the model and never drawn.
    sampling: temperature, top-k, top-p.
  Returns: Rollout of [B, T] arrays. Without EOS a row is truncated: its mask is all true.
  """
  rows, width = prompt.shape
  eos = jnp.asarray(eos_ids, jnp.int32)
  row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
  keys_at = lambda t: jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys)

  lengths = jnp.sum(prompt_mask, axis=1)
  positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
  # The last token is never fed back, so T - 1 slots suffice behind the prompt.
  cache = layers.empty_cache(model.config, rows, width + max_response - 1, model.dtype)
  hidden, cache = model.apply({"params": params}, prompt, positions,
                              prompt_mask.astype(jnp.int32), cache)
  logits = model.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]

  def emit(t, logits, ended, out):
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    token, logprob = draw(logits, keys_at(t), sampling)
    put = lambda array, column, blank: array.at[:, t].set(jnp.where(ended, blank, column))
    out = Rollout(put(out.response, token, pad_id), put(out.mask, True, False),
                  put(out.sampler_logprobs, logprob, 0.0))
    return token, ended | jnp.isin(token, eos), out

  def cond(state):
    t, _, ended, _, _ = state
    return (t < max_response) & ~jnp.all(ended)

  def body(state):
    t, token, ended, cache, out = state
    hidden, cache = model.apply({"params": params}, token[:, None], (lengths + t - 1)[:, None],
                                jnp.ones((rows, 1), jnp.int32), cache)
    logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
    token, ended, out = emit(t, logits, ended, out)
    return t + 1, token, ended, cache, out

  shape = (rows, max_response)
  out = Rollout(constrain(jnp.full(shape, pad_id, jnp.int32), "batch", None),
                constrain(jnp.zeros(shape, bool), "batch", None),
                constrain(jnp.zeros(shape, jnp.float32), "batch", None))
  token, ended, out = emit(0, logits, jnp.zeros((rows,), bool), out)
  return jax.lax.while_loop(cond, body, (jnp.ones((), jnp.int32), token, ended, cache, out))[-1]
