"""Means over real tokens and responses: the only place that divides by a count.

Every aggregation names its denominator, which is that of the whole batch. A batch cut into
micro-batches gives the same loss if each one's mean enters with its share of `COUNTS`.
"""

import chex
from jax import Array
import jax.numpy as jnp


def tokens(mask: Array) -> Array:
  """Number of real tokens, f32[]."""
  return jnp.sum(mask, dtype=jnp.float32)


def responses(mask: Array) -> Array:
  """Number of rows with a real token, f32[]."""
  return jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)


def row_sum(x: Array, mask: Array) -> Array:
  """Sum over each response's real tokens: [B, T] -> [B], 0 for an empty row."""
  chex.assert_rank([x, mask], 2)
  chex.assert_equal_shape([x, mask])
  # where, not a product: what stands in padding may be NaN, and so would its gradient.
  return jnp.sum(jnp.where(mask, x, 0.0), axis=1)


def row_mean(x: Array, mask: Array) -> Array:
  """Mean over each response's real tokens: [B, T] -> [B], 0 for an empty row."""
  return row_sum(x, mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def token_mean(x: Array, mask: Array) -> Array:
  """Mean over all real tokens of the batch: every token counts the same.

  Args:
    x: f32[B, T], any unit.
    mask: bool[B, T], true for real tokens.
  Returns: f32[], in the unit of x; 0 if there is no real token.
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: METHODS 1, aggregation.
  """
  return jnp.sum(row_sum(x, mask)) / jnp.maximum(tokens(mask), 1.0)


def sequence_mean(x: Array, mask: Array) -> Array:
  """Mean over each response's tokens, then over responses: every response counts the same.

  Args, Returns, Raises, Source as `token_mean`. Empty rows leave the denominator.
  """
  return jnp.sum(row_mean(x, mask)) / jnp.maximum(responses(mask), 1.0)


def sequence_sum(x: Array, mask: Array) -> Array:
  """Sum over each response's tokens, then the mean over responses: nats per response.

  Args, Returns, Raises, Source as `token_mean`. Empty rows leave the denominator.
  """
  return jnp.sum(row_sum(x, mask)) / jnp.maximum(responses(mask), 1.0)


AGGREGATES = {"token_mean": token_mean, "sequence_mean": sequence_mean,
              "sequence_sum": sequence_sum}
COUNTS = {"token_mean": tokens, "sequence_mean": responses, "sequence_sum": responses}
