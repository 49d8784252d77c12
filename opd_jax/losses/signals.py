"""Learning signals [B, T]: what is learned at each sampled token. No gradient flows through.

"student" is the trainer's own scorer at the start of the update; how the sampler saw the token
enters only the importance weight.
"""

import chex
import jax
from jax import Array
import jax.numpy as jnp


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


def g_opd(student: Array, teacher: Array, reference: Array, lam: float = 1.25) -> Array:
  """Per-token signal of generalized on-policy distillation.

  The target slides from the reference (lam=0) through the teacher (lam=1, where
  the reference cancels) to an extrapolation beyond it (lam>1, "ExOPD"):
      signal = lam * (log p_tea - log p_ref) - (log p_stu - log p_ref)

  Args:
    student: f32[B, T], log-probability of each sampled token, in nats.
    teacher, reference: f32[B, T], the same tokens under those models.
    lam: extrapolation strength, >= 0.
  Returns: f32[B, T], nats per token, unmasked; no gradient flows through it. At lam=1 it is
    `opd` bit for bit where the reference is finite.
  Raises: AssertionError at trace time if shapes differ or are not [B, T].
  Source: "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation".
  """
  chex.assert_rank(student, 2)
  chex.assert_equal_shape([student, teacher, reference])
  return jax.lax.stop_gradient((teacher - student) + (lam - 1) * (teacher - reference))


def select_teacher(teachers: Array, teacher_id: Array) -> Array:
  """Each row's log-probabilities under the teacher its prompt names.

  Args:
    teachers: f32[N, B, T], every teacher's log-probability of each sampled token, in nats.
    teacher_id: i32[B], which of the N teachers row b learns from.
  Returns: f32[B, T], nats; NaN in rows whose id is not in [0, N), so that a wrong id cannot
    pass for another teacher. No gradient flows through it.
  Raises: AssertionError at trace time if shapes do not fit.
  Source: METHODS 2, multi-teacher.
  """
  chex.assert_rank([teachers, teacher_id], [3, 1])
  chex.assert_equal(teachers.shape[1], teacher_id.shape[0])
  known = (teacher_id >= 0) & (teacher_id < teachers.shape[0])
  rows = jnp.take_along_axis(teachers, jnp.where(known, teacher_id, 0)[None, :, None], axis=0)[0]
  return jax.lax.stop_gradient(jnp.where(known[:, None], rows, jnp.nan))


def group_advantage(rewards: Array, normalize_std: bool = True) -> Array:
  """Each rollout's reward against its group, the signal of GRPO.

      (r - mean) / (std + 1e-6),   std of the sample (G - 1 in its denominator)

  Args:
    rewards: f32[P, G], any unit.
    normalize_std: divide by the standard deviation; False leaves the centered reward.
  Returns: f32[P, G], 0 for a group of one or of equal rewards; a caller reshapes to [B] and
    broadcasts over tokens. No gradient flows through it.
  Raises: AssertionError at trace time if not [P, G].
  Source: "DeepSeekMath" (GRPO), equation 4; METHODS, golden keys.
  """
  chex.assert_rank(rewards, 2)
  if rewards.shape[1] == 1:
    return jnp.zeros(rewards.shape)
  centered = rewards - jnp.mean(rewards, axis=1, keepdims=True)
  # Rounding leaves a residue in equal rewards, which a tiny std would blow up into a signal.
  equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
  if normalize_std:
    centered = centered / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + 1e-6)
  return jax.lax.stop_gradient(jnp.where(equal, 0.0, centered))


def verified(rewards: Array, success: float = 1.0) -> Array:
  """Of responses that a verifier has passed the likelihood is learned, of others nothing.

  With the other responses out of the loss's mask, `score_function_loss` of this signal is the
  cross-entropy of the verified alone, `supervised.sft`, and a batch without one skips its update.
  Left in the mask they would count in its denominator.

  Args:
    rewards: f32[B] or any other shape.
    success: the least reward that passes.
  Returns: of the same shape, 1 or 0 (NaN does not pass); no gradient flows through it.
  Source: METHODS 4, baselines: verified-success SFT. Success is 1.0 as in the evaluations here;
    MOPD's configs say 0.5.
  """
  return (rewards >= success).astype(rewards.dtype)
