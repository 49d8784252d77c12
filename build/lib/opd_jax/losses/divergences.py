"""Divergences between two next-token distributions, [B, T, V] logits -> [B, T] nats.

All have a gradient with respect to the student, none with respect to the teacher.
"""

import chex
import jax
from jax import Array
import jax.numpy as jnp


# Stands for log 0 where a difference of two of them would be NaN.
LEAST = -1e30


def _log_softmax(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array]:
  chex.assert_rank(student_logits, 3)
  chex.assert_equal_shape([student_logits, teacher_logits])
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  return (jax.nn.log_softmax(student_logits.astype(jnp.float32), axis=-1),
          jax.nn.log_softmax(teacher_logits.astype(jnp.float32), axis=-1))


def _kl(p: Array, q: Array) -> Array:
  """KL(p || q) from log-probabilities; a token with p = 0 adds nothing and no NaN."""
  possible = p > -jnp.inf
  gap = jnp.where(possible, p, 0.0) - jnp.where(possible, q, 0.0)
  return jnp.sum(jnp.exp(p) * gap, axis=-1)


def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
  """KL(teacher || student): mass-covering.

  Args:
    student_logits, teacher_logits: [B, T, V], unnormalized; -inf bans a token.
  Returns: f32[B, T], nats per token, unmasked.
  Raises: AssertionError at trace time if shapes differ or are not [B, T, V].
  Source: METHODS 1.
  """
  p, q = _log_softmax(student_logits, teacher_logits)
  return _kl(q, p)


def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
  """KL(student || teacher): mode-seeking; what the sampled OPD surrogate estimates.

  Args, Returns, Raises, Source as `forward_kl`.
  """
  p, q = _log_softmax(student_logits, teacher_logits)
  return _kl(p, q)


def jsd(student_logits: Array, teacher_logits: Array, beta: float = 0.5) -> Array:
  """Generalized Jensen-Shannon divergence, M = beta q + (1 - beta) p.

      beta KL(q || M) + (1 - beta) KL(p || M)

  Args:
    student_logits, teacher_logits: [B, T, V], unnormalized (p student, q teacher).
    beta: 0 < beta < 1. At the ends the formula is 0 and not the KL it is named after:
      use `forward_kl` or `reverse_kl` there.
  Returns: f32[B, T], nats per token, unmasked.
  Raises: AssertionError on shapes; ValueError for beta outside (0, 1).
  Source: GKD; METHODS 1.
  """
  if not 0.0 < beta < 1.0:
    raise ValueError(f"beta is {beta}; jsd needs 0 < beta < 1 (beta 0: forward_kl, 1: reverse_kl)")
  p, q = _log_softmax(student_logits, teacher_logits)
  p, q = jnp.maximum(p, LEAST), jnp.maximum(q, LEAST)
  m = jnp.logaddexp(q + jnp.log(beta), p + jnp.log1p(-beta))
  return beta * _kl(q, m) + (1.0 - beta) * _kl(p, m)
