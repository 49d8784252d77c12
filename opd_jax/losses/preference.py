"""Losses over pairs [B]: one response is better than another.

The last argument `mask` says which pairs exist, so that a batch can be filled up and cut into
micro-batches; None means all. Losses are means over the pairs of the whole batch.
"""

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses import masked

Metrics = dict[str, Array]


def _blank(mask: Array | None, *columns: Array) -> tuple[Array, list[Array]]:
  """The mask, and the columns with 0 in pairs that do not exist, where they may hold anything."""
  mask = jnp.ones_like(columns[0], bool) if mask is None else mask
  chex.assert_rank([mask, *columns], 1)
  chex.assert_equal_shape([mask, *columns])
  return mask, [jnp.where(mask, x, 0.0) for x in columns]


def _mean(x: Array, mask: Array) -> Array:
  """Mean over the pairs that exist."""
  return masked.token_mean(x[:, None], mask[:, None])


def _metrics(margin: Array, mask: Array) -> Metrics:
  """By how much the better response leads, and how often."""
  margin = jax.lax.stop_gradient(margin)
  won = (margin > 0.0).astype(margin.dtype)
  return {"loss/margin": _mean(margin, mask), "loss/pair_accuracy": _mean(won, mask)}


def dpo(policy_chosen: Array, policy_rejected: Array, reference_chosen: Array,
        reference_rejected: Array, beta: float = 0.1, label_smoothing: float = 0.0,
        mask: Array | None = None) -> tuple[Array, Metrics]:
  """Direct preference optimization.

      h = beta ((log pi - log ref)(chosen) - (log pi - log ref)(rejected))
      loss = -mean((1 - eps) log sigmoid(h) + eps log sigmoid(-h))

  Args:
    policy_chosen, policy_rejected: f32[B], log-probability of each whole response under the
      policy, in nats; the arguments with a gradient.
    reference_chosen, reference_rejected: f32[B], the same under the fixed reference.
    beta: strength of the pull to the reference, > 0.
    label_smoothing: eps, the probability that a label is wrong, in [0, 0.5).
    mask: bool[B], pairs that exist.
  Returns: scalar loss (nats) and metrics "loss/margin" (mean h), "loss/pair_accuracy",
    "loss/chosen_reward", "loss/rejected_reward" (beta times the log-ratio, means).
  Raises: AssertionError at trace time if shapes differ or are not [B]; ValueError for a
    label_smoothing outside [0, 0.5).
  Source: "Direct Preference Optimization"; smoothing: Mitchell, "A note on DPO with noisy
    preferences". EVE uses beta 0.1, and 0.05 with weak-reward labels.
  """
  if not 0.0 <= label_smoothing < 0.5:
    raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")
  mask, (chosen, rejected, reference_chosen, reference_rejected) = _blank(
      mask, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
  chosen_reward = beta * (chosen - jax.lax.stop_gradient(reference_chosen))
  rejected_reward = beta * (rejected - jax.lax.stop_gradient(reference_rejected))
  margin = chosen_reward - rejected_reward
  values = -((1.0 - label_smoothing) * jax.nn.log_sigmoid(margin)
             + label_smoothing * jax.nn.log_sigmoid(-margin))
  return _mean(values, mask), {
      **_metrics(margin, mask),
      "loss/chosen_reward": _mean(jax.lax.stop_gradient(chosen_reward), mask),
      "loss/rejected_reward": _mean(jax.lax.stop_gradient(rejected_reward), mask),
  }


def simpo(chosen: Array, rejected: Array, beta: float = 2.0, margin: float = 1.0,
          mask: Array | None = None) -> tuple[Array, Metrics]:
  """Simple preference optimization: no reference, lengths divided out.

      loss = -mean(log sigmoid(beta (chosen - rejected) - margin))

  Args:
    chosen, rejected: f32[B], mean log-probability of each response's tokens under the policy
      (`masked.row_mean`), in nats per token.
    beta: scale, > 0.
    margin: gamma, by how much the chosen should win, in nats.
    mask: bool[B], pairs that exist.
  Returns: scalar loss (nats) and metrics "loss/margin" (mean beta (chosen - rejected)),
    "loss/pair_accuracy".
  Raises: AssertionError at trace time if shapes differ or are not [B].
  Source: "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6;
    defaults those of the MOPD baseline.
  """
  mask, (chosen, rejected) = _blank(mask, chosen, rejected)
  gap = beta * (chosen - rejected)
  return _mean(-jax.nn.log_sigmoid(gap - margin), mask), _metrics(gap, mask)


def bradley_terry(chosen: Array, rejected: Array, mask: Array | None = None
                  ) -> tuple[Array, Metrics]:
  """Fits a reward model to preferences: P(chosen > rejected) = sigmoid(r_chosen - r_rejected).

  Args:
    chosen, rejected: f32[B], reward of each response, in nats.
    mask: bool[B], pairs that exist.
  Returns: scalar loss -mean(log sigmoid(chosen - rejected)) and metrics "loss/margin",
    "loss/pair_accuracy".
  Raises: AssertionError at trace time if shapes differ or are not [B].
  Source: Bradley and Terry (1952); METHODS 6, stage 1.
  """
  mask, (chosen, rejected) = _blank(mask, chosen, rejected)
  gap = chosen - rejected
  return _mean(-jax.nn.log_sigmoid(gap), mask), _metrics(gap, mask)
