"""Surrogates over sampled tokens: how a signal becomes a descent direction."""

from collections.abc import Callable

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses.masked import token_mean

Metrics = dict[str, Array]


def score_function_loss(logprobs: Array, signal: Array, mask: Array, weight: Array | None = None,
                        aggregate: Callable[[Array, Array], Array] = token_mean
                        ) -> tuple[Array, Metrics]:
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
  weighted = jax.lax.stop_gradient(signal if weight is None else signal * weight)
  # Padding may hold -inf; -inf times a zero signal would be NaN.
  value = -jnp.where(mask, weighted, 0.0) * jnp.where(mask, logprobs, 0.0)
  return aggregate(value, mask), {"loss/signal": token_mean(weighted, mask)}
