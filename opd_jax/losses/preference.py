"""Losses over pairs: one response is better than another.

Given pairs are arrays [B]; the last argument `mask` says which exist, so that a batch can be filled
up and cut into micro-batches; None means all. Pairs among the G responses to a prompt are formed
from rewards [P, G]. Losses are means over the pairs of the whole batch.

The responses of such a pair may be in different micro-batches. The signals at the end of the file
are the losses' gradient as one number a response, with which each can be learned from alone.
"""

from collections.abc import Callable

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


def pairs(rewards: Array, real: Array) -> Array:
  """Which response of a group beats which: all of the group against each other.

  Args:
    rewards: f32[P, G], any unit; the strictly larger wins, and NaN is in no pair.
    real: bool[P, G], responses with a token to learn from; others are in no pair.
  Returns: bool[P, G, G], true at [p, i, j] if i beats j: nowhere in a group of one, or one whose
    rewards are all equal.
  Raises: AssertionError at trace time if shapes differ or are not [P, G].
  Source: METHODS 4, baselines. (SimPO's own data have the best against the worst of a graded group;
    a verifier's rewards are mostly 0 and 1, which leaves many of both.)
  """
  chex.assert_rank([rewards, real], 2)
  chex.assert_equal_shape([rewards, real])
  both = real[:, :, None] & real[:, None, :]
  return both & (rewards[:, :, None] > rewards[:, None, :])


def _sides(rows: Array, better: Array) -> tuple[Array, Array]:
  """Values [P, G] of the better and of the worse response of every pair of `better`: [P*G*G] each.

  Static shapes: pairs that do not exist have values too.
  """
  chex.assert_equal_shape([rows, better[:, 0]])
  return (jnp.broadcast_to(rows[:, :, None], better.shape).reshape(-1),
          jnp.broadcast_to(rows[:, None, :], better.shape).reshape(-1))


def group_dpo(policy: Array, reference: Array, rewards: Array, real: Array, beta: float = 0.1
              ) -> tuple[Array, Metrics]:
  """Direct preference optimization over all pairs of every prompt's group.

  Every pair counts the same, so a group counts by how many it has.

  Args:
    policy: f32[P, G], log-probability of each whole response under the policy
      (`masked.row_sum`), in nats; the argument with a gradient.
    reference: f32[P, G], the same under the fixed reference.
    rewards, real: as in `pairs`.
    beta: strength of the pull to the reference, > 0.
  Returns: scalar loss (nats), 0 without gradient if there is no pair, and the metrics of `dpo` with
    "loss/pairs" (their number).
  Raises: AssertionError at trace time if shapes differ or are not [P, G].
  Source: "Direct Preference Optimization", equation 7; METHODS 4, baselines.
  """
  better = pairs(rewards, real)
  loss, metrics = dpo(*_sides(policy, better), *_sides(reference, better), beta,
                      mask=better.reshape(-1))
  return loss, metrics | {"loss/pairs": jnp.sum(better, dtype=jnp.float32)}


def group_simpo(policy: Array, rewards: Array, real: Array, beta: float = 2.0, margin: float = 1.0
                ) -> tuple[Array, Metrics]:
  """Simple preference optimization over all pairs of every prompt's group.

  Args:
    policy: f32[P, G], mean log-probability of each response's tokens under the policy
      (`masked.row_mean`), in nats per token; the argument with a gradient.
    rewards, real: as in `pairs`.
    beta, margin: as in `simpo`.
  Returns: scalar loss (nats), 0 without gradient if there is no pair, and the metrics of `simpo`
    with "loss/pairs" (their number).
  Raises: AssertionError at trace time if shapes differ or are not [P, G].
  Source: as `simpo`; METHODS 4, baselines.
  """
  better = pairs(rewards, real)
  loss, metrics = simpo(*_sides(policy, better), beta, margin, mask=better.reshape(-1))
  return loss, metrics | {"loss/pairs": jnp.sum(better, dtype=jnp.float32)}


def _signal(loss: Callable[[Array], tuple[Array, Metrics]], policy: Array, real: Array) -> Array:
  """-R dloss/dpolicy: the R undoes the division of a mean over the R real responses."""
  gradient, _ = jax.grad(loss, has_aux=True)(policy)
  return jax.lax.stop_gradient(-jnp.sum(real, dtype=policy.dtype) * gradient)


def dpo_signal(policy: Array, reference: Array, rewards: Array, real: Array, beta: float = 0.1
               ) -> Array:
  """`group_dpo` as a signal, the same at every token of a response.

      signal_i = R beta / N (sum_{j: i beats j} sigmoid(-h_ij) - sum_{j: j beats i} sigmoid(-h_ji))

  with h the margin of a pair, N pairs and R real responses. With it `score_function_loss`,
  aggregated by `sequence_sum`, has the gradient of `group_dpo`: exactly, where the policy is as it
  was when the signal was formed, which is a batch's first update; whatever the micro-batches.

  A policy equal to its reference has R beta / 2N (wins - losses), which for rewards of 0 and 1 is
  G times the centered reward: there DPO is a policy gradient with the group's mean as baseline.

  Args: as `group_dpo`, of the whole batch; none has a gradient.
  Returns: f32[P, G], its sum over a group 0; a caller reshapes to [B] and broadcasts over tokens.
    All 0 if there is no pair: nothing is to be learned, and a caller skips the update.
  Raises: AssertionError at trace time if shapes differ or are not [P, G].
  Source: the chain rule, on "Direct Preference Optimization", equation 7.
  """
  return _signal(lambda x: group_dpo(x, reference, rewards, real, beta), policy, real)


def simpo_signal(policy: Array, rewards: Array, real: Array, beta: float = 2.0, margin: float = 1.0
                 ) -> Array:
  """`group_simpo` as a signal, the same at every token of a response.

  As `dpo_signal`, except that h is SimPO's margin less gamma, and that the aggregation with which
  `score_function_loss` has the gradient of `group_simpo` is `sequence_mean`.

  Args: as `group_simpo`, of the whole batch; none has a gradient.
  Returns, Raises: as `dpo_signal`.
  Source: the chain rule, on SimPO, equation 6.
  """
  return _signal(lambda x: group_simpo(x, rewards, real, beta, margin), policy, real)
