"""Learning signals [B, T]: what is learned at each sampled token. No gradient flows through."""

import chex
import jax
from jax import Array


def opd(student: Array, teacher: Array) -> Array:
  """Per-token signal of on-policy distillation: log p_teacher - log p_student.

  Its mean under the student's own samples is -KL(student || teacher), so following it
  descends the reverse KL.

  Args:
    student, teacher: f32[B, T], log-probability of each sampled token, in nats.
  Returns: f32[B, T], nats per token, unmasked; no gradient flows through it.
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: METHODS 1; "On-Policy Distillation of Language Models" (GKD), sampled form.
  """
  chex.assert_rank(student, 2)
  chex.assert_equal_shape([student, teacher])
  return jax.lax.stop_gradient(teacher - student)
