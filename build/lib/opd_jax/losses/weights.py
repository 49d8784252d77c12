"""Weights [B, T]: how much each token counts. No gradient flows through."""

import chex
import jax
from jax import Array
import jax.numpy as jnp

# Beyond this many nats a ratio is a numerical accident, not information.
MAX_LOG_RATIO = 20.0


def truncated_importance(now: Array, then: Array, cap: float) -> Array:
  """Importance weight p_now / p_then of each sampled token, cut at `cap`.

  Corrects for the sampler and the trainer disagreeing about the same parameters, or for
  updates made since the batch was sampled.

  Args:
    now, then: f32[B, T], log-probability of each token under the trainer and under the
      policy as the sampler saw it, in nats.
    cap: largest weight; 5 in the OPD family, 2 in MOPD.
  Returns: f32[B, T] in (0, cap], unmasked; no gradient flows through it.
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: METHODS 1: min(exp(clip(log p_now - log mu, +-20)), cap).
  """
  chex.assert_rank(now, 2)
  chex.assert_equal_shape([now, then])
  ratio = jnp.exp(jnp.clip(now - then, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  return jax.lax.stop_gradient(jnp.minimum(ratio, cap))
