"""Surrogates over sampled tokens: how a signal becomes a descent direction."""

from collections.abc import Callable

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses.masked import token_mean
from opd_jax.losses.weights import MAX_LOG_RATIO

Metrics = dict[str, Array]
Aggregate = Callable[[Array, Array], Array]


def _weighted(signal: Array, mask: Array, weight: Array | None) -> Array:
  """A w, stopped, 0 in padding: there it may be NaN, or meet an infinite log-probability."""
  chex.assert_equal_shape([signal, mask] if weight is None else [signal, mask, weight])
  weighted = signal if weight is None else signal * weight
  return jax.lax.stop_gradient(jnp.where(mask, weighted, 0.0))


def score_function_loss(logprobs: Array, signal: Array, mask: Array, weight: Array | None = None,
                        aggregate: Aggregate = token_mean) -> tuple[Array, Metrics]:
  """The policy-gradient surrogate -mean(A w log p).

  Args:
    logprobs: f32[B, T], student log-probability of each sampled token, in nats; the only
      argument with a gradient.
    signal: f32[B, T], what to learn (A), nats per token or advantage.
    mask: bool[B, T], true for real tokens.
    weight: f32[B, T], how much each token counts (w); None is 1.
    aggregate: reduction over tokens, from `masked`.
  Returns: scalar loss and metrics "loss/signal" (mean of A w over tokens).
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: METHODS 1 and "Settled points".
  """
  chex.assert_rank([logprobs, signal, mask], 2)
  chex.assert_equal_shape([logprobs, signal, mask])
  weighted = _weighted(signal, mask, weight)
  value = -weighted * jnp.where(mask, logprobs, 0.0)
  return aggregate(value, mask), {"loss/signal": token_mean(weighted, mask)}


def clipped_surrogate_loss(logprobs: Array, old_logprobs: Array, signal: Array, mask: Array,
                           weight: Array | None = None, low: float = 0.2, high: float = 0.2,
                           dual: float | None = None, aggregate: Aggregate = token_mean
                           ) -> tuple[Array, Metrics]:
  """PPO's surrogate, for a batch used in more than one update.

      r = p / p_old,  loss = mean(max(-r A w, -clip(r, 1 - low, 1 + high) A w))

  Dual clipping bounds a token of negative signal too: its loss is at most -dual A w.
  At p = p_old the gradient is that of `score_function_loss`.

  Args:
    logprobs: f32[B, T], student log-probability of each sampled token, in nats; the only
      argument with a gradient.
    old_logprobs: f32[B, T], the same at the start of the batch's first update.
    signal, mask, weight, aggregate: as in `score_function_loss`; weight >= 0.
    low, high: how far the ratio may fall below or rise above 1 and still teach.
    dual: bound > 1 for negative signals (3 in METHODS); None for none.
  Returns: scalar loss and metrics "loss/signal" (mean of A w), "loss/clipped" (share of tokens
    whose ratio has no gradient), "loss/ratio_max".
  Raises: AssertionError at trace time if shapes differ; ValueError for dual <= 1.
  Source: "Proximal Policy Optimization Algorithms"; dual clip: "Mastering Complex Control in MOBA
    Games with Deep Reinforcement Learning"; METHODS 1.
  """
  chex.assert_rank([logprobs, old_logprobs, signal, mask], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, signal, mask])
  if dual is not None and dual <= 1.0:
    raise ValueError(f"dual is {dual}; the bound on negative signals must be > 1 (None: no bound)")
  weighted = _weighted(signal, mask, weight)
  old = jax.lax.stop_gradient(jnp.where(mask, old_logprobs, 0.0))
  change = jnp.where(mask, logprobs, 0.0) - old
  ratio = jnp.exp(jnp.clip(change, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  free = -ratio * weighted
  value = jnp.maximum(free, -jnp.clip(ratio, 1.0 - low, 1.0 + high) * weighted)
  if dual is not None:
    value = jnp.where(weighted < 0.0, jnp.minimum(value, -dual * weighted), value)
  metrics = {
      "loss/signal": token_mean(weighted, mask),
      "loss/clipped": token_mean((value != free).astype(jnp.float32), mask),
      "loss/ratio_max": jnp.max(jax.lax.stop_gradient(jnp.where(mask, ratio, 0.0))),
  }
  return aggregate(value, mask), metrics
