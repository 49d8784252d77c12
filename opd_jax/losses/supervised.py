"""Maximum likelihood of given responses: cross-entropy, and EVE's weighted form."""

from collections.abc import Callable

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses import masked

Metrics = dict[str, Array]


def sft(logprobs: Array, mask: Array,
        aggregate: Callable[[Array, Array], Array] = masked.token_mean) -> tuple[Array, Metrics]:
  """Cross-entropy of given responses.

  Args:
    logprobs: f32[B, T], student log-probability of each given token, in nats.
    mask: bool[B, T], true for tokens to learn.
    aggregate: reduction over tokens, from `masked`.
  Returns: scalar loss and metrics "loss/nll" (mean over tokens, whatever the aggregation).
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: METHODS 6, stage 1.
  """
  chex.assert_rank(logprobs, 2)
  chex.assert_equal_shape([logprobs, mask])
  nll = -jnp.where(mask, logprobs, 0.0)
  return aggregate(nll, mask), {"loss/nll": masked.token_mean(jax.lax.stop_gradient(nll), mask)}


def weighted_sft(logprobs: Array, mask: Array, weights: Array) -> tuple[Array, Metrics]:
  """EVE's objective: likelihood of a prompt's G responses, by how much the weak teacher likes each.

      loss = -mean_{p,k} F_pk sum_t log pi(y_pk,t)

  Args:
    logprobs: f32[P, G, T], student log-probability of each given token, in nats.
    mask: bool[P, G, T], true for real tokens.
    weights: f32[P, G], from `weights.self_normalized` (mean 1 over a group); no gradient.
  Returns: scalar loss, nats per response, empty responses left out of the mean; metrics
    "loss/nll" (unweighted mean over tokens), "loss/effective_responses" (of the G, mean over
    prompts: G if the weights are equal, 1 if one response has it all).
  Raises: AssertionError at trace time if shapes do not fit.
  Source: EVE, equation 8; METHODS 6, stage 3.
  """
  chex.assert_rank([logprobs, weights], [3, 2])
  chex.assert_equal_shape([logprobs, mask])
  chex.assert_equal_shape_prefix([logprobs, weights], 2)
  weights = jax.lax.stop_gradient(weights)
  nll = -jnp.where(mask, logprobs, 0.0)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  loss = masked.sequence_sum(flat(nll * weights[..., None]), flat(mask))
  squares = jnp.sum(jnp.square(weights), axis=1, keepdims=True)
  effective = (jnp.square(jnp.sum(weights, axis=1, keepdims=True))
               / jnp.where(squares > 0.0, squares, 1.0))
  return loss, {
      "loss/nll": masked.token_mean(jax.lax.stop_gradient(flat(nll)), flat(mask)),
      "loss/effective_responses": masked.token_mean(effective, jnp.any(mask, axis=(1, 2))[:, None]),
  }
