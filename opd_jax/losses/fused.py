"""Divergences and log-probabilities straight from hidden states: [B, T, V] never exists.

    logits = hidden @ head

Everything runs in chunks of T columns, each with its whole vocabulary, so that a batch spread
over devices by rows and a head spread by tokens stay as they are. A divergence knows the weight
of every token beforehand (aggregations are linear), so its gradient is computed chunk by chunk
in the forward pass and only scaled in the backward one: four large matrix products, as many as
without chunks. Log-probabilities do not know their cotangent; they recompute their logits.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.losses import divergences, masked

Aggregate = Callable[[Array, Array], Array]

# Elements of one model's logits that exist at a time: 32 MiB in float32. Each chunk reads both
# heads and reads and writes the head's gradient, so a smaller one is slower; this one keeps the
# whole well below 5% of the naive form's memory (tests/bench). More room: pass `columns`.
CHUNK_ELEMENTS = 2**23
# Rows of the head's gradient that are added to at a time: a product is written somewhere before
# it is added, and this keeps that place small beside the gradient.
HEAD_ROWS = 128


class Readout(NamedTuple):
  """How a family turns hidden @ head into the logits of its distribution. Static.

      logits = cap(hidden @ head * scale) / temperature,   cap(x) = soft_cap tanh(x / soft_cap)
  """

  scale: float = 1.0
  soft_cap: float | None = None
  temperature: float = 1.0

  def __call__(self, product: Array, banned: Array | None) -> Array:
    """f32[B, t, V] products -> logits; tokens `banned` bool[V] get -inf."""
    logits = product * self.scale
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    logits = logits / self.temperature
    return logits if banned is None else jnp.where(banned, -jnp.inf, logits)


class _Divergence(NamedTuple):
  """What is static in `fused_divergence`."""

  kind: str
  beta: float
  top_k: int
  top_of: str
  tail: str
  columns: int
  student: Readout
  teacher: Readout

  def __call__(self, student_logits: Array, teacher_logits: Array) -> Array:
    """Two chunks of logits [B, t, V] -> f32[B, t], by the plain kernels."""
    if not self.top_k:
      beta = {"beta": self.beta} if self.kind == "jsd" else {}
      return divergences.DIVERGENCES[self.kind](student_logits, teacher_logits, **beta)
    chooser = student_logits if self.top_of == "student" else teacher_logits
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(chooser), self.top_k)
    at = lambda logits: (jnp.take_along_axis(logits, ids, axis=-1)
                         - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return divergences.topk_divergence(at(student_logits), at(teacher_logits), self.kind,
                                       self.beta, self.tail)


def _columns(shape: tuple[int, ...], vocabulary: int, asked: int) -> int:
  """Columns of a chunk: as asked, or as the budget allows, in chunks of nearly equal size."""
  rows, length = shape[:2]
  most = min(asked or max(CHUNK_ELEMENTS // (rows * vocabulary), 1), length)
  return -(-length // -(-length // most))


def _cut(x: Array, columns: int) -> Array:
  """[B, T, ...] -> [chunks, B, columns, ...], zeros behind T."""
  chunks = -(-x.shape[1] // columns)
  x = jnp.pad(x, [(0, 0), (0, chunks * columns - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], chunks, columns, *x.shape[2:]).swapaxes(0, 1)


def _join(x: Array, length: int) -> Array:
  """The inverse of `_cut`."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _product(hidden: Array, head: Array) -> Array:
  return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def _no_gradient(head: Array) -> Array:
  """Where a head's gradient is collected, f32[D / rows, rows, V]."""
  rows = max(n for n in range(1, HEAD_ROWS + 1) if head.shape[0] % n == 0)
  return jnp.zeros((head.shape[0] // rows, rows, head.shape[1]), jnp.float32)


def _back(slope: Array, hidden: Array, head: Array, collected: Array) -> tuple[Array, Array]:
  """Backward pass of `_product`: the chunk's gradient, and the head's with its share added.

  Args:
    slope: f32[B, t, V], derivative with respect to the product.
    hidden, head: of the product, in the compute dtype.
    collected: from `_no_gradient`, changed in place in a loop.
  """
  slope = slope.astype(hidden.dtype)  # float32 against bfloat16 is several times slower
  # The head first: a CPU turns the second factor over, and the slope is the smaller one.
  chunk = jnp.einsum("dv,btv->dbt", head, slope, preferred_element_type=jnp.float32)
  # Transposed before the loop: a CPU is slow at products over both first dimensions.
  turned = hidden.transpose(2, 0, 1).reshape(*collected.shape[:2], *hidden.shape[:2])

  def add(i, collected):
    share = jnp.einsum("dbt,btv->dv", turned[i], slope, preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(collected, collected[i] + share, i, 0)

  collected = jax.lax.fori_loop(0, len(turned), add, collected)
  return chunk.transpose(1, 2, 0).astype(hidden.dtype), collected


def _over_chunks(static: _Divergence, with_gradient: bool, student_hidden: Array,
                 student_head: Array, teacher_hidden: Array, teacher_head: Array, weight: Array,
                 banned: Array | None) -> Any:
  """values [B, T] and, if asked for, the gradients of sum(weight * values)."""
  length, head = weight.shape[1], student_head.astype(student_hidden.dtype)
  teacher_head = teacher_head.astype(teacher_hidden.dtype)
  shared = min(student_head.shape[1], teacher_head.shape[1])
  columns = _columns(weight.shape, shared, static.columns)

  def step(collected, chunk):
    hidden, teacher, weight = chunk
    teacher = static.teacher(_product(teacher, teacher_head)[..., :shared], banned)
    kernel = lambda product: static(static.student(product[..., :shared], banned), teacher)
    if not with_gradient:
      return None, (kernel(_product(hidden, head)), None)
    values, pull = jax.vjp(kernel, _product(hidden, head))
    gradient, collected = _back(*pull(weight), hidden, head, collected)
    return collected, (values, gradient)

  chunks = [_cut(x, columns) for x in (student_hidden, teacher_hidden, weight)]
  collected, (values, gradient) = jax.lax.scan(
      step, _no_gradient(head) if with_gradient else None, chunks)
  values = _join(values, length)
  if not with_gradient:
    return values
  return values, _join(gradient, length), collected.reshape(head.shape).astype(student_head.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static: _Divergence, student_hidden: Array, student_head: Array,
                teacher_hidden: Array, teacher_head: Array, weight: Array,
                banned: Array | None) -> tuple[Array, Array]:
  values = _over_chunks(static, False, student_hidden, student_head, teacher_hidden, teacher_head,
                        weight, banned)
  return jnp.sum(weight * values), values


def _divergence_forward(static: _Divergence, *operands: Any) -> Any:
  values, of_hidden, of_head = _over_chunks(static, True, *operands)
  return (jnp.sum(operands[4] * values), values), (of_hidden, of_head)


def _divergence_backward(static: _Divergence, gradients: Any, cotangents: Any) -> Any:
  scaled = lambda x: (x * cotangents[0]).astype(x.dtype)
  return *map(scaled, gradients), None, None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def fused_divergence(student_hidden: Array, student_head: Array, teacher_hidden: Array,
                     teacher_head: Array, mask: Array, kind: str, beta: float = 0.5, *,
                     weight: Array | None = None, aggregate: Aggregate = masked.token_mean,
                     top_k: int = 0, top_of: str = "student", tail: str = "bucket",
                     student_readout: Readout = Readout(), teacher_readout: Readout = Readout(),
                     banned: Array | None = None, columns: int = 0) -> tuple[Array, Array]:
  """A divergence between two models at every token, as a loss.

      loss = aggregate(weight * divergence(student, teacher))

  Args:
    student_hidden: [B, T, D], states that predict the response; products are in its dtype,
      summed in float32, and everything from the logits on is float32.
    student_head: [D, V], any float dtype (its gradient's too).
    teacher_hidden, teacher_head: [B, T, D'], [D', V']; no gradient. Where one head is longer, what
      it has beyond the shared ids is padding and takes no part.
    mask: bool[B, T], true for real tokens; whatever stands outside it is never looked at.
    kind: "forward_kl" "reverse_kl" "jsd", as in `divergences`.
    beta: of jsd.
    weight: f32[B, T], how much each token counts; no gradient; None is 1.
    aggregate: reduction over tokens, from `masked`; must be linear in its first argument.
    top_k: K > 0 compares only K tokens and a tail, by `divergences.topk_divergence`; 0: all.
    top_of: whose K most likely tokens, "student" or "teacher".
    tail: "bucket" or "renormalize".
    student_readout, teacher_readout: scale, soft cap and temperature of each model's logits.
    banned: bool[V], tokens that neither model may produce; V is the shared vocabulary.
    columns: of T in a chunk; 0 chooses by `CHUNK_ELEMENTS`.
  Returns: scalar loss, with a gradient to student_hidden and student_head (first derivatives
    only), and the divergences f32[B, T], nats per token, 0 outside the mask, without one.
  Raises: ValueError for an unknown kind, beta, top_of or tail, or a top_k beyond the vocabulary;
    AssertionError at trace time on shapes.
  Source: METHODS 1; chunks with their gradient in the forward pass as in "Liger Kernel: Efficient
    Triton Kernels for LLM Training".
  """
  chex.assert_rank([student_hidden, teacher_hidden], 3)
  chex.assert_rank([student_head, teacher_head, mask], 2)
  chex.assert_equal_shape_prefix([student_hidden, teacher_hidden, mask], 2)
  shared = min(student_head.shape[1], teacher_head.shape[1])
  divergences.check_kind(kind, beta)
  check_top(top_k, top_of, tail, shared)
  static = _Divergence(kind, beta, top_k, top_of, tail, columns, student_readout, teacher_readout)
  weigh = lambda x: aggregate(x if weight is None else x * weight, mask)
  weights = jax.grad(weigh)(jnp.zeros(mask.shape, jnp.float32))
  still, real = jax.lax.stop_gradient, mask[..., None]
  loss, values = _divergence(
      static, jnp.where(real, student_hidden, 0), student_head,
      still(jnp.where(real, teacher_hidden, 0)), still(teacher_head),
      still(jnp.where(mask, weights, 0.0)), banned)
  return loss, still(jnp.where(mask, values, 0.0))


def check_top(top_k: int, top_of: str, tail: str, vocabulary: int) -> None:
  """Refuses a choice of tokens that cannot be made."""
  if not 0 <= top_k <= vocabulary:
    raise ValueError(f"top_k is {top_k}; it must be 0 (all tokens) or at most the {vocabulary} "
                     "tokens that student and teacher share")
  for name, value, known in (("top_of", top_of, ("student", "teacher")),
                             ("tail", tail, ("bucket", "renormalize"))):
    if value not in known:
      raise ValueError(f"{name} is {value!r}; it must be {known[0]!r} or {known[1]!r}")


class _Tokens(NamedTuple):
  """What is static in `fused_logprobs`."""

  columns: int
  readout: Readout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static: _Tokens, hidden: Array, head: Array, tokens: Array,
              banned: Array | None) -> tuple[Array, Array]:
  return _logprobs_forward(static, hidden, head, tokens, banned)[0]


def _plogp(logprobs: Array) -> Array:
  """p log p, 0 at p = 0 also where a banned token has log p = -inf."""
  return jnp.where(jnp.isneginf(logprobs), 0.0, jnp.exp(logprobs) * logprobs)


def _logprobs_forward(static: _Tokens, hidden: Array, head: Array, tokens: Array,
                      banned: Array | None) -> Any:
  cast = head.astype(hidden.dtype)

  def one(chunk):
    hidden, tokens = chunk
    logits = static.readout(_product(hidden, cast), banned)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - total, -jnp.sum(_plogp(logits - total[..., None]), axis=-1), total

  columns = _columns(hidden.shape, head.shape[1], static.columns)
  out = jax.lax.map(one, (_cut(hidden, columns), _cut(tokens, columns)))
  logprobs, entropy, total = (_join(x, tokens.shape[1]) for x in out)
  return (logprobs, entropy), (hidden, head, tokens, banned, entropy, total)


def _logprobs_backward(static: _Tokens, saved: Any, cotangents: tuple[Array, Array]) -> Any:
  """With p = softmax(z) of token y and H its entropy:

      d log p_y / dz = 1_y - p,     d H / dz = -p (log p + H)
  """
  hidden, head, tokens, banned, entropy, total = saved
  cast, columns = head.astype(hidden.dtype), _columns(hidden.shape, head.shape[1], static.columns)
  # A column without cotangent may hold anything, NaN too, and must not spoil the head's gradient.
  live = (cotangents[0] != 0.0) | (cotangents[1] != 0.0)
  calm = lambda x: jnp.where(live if x.ndim == 2 else live[..., None], x, 0)

  def step(collected, chunk):
    hidden, tokens, entropy, total, of_logprob, of_entropy = (
        x if x.ndim == 3 else x[..., None] for x in chunk)
    logits, pull = jax.vjp(lambda x: static.readout(x, banned), _product(hidden, cast))
    logprobs = logits - total
    slope = -(jnp.exp(logprobs) * (of_logprob + of_entropy * entropy)
              + of_entropy * _plogp(logprobs))
    chosen = jnp.arange(head.shape[1]) == tokens
    gradient, collected = _back(*pull(jnp.where(chosen, slope + of_logprob, slope)), hidden, cast,
                                collected)
    return collected, gradient

  chunks = [_cut(calm(x), columns) for x in (hidden, tokens, entropy, total, *cotangents)]
  collected, gradient = jax.lax.scan(step, _no_gradient(cast), chunks)
  return (_join(gradient, tokens.shape[1]), collected.reshape(head.shape).astype(head.dtype), None,
          None)


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def fused_logprobs(hidden: Array, head: Array, tokens: Array, *, readout: Readout = Readout(),
                   banned: Array | None = None, columns: int = 0) -> tuple[Array, Array]:
  """Log-probability of given tokens, and the entropy of the distributions they came from.

  Args:
    hidden: [B, T, D], states that predict the tokens; products are in its dtype, summed in float32.
    head: [D, V], any float dtype (its gradient's too).
    tokens: i32[B, T], ids below V.
    readout: scale, soft cap and temperature of the logits.
    banned: bool[V], tokens of probability 0.
    columns: of T in a chunk; 0 chooses by `CHUNK_ELEMENTS`.
  Returns: (f32[B, T], f32[B, T]) in nats, unmasked, both with a gradient to hidden and head (first
    derivatives only). A column whose cotangents are 0 gives exactly none, whatever it holds.
  Raises: AssertionError at trace time on shapes.
  Source: METHODS 1 (the sampled log-probability).
  """
  chex.assert_rank([hidden, head, tokens], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, tokens], 2)
  return _logprobs(_Tokens(columns, readout), hidden, head, tokens, banned)


def fused_topk(hidden: Array, head: Array, k: int, *, readout: Readout = Readout(),
               columns: int = 0) -> tuple[Array, Array]:
  """The k most likely tokens of each column, best first; for scoring, so without a gradient.

  Args: as `fused_logprobs`.
  Returns: (ids i32[B, T, k], log-probabilities f32[B, T, k] in nats).
  Raises: ValueError for a k that is not in 1..V; AssertionError at trace time on shapes.
  """
  chex.assert_rank([hidden, head], [3, 2])
  if not 1 <= k <= head.shape[1]:
    raise ValueError(f"k is {k}; it must be at least 1 and at most the vocabulary, {head.shape[1]}")
  hidden, head = jax.lax.stop_gradient((hidden, head.astype(hidden.dtype)))

  def one(hidden):
    logits = readout(_product(hidden, head), None)
    best, ids = jax.lax.top_k(logits, k)
    return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

  out = jax.lax.map(one, _cut(hidden, _columns(hidden.shape, head.shape[1], columns)))
  return jax.tree.map(lambda x: _join(x, hidden.shape[1]), out)
