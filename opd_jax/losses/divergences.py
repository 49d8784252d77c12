"""Divergences between two next-token distributions, [B, T, V] logits -> [B, T] nats.

All have a gradient with respect to the student, none with respect to the teacher. These are the
plain forms; `fused` computes the same numbers without the [B, T, V] arrays.
"""

import math

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses.weights import MAX_LOG_RATIO

# Stands for log 0, below any log-probability that logits of +-1e4 can give. A token that one
# model bans and the other allows makes a true KL infinite and its gradient NaN; with this it is
# merely very expensive, and the gradient still points away from the banned token.
BANNED = -1e5

KINDS = ("forward_kl", "reverse_kl", "jsd")


def _finite(logprobs: Array) -> Array:
  """-inf becomes `BANNED`, with no gradient."""
  return jnp.where(jnp.isneginf(logprobs), BANNED, logprobs)


def _log_softmax(logits: Array) -> Array:
  """In float32 at least; -inf logits become `BANNED` with no gradient, all of a column too."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  banned = jnp.isneginf(logits)
  # A column of -inf alone (padding) would normalize to NaN, so the -inf go first: to a number
  # that no logit reaches and that may still be subtracted from.
  logits = jnp.where(banned, jnp.finfo(logits.dtype).min / 2, logits)
  return jnp.where(banned, BANNED, jax.nn.log_softmax(logits, axis=-1))


def _both(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array]:
  chex.assert_rank(student_logits, 3)
  chex.assert_equal_shape([student_logits, teacher_logits])
  return _log_softmax(student_logits), _log_softmax(jax.lax.stop_gradient(teacher_logits))


def _kl(p: Array, q: Array) -> Array:
  """KL(p || q) from log-probabilities over the last axis."""
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def mixture(p: Array, q: Array, beta: float) -> Array:
  """log(beta e^q + (1 - beta) e^p) of log-probabilities [..., V], elementwise."""
  return jnp.logaddexp(q + math.log(beta), p + math.log1p(-beta))


def _jsd(p: Array, q: Array, beta: float) -> Array:
  m = mixture(p, q, beta)
  return beta * _kl(q, m) + (1.0 - beta) * _kl(p, m)


def check_kind(kind: str, beta: float) -> None:
  """Refuses an unknown divergence, and a beta at which JSD's formula is 0."""
  if kind not in KINDS:
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
  if kind == "jsd" and not 0.0 < beta < 1.0:
    raise ValueError(f"beta is {beta}; jsd needs 0 < beta < 1 (beta 0: forward_kl, 1: reverse_kl)")


def between(p: Array, q: Array, kind: str, beta: float) -> Array:
  """The divergence of log-distributions p (student) and q (teacher) over the last axis."""
  check_kind(kind, beta)
  return {"forward_kl": lambda: _kl(q, p), "reverse_kl": lambda: _kl(p, q),
          "jsd": lambda: _jsd(p, q, beta)}[kind]()


def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
  """KL(teacher || student): mass-covering.

  Args:
    student_logits, teacher_logits: [B, T, V], unnormalized; -inf bans a token.
  Returns: f32[B, T], nats per token, unmasked.
  Raises: AssertionError at trace time if shapes differ or are not [B, T, V].
  Source: METHODS 1.
  """
  p, q = _both(student_logits, teacher_logits)
  return _kl(q, p)


def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
  """KL(student || teacher): mode-seeking; what the sampled OPD surrogate estimates.

  Args, Returns, Raises, Source as `forward_kl`.
  """
  p, q = _both(student_logits, teacher_logits)
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
  check_kind("jsd", beta)
  return _jsd(*_both(student_logits, teacher_logits), beta)


def with_tail(topk: Array, tail: str) -> Array:
  """Makes a distribution of k log-probabilities.

  "bucket" adds one outcome for everything else, log(1 - sum); "renormalize" drops the rest.
  The log of the sum is held at -1e-7, so that k tokens of all the mass leave a tail, not log 0.
  """
  topk = _finite(topk)
  total = jax.nn.logsumexp(topk, axis=-1, keepdims=True)
  if tail == "renormalize":
    return topk - total
  if tail == "bucket":
    rest = jnp.log(-jnp.expm1(jnp.minimum(total, -1e-7)))
    return jnp.concatenate([topk, rest], axis=-1)
  raise ValueError(f"tail is {tail!r}; it must be 'bucket' or 'renormalize'")


def topk_divergence(student_topk: Array, teacher_topk: Array, kind: str, beta: float = 0.5,
                    tail: str = "bucket") -> Array:
  """A divergence over K tokens and what stands for the rest of the vocabulary.

  A loss to differentiate, not a signal: as a detached advantage its expected gradient is 0.

  Args:
    student_topk, teacher_topk: f32[B, T, K], log-probabilities of the same K ids (the
      student's or the teacher's most likely ones), in nats.
    kind: "forward_kl" "reverse_kl" "jsd", as the functions of those names.
    beta: of jsd.
    tail: "bucket" (never negative, and at most the full divergence) or "renormalize" (biased:
      the student may drain mass off the K tokens unpunished).
  Returns: f32[B, T], nats per token, unmasked; gradient to the student alone.
  Raises: AssertionError on shapes; ValueError for an unknown kind, tail or beta.
  Source: METHODS 1 and 4; MOPD and SDPO use jsd with K=100 and the bucket.
  """
  chex.assert_rank(student_topk, 3)
  chex.assert_equal_shape([student_topk, teacher_topk])
  teacher_topk = jax.lax.stop_gradient(teacher_topk)
  return between(with_tail(student_topk, tail), with_tail(teacher_topk, tail), kind, beta)


def kl_estimate(p: Array, q: Array, estimator: str) -> Array:
  """Per-token estimate of KL(p || q) from tokens sampled from p.

      r = log q - log p:   k1 = -r,   k2 = r^2 / 2,   k3 = exp(r) - 1 - r

  k1 is unbiased, k2 low in variance, k3 both and never negative. That speaks of the value: the
  mean gradient with respect to p is 0 for k1, that of KL(p || q) for k2, of KL(q || p) for k3.

  Args:
    p, q: f32[B, T], log-probability of each sampled token, in nats.
    estimator: "k1" "k2" "k3".
  Returns: f32[B, T], nats per token, unmasked; gradient to both. In k3's exponential r is cut
    at +20, which float32 needs and a token truly sampled from p does not reach.
  Raises: AssertionError on shapes; ValueError for an unknown estimator.
  Source: Schulman, "Approximating KL Divergence"; METHODS, golden keys.
  """
  chex.assert_rank(p, 2)
  chex.assert_equal_shape([p, q])
  r = _finite(q) - _finite(p)
  if estimator == "k1":
    return -r
  if estimator == "k2":
    return jnp.square(r) / 2.0
  if estimator == "k3":
    return jnp.expm1(jnp.minimum(r, MAX_LOG_RATIO)) - r
  raise ValueError(f"estimator is {estimator!r}; it must be 'k1', 'k2' or 'k3'")


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
