"""Weights: how much each token or response counts. No gradient flows through."""

import fractions
import math

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses import masked

# Beyond this many nats a ratio is a numerical accident, not information.
MAX_LOG_RATIO = 20.0


def uniform(student: Array, teacher: Array, mask: Array) -> Array:
  """Every token counts the same: ones [B, T], whatever the models say."""
  chex.assert_equal_shape([student, teacher, mask])
  return jnp.ones_like(student)


def iw_opd(student: Array, teacher: Array, mask: Array, max_weight: float = 1.5,
           signed: bool = False, unit_mean: bool = False) -> Array:
  """More weight before the student has drifted from the teacher than after.

      d_t = |log q - log p|,  F_t = sum_{k<t} d_k / (sum_k d_k + 1e-8)
      weight = 1 + (max_weight - 1) clip(1 - F_t, 0, 1)

  The first token weighs `max_weight`, the last about 1. The weight needs the whole response:
  it cannot be formed while sampling.

  Args:
    student, teacher: f32[B, T], log-probability of each sampled token, in nats. A gap that is
      not finite (a banned token) counts as none.
    mask: bool[B, T], true for real tokens.
    max_weight: g_max >= 1; 1 gives unit weights.
    signed: d_t = log q - log p, without the absolute value.
    unit_mean: divide each response's weights by their mean. The plain weight lies in
      [1, max_weight] and so raises the effective learning rate: report both when comparing.
  Returns: f32[B, T] in [1, max_weight] (1 outside the mask) unless unit_mean; no gradient.
  Raises: AssertionError at trace time on shapes; ValueError for max_weight < 1.
  Source: IW-OPD (2606.22600); METHODS 3.
  """
  chex.assert_rank(student, 2)
  chex.assert_equal_shape([student, teacher, mask])
  if max_weight < 1.0:
    raise ValueError(f"max_weight is {max_weight}; iw_opd needs max_weight >= 1 (1: no weighting)")
  gap = teacher - student if signed else jnp.abs(teacher - student)
  gap = jnp.where(mask & jnp.isfinite(gap), gap, 0.0)
  before = jnp.cumsum(gap, axis=1) - gap
  drifted = before / (jnp.sum(gap, axis=1, keepdims=True) + 1e-8)
  weight = jnp.where(mask, 1.0 + (max_weight - 1.0) * jnp.clip(1.0 - drifted, 0.0, 1.0), 1.0)
  if unit_mean:
    mean = masked.row_mean(weight, mask)[:, None]
    weight = jnp.where(mask, weight / jnp.where(mean > 0.0, mean, 1.0), 1.0)
  return jax.lax.stop_gradient(weight)


def position(mask: Array, fraction: float, side: str) -> Array:
  """The first or last part of each response: ceil(fraction x length) of its tokens.

  As a mask it changes the denominator too; as a weight it does not.

  Args:
    mask: bool[B, T], true for real tokens.
    fraction: part of each response's real tokens, in [0, 1].
    side: "prefix" for the first tokens, "suffix" for the last.
  Returns: bool[B, T], a subset of mask.
  Raises: AssertionError on shapes; ValueError for an unknown side or a fraction outside [0, 1].
  Source: IW-OPD's diagnosis; METHODS 3.
  """
  chex.assert_rank(mask, 2)
  if side not in ("prefix", "suffix"):
    raise ValueError(f"side is {side!r}; it must be 'prefix' or 'suffix'")
  if not 0.0 <= fraction <= 1.0:
    raise ValueError(f"fraction is {fraction}; it must lie in [0, 1]")
  mask = mask.astype(bool)
  # In whole numbers: ceil(0.07 * 100) is 8 in floating point.
  part = fractions.Fraction(fraction).limit_denominator(10_000)
  rank, length = jnp.cumsum(mask, axis=1), jnp.sum(mask, axis=1, keepdims=True)
  count = -((-part.numerator * length) // part.denominator)
  return mask & (rank <= count if side == "prefix" else rank > length - count)


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


def self_normalized(weak: Array, weak_reference: Array, ratio: float = 1.0) -> Array:
  """EVE's weight of each of a prompt's G responses, with mean 1 over the group.

      F_k = G softmax_k(ratio * (log pi_weak(y_k) - log pi_weak_ref(y_k))),  ratio = beta / lambda

  This is the paper's equation 8. Its prose on extreme ratios describes the reciprocal: here 0
  gives uniform weights and infinity a one-hot. The paper's variant 11.1 (weak samples alone) is
  the same function of (log pi_strong_ref, log pi_weak_ref) with ratio 1/lambda.

  Args:
    weak, weak_reference: f32[P, G], log-probability of each whole response under the aligned
      weak model and under the one it started from, in nats.
    ratio: beta / lambda >= 0, finite.
  Returns: f32[P, G], >= 0, no gradient flows through it.
  Raises: AssertionError at trace time if shapes differ or are not [P, G]; ValueError for a ratio
    that is negative or not finite.
  Source: EVE, equation 8 and appendix 11.1; METHODS 6.
  """
  chex.assert_rank(weak, 2)
  chex.assert_equal_shape([weak, weak_reference])
  if not 0.0 <= ratio < math.inf:
    raise ValueError(f"ratio is {ratio}; beta / lambda must be finite and >= 0 (0: all the same)")
  weight = jax.nn.softmax(ratio * (weak - weak_reference), axis=1) * weak.shape[1]
  return jax.lax.stop_gradient(weight)

