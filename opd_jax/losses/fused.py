"""Divergences and log-probabilities straight from hidden states: [B, T, V] never exists.

    logits = hidden @ head

The one implementation behind every distribution-level loss, the scorer and SFT; `tiles` says how.
A divergence knows the weight of every token beforehand (aggregations are linear), so its gradient
is computed in the forward pass and only scaled in the backward one.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax import sharding
from opd_jax.losses import divergences, masked
from opd_jax.losses.tiles import (
    LOW, Readout, Side, Tiles, minus_infinity, over_blocks, weighted_sum)

Aggregate = Callable[[Array, Array], Array]
Slope = Callable[[Array, Array], Array]  # (i, student's logits of block i) -> array of their shape


class _Divergence(NamedTuple):
  """What is static in `fused_divergence`."""

  kind: str
  beta: float
  top_k: int
  top_of: str
  tail: str
  tile: tuple[int, int]
  student: Readout
  teacher: Readout


class _Top(NamedTuple):
  """What a teacher said of K tokens of each column, in the place of its states and head."""

  ids: Array       # i32[B, t, k]
  logprobs: Array  # f32[B, t, k]


def _over_vocabulary(static: _Divergence, student: Side, teacher: Side, tiles: Tiles
                     ) -> tuple[Array, Slope]:
  """A divergence over all tokens: values [B, t], and its derivative in the student's logits.

  With p, q the log-probabilities of student and teacher, m of their mixture:

      reverse_kl    value = E_p[p - q]            slope = e^p (p - q - value)
      forward_kl    value = E_q[q - p]            slope = e^p - e^q
      jsd           value = beta E_q[q - m]       slope = (1 - beta) e^p (p - m - E_p[p - m])
                            + (1 - beta) E_p[p - m]
  """
  kind, beta = static.kind, static.beta

  def summarize(i):
    z, y = student.logits(tiles, i), teacher.logits(tiles, i)
    totals = jax.nn.logsumexp(z, axis=-1), jax.nn.logsumexp(y, axis=-1)
    # Normalized within the block: what is added to all logits must not be there to be rounded.
    p, q = z - totals[0][..., None], y - totals[1][..., None]
    means = {"reverse_kl": lambda: weighted_sum(p, p - q),
             "forward_kl": lambda: weighted_sum(q, q - p), "jsd": lambda: None}[kind]()
    return totals, means

  totals, means = jax.lax.map(summarize, tiles.blocks)
  (student_total, student_share), (teacher_total, teacher_share) = map(over_blocks, totals)
  logprobs = lambda i, z: (z - student_total[..., None, None],
                           teacher.logits(tiles, i) - teacher_total[..., None, None])
  # E_p[p - q] = sum_i e^(l_i - l) (E_i[p_i - q_i] + (l_i - l) - (k_i - k)), k the teacher's l.
  kl = lambda share, other: jnp.sum(jnp.exp(share) * (means + share - other), axis=(0, 3))

  if kind == "reverse_kl":
    value = kl(student_share, teacher_share)

    def slope(i, z):
      p, q = logprobs(i, z)
      return jnp.exp(p) * (p - q - value[..., None, None])

    return value, slope

  if kind == "forward_kl":
    value = kl(teacher_share, student_share)

    def slope(i, z):
      p, q = logprobs(i, z)
      return jnp.exp(p) - jnp.exp(q)

    return value, slope

  def to_mixture(i):
    p, q = logprobs(i, student.logits(tiles, i))
    m = divergences.mixture(p, q, beta)
    return [weighted_sum(x, x - m) for x in (p, q)]

  of_student, of_teacher = (jnp.sum(x, axis=(0, 3)) for x in jax.lax.map(to_mixture, tiles.blocks))

  def slope(i, z):
    p, q = logprobs(i, z)
    m = divergences.mixture(p, q, beta)
    return (1.0 - beta) * jnp.exp(p) * (p - m - of_student[..., None, None])

  return beta * of_teacher + (1.0 - beta) * of_student, slope


def _best(tiles: Tiles, k: int, sides: Sequence[Side]) -> tuple[Array, list[Array], list[Array]]:
  """The tokens that the first side finds most likely.

  Returns: ids i32[B, t, k], best first; of every side its logits at them, f32[B, t, k], and the
    logsumexp of all its logits, f32[B, t].
  """
  def larger(best, new):
    """The k with the largest first entries, in every lane."""
    both = [jnp.concatenate([a, jnp.broadcast_to(b, (*a.shape[:-1], b.shape[-1]))], axis=-1)
            for a, b in zip(best, new)]
    return sharding.on_shards(largest, "batch", None, "vocab", None)(*both)

  def largest(*columns):
    first, at = jax.lax.top_k(columns[0], k)
    return [first, *(jnp.take_along_axis(x, at, axis=-1) for x in columns[1:])]

  def summarize(best, i):
    logits = [side.logits(tiles, i) for side in sides]
    return larger(best, [*logits, tiles.ids(i)]), [jax.nn.logsumexp(z, axis=-1) for z in logits]

  nothing = jnp.full((*sides[0].hidden.shape[:2], tiles.lanes, k), -jnp.inf)
  best, totals = jax.lax.scan(
      summarize, [nothing] * len(sides) + [nothing.astype(jnp.int32)], tiles.blocks)
  of_all = [x.reshape(*x.shape[:2], -1) for x in best]
  *logits, ids = sharding.on_shards(largest, "batch", None, None)(*of_all)
  return ids, logits, [over_blocks(x)[0] for x in totals]


def _over_top(static: _Divergence, student: Side, teacher: Side, tiles: Tiles
              ) -> tuple[Array, Slope]:
  """A divergence over K tokens and their tail: values [B, t], and its derivative, as above."""
  turn = slice(None) if static.top_of == "student" else slice(None, None, -1)
  ids, logits, totals = _best(tiles, static.top_k, (student, teacher)[turn])
  p, q = (minus_infinity(z - total[..., None]) for z, total in zip(logits[turn], totals[turn]))
  return _of_tokens(static, ids, p, q, totals[turn][0], tiles)


def _over_given(static: _Divergence, student: Side, teacher: _Top, tiles: Tiles
                ) -> tuple[Array, Slope]:
  """The same over tokens that were chosen before, their log-probabilities q known."""
  logits, total = _at(tiles, teacher.ids, student)
  p = minus_infinity(logits - total[..., None])
  return _of_tokens(static, teacher.ids, p, teacher.logprobs, total, tiles)


def _at(tiles: Tiles, ids: Array, side: Side) -> tuple[Array, Array]:
  """A side's logits at tokens i32[B, t, k], and the logsumexp of all, f32[B, t]."""
  def take(logits, places):
    inside = jnp.minimum(places, tiles.block - 1)
    return jnp.where(places == inside, jnp.take_along_axis(logits, inside, axis=-1), LOW)

  def summarize(found, i):
    logits = side.logits(tiles, i)
    new = sharding.on_shards(take, "batch", None, "vocab", None)(logits, tiles.places(i, ids))
    return jnp.maximum(found, new), jax.nn.logsumexp(logits, axis=-1)

  nothing = jnp.full((*ids.shape[:2], tiles.lanes, ids.shape[2]), LOW)
  found, totals = jax.lax.scan(summarize, nothing, tiles.blocks)
  return jnp.max(found, axis=2), over_blocks(totals)[0]


def _of_tokens(static: _Divergence, ids: Array, p: Array, q: Array, total: Array, tiles: Tiles
               ) -> tuple[Array, Slope]:
  """Value and slope over the tokens `ids`; p, q f32[B, t, k], `total` the student's logsumexp."""
  value, pull = jax.vjp(lambda p: divergences.topk_divergence(
      p, q, static.kind, static.beta, static.tail), p)
  of_top, = pull(jnp.ones_like(value))
  total, of_total = total[..., None, None], jnp.sum(of_top, axis=-1)[..., None, None]

  def slope(i, z):
    slopes = -jnp.exp(z - total) * of_total
    return sharding.on_shards(add, "batch", None, "vocab", None)(
        slopes, tiles.places(i, ids), of_top[:, :, None])

  def add(slopes, places, of_top):
    b, t, m, _ = (jnp.arange(size).reshape([-1 if i == axis else 1 for i in range(4)])
                  for axis, size in enumerate(slopes.shape))
    return slopes.at[b, t, m, places].add(of_top, mode="drop")

  return value, slope


def _compare(static: _Divergence, with_gradient: bool, student_hidden: Array, student_head: Array,
             teacher_said: Array | _Top, teacher_head: Array | None, weight: Array,
             banned: Array | None) -> Any:
  """values [B, T] and, if asked for, the gradients of sum(weight * values).

  What the teacher said is its states, to be read by its head; or, without a head, a `_Top`.
  """
  tiles = Tiles.of(weight.shape, student_head.shape[1], static.tile)
  in_lanes = lambda x: None if x is None else tiles.in_lanes(x)
  head, teacher_head, banned = in_lanes(student_head), in_lanes(teacher_head), in_lanes(banned)

  def tile(collected, columns):
    hidden, teacher, weight = columns
    student, over = Side(static.student, hidden, head, banned), _over_given
    if teacher_head is not None:
      teacher = Side(static.teacher, teacher, teacher_head, banned)
      over = _over_top if static.top_k else _over_vocabulary
    values, slope = over(static, student, teacher, tiles)
    if not with_gradient:
      return None, (values, None)
    gradient, collected = student.gradients(
        tiles, lambda i, z: weight[..., None, None] * slope(i, z), collected)
    return collected, (values, gradient)

  collected, (values, gradient) = jax.lax.scan(
      tile, tiles.collector(student_hidden.shape[2]) if with_gradient else None,
      jax.tree.map(tiles.cut, (student_hidden, teacher_said, weight)))
  values = tiles.join(values, weight.shape[1])
  if not with_gradient:
    return values
  return (values, tiles.join(gradient, weight.shape[1]),
          tiles.collected(collected).astype(student_head.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static: _Divergence, student_hidden: Array, student_head: Array,
                teacher_said: Array | _Top, teacher_head: Array | None, weight: Array,
                banned: Array | None) -> tuple[Array, Array]:
  values = _compare(static, False, student_hidden, student_head, teacher_said, teacher_head,
                    weight, banned)
  return jnp.sum(weight * values), values


def _divergence_forward(static: _Divergence, *operands: Any) -> Any:
  values, *gradients = _compare(static, True, *operands)
  return (jnp.sum(operands[4] * values), values), gradients


def _divergence_backward(static: _Divergence, gradients: Any, cotangents: Any) -> Any:
  scaled = lambda x: (x * cotangents[0]).astype(x.dtype)
  return *map(scaled, gradients), None, None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def fused_divergence(student_hidden: Array, student_head: Array, teacher_hidden: Array,
                     teacher_head: Array, mask: Array, kind: str, beta: float = 0.5, *,
                     weight: Array | None = None, aggregate: Aggregate = masked.token_mean,
                     top_k: int = 0, top_of: str = "student", tail: str = "bucket",
                     student_readout: Readout = Readout(), teacher_readout: Readout = Readout(),
                     banned: Array | None = None, tile: tuple[int, int] = (0, 0)
                     ) -> tuple[Array, Array]:
  """A divergence between two models at every token, as a loss.

      loss = aggregate(weight * divergence(student, teacher))

  Args:
    student_hidden: [B, T, D], states that predict the response; products are in its dtype
      (`jax_default_matmul_precision` for float32), summed in float32; from the logits on
      everything is float32.
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
    tile: columns of T and, per device, tokens of V whose logits exist at a time; 0 chooses by
      `tiles.ELEMENTS`.
  Returns: scalar loss, with a gradient to student_hidden and student_head (first derivatives
    only), and the divergences f32[B, T], nats per token, 0 outside the mask, without one.
  Raises: ValueError for an unknown kind, beta, top_of or tail, or a top_k beyond the vocabulary;
    AssertionError at trace time on shapes.
  Source: METHODS 1; a gradient in the forward pass as in "Liger Kernel: Efficient Triton Kernels
    for LLM Training", blocks of the vocabulary as in "Cut Your Losses in Large-Vocabulary Language
    Models".
  """
  chex.assert_rank([student_hidden, teacher_hidden], 3)
  chex.assert_rank([student_head, teacher_head, mask], 2)
  chex.assert_equal_shape_prefix([student_hidden, teacher_hidden, mask], 2)
  shared = min(student_head.shape[1], teacher_head.shape[1])
  student_head, teacher_head = student_head[:, :shared], teacher_head[:, :shared]
  divergences.check_kind(kind, beta)
  check_top(top_k, top_of, tail, shared)
  static = _Divergence(kind, beta, top_k, top_of, tail, tile, student_readout, teacher_readout)
  if banned is not None:
    chex.assert_shape(banned, (shared,))
  return _as_loss(static, student_hidden, student_head, teacher_hidden, teacher_head, mask, weight,
                  aggregate, banned)


def fused_given_divergence(student_hidden: Array, student_head: Array, ids: Array,
                           teacher_logprobs: Array, mask: Array, kind: str, beta: float = 0.5, *,
                           weight: Array | None = None, aggregate: Aggregate = masked.token_mean,
                           tail: str = "bucket", student_readout: Readout = Readout(),
                           tile: tuple[int, int] = (0, 0)) -> tuple[Array, Array]:
  """`fused_divergence` over K tokens of which the teacher has spoken before.

  With the `fused_topk` of a teacher it is the divergence with top_k=K and top_of="teacher".

  Args:
    student_hidden, student_head: [B, T, D], [D, V].
    ids: i32[B, T, K], tokens below V, those of a column different.
    teacher_logprobs: f32[B, T, K], their log-probabilities under the teacher, in nats; no gradient.
    mask, kind, beta, weight, aggregate, tail, student_readout, tile: as in `fused_divergence`.
  Returns, Source: as `fused_divergence`.
  Raises: ValueError for an unknown kind, beta or tail; AssertionError at trace time on shapes.
  """
  chex.assert_rank([student_hidden, ids, teacher_logprobs], 3)
  chex.assert_rank([student_head, mask], 2)
  chex.assert_equal_shape([ids, teacher_logprobs])
  chex.assert_equal_shape_prefix([student_hidden, ids, mask], 2)
  divergences.check_kind(kind, beta)
  top_k = ids.shape[2]
  check_top(top_k, "teacher", tail, student_head.shape[1])
  static = _Divergence(kind, beta, top_k, "teacher", tail, tile, student_readout, Readout())
  return _as_loss(static, student_hidden, student_head, _Top(ids, teacher_logprobs), None, mask,
                  weight, aggregate, None)


def _as_loss(static: _Divergence, student_hidden: Array, student_head: Array,
             teacher_said: Array | _Top, teacher_head: Array | None, mask: Array,
             weight: Array | None, aggregate: Aggregate, banned: Array | None
             ) -> tuple[Array, Array]:
  """The weighted aggregate, and the values at the tokens of the mask."""
  if weight is not None:
    chex.assert_equal_shape([mask, weight])
  weigh = lambda x: aggregate(x if weight is None else x * weight, mask)
  weights = jax.grad(weigh)(jnp.zeros(mask.shape, jnp.float32))
  still, blank = jax.lax.stop_gradient, lambda x: jnp.where(mask[..., None], x, 0)
  loss, values = _divergence(
      static, blank(student_hidden), student_head, still(jax.tree.map(blank, teacher_said)),
      still(teacher_head), still(jnp.where(mask, weights, 0.0)), banned)
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

  tile: tuple[int, int]
  readout: Readout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static: _Tokens, hidden: Array, head: Array, tokens: Array,
              banned: Array | None) -> tuple[Array, Array]:
  return _logprobs_forward(static, hidden, head, tokens, banned)[0]


def _logprobs_forward(static: _Tokens, hidden: Array, head: Array, tokens: Array,
                      banned: Array | None) -> Any:
  """With p_i the log-probabilities within block i, l_i and l as in `tiles`:

      log p_y = z_y - l,     H = -sum_i e^(l_i - l) (E_i[p_i] + l_i - l)
  """
  tiles = Tiles.of(tokens.shape, head.shape[1], static.tile)
  cut = tiles.in_lanes(head), None if banned is None else tiles.in_lanes(banned)

  def tile(columns):
    hidden, tokens = columns
    side = Side(static.readout, hidden, *cut)

    def summarize(i):
      z = side.logits(tiles, i)
      total = jax.nn.logsumexp(z, axis=-1)
      p = z - total[..., None]
      chosen = jnp.max(jnp.where(tiles.chosen(i, tokens), z, LOW), axis=-1)
      return total, weighted_sum(p, p), chosen

    totals, means, chosen = jax.lax.map(summarize, tiles.blocks)
    total, share = over_blocks(totals)
    entropy = -jnp.sum(jnp.exp(share) * (means + share), axis=(0, 3))
    return minus_infinity(jnp.max(chosen, axis=(0, 3)) - total), entropy, total

  out = jax.lax.map(tile, (tiles.cut(hidden), tiles.cut(tokens)))
  logprobs, entropy, total = (tiles.join(x, tokens.shape[1]) for x in out)
  return (logprobs, entropy), (hidden, head, tokens, banned, logprobs, entropy, total)


def _logprobs_backward(static: _Tokens, saved: Any, cotangents: tuple[Array, Array]) -> Any:
  """With p the log-probabilities and H their entropy:

      d log p_y / dz = 1_y - e^p,     d H / dz = -e^p (p + H)
  """
  hidden, head, tokens, banned, logprobs, entropy, total = saved
  tiles = Tiles.of(tokens.shape, head.shape[1], static.tile)
  cut = tiles.in_lanes(head), None if banned is None else tiles.in_lanes(banned)
  of_logprobs, of_entropy = cotangents
  of_logprobs = jnp.where(jnp.isneginf(logprobs), 0.0, of_logprobs)  # a token that cannot be
  # A column without cotangent may hold anything, NaN too, and must not spoil the head's gradient.
  live = (of_logprobs != 0.0) | (of_entropy != 0.0)
  blank = lambda x: jnp.where(live if x.ndim == 2 else live[..., None], x, 0)

  def tile(collected, columns):
    hidden, tokens, *columns = columns
    entropy, total, of_logprob, of_entropy = (x[..., None, None] for x in columns)

    def slope(i, z):
      p = z - total
      slopes = -jnp.exp(p) * (of_logprob + of_entropy * (p + entropy))
      return jnp.where(tiles.chosen(i, tokens), slopes + of_logprob, slopes)

    gradient, collected = Side(static.readout, hidden, *cut).gradients(tiles, slope, collected)
    return collected, gradient

  collected, gradient = jax.lax.scan(
      tile, tiles.collector(hidden.shape[2]),
      [tiles.cut(blank(x)) for x in (hidden, tokens, entropy, total, of_logprobs, of_entropy)])
  return (tiles.join(gradient, tokens.shape[1]), tiles.collected(collected).astype(head.dtype),
          None, None)


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def fused_logprobs(hidden: Array, head: Array, tokens: Array, *, readout: Readout = Readout(),
                   banned: Array | None = None, tile: tuple[int, int] = (0, 0)
                   ) -> tuple[Array, Array]:
  """Log-probability of given tokens, and the entropy of the distributions they came from.

  Args:
    hidden: [B, T, D], states that predict the tokens; products are in its dtype, summed in float32.
    head: [D, V], any float dtype (its gradient's too).
    tokens: i32[B, T]; an id that is banned, or not below V, has log-probability -inf and no
      gradient.
    readout: scale, soft cap and temperature of the logits.
    banned: bool[V], tokens of probability 0.
    tile: as in `fused_divergence`.
  Returns: (f32[B, T], f32[B, T]) in nats, unmasked, both with a gradient to hidden and head (first
    derivatives only). A column whose cotangents are 0 gives exactly none, whatever it holds.
  Raises: AssertionError at trace time on shapes.
  Source: METHODS 1 (the sampled log-probability).
  """
  chex.assert_rank([hidden, head, tokens], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, tokens], 2)
  return _logprobs(_Tokens(tile, readout), hidden, head, tokens, banned)


def fused_topk(hidden: Array, head: Array, k: int, *, readout: Readout = Readout(),
               tile: tuple[int, int] = (0, 0)) -> tuple[Array, Array]:
  """The k most likely tokens of each column, best first; for scoring, so without a gradient.

  Args: as `fused_logprobs`.
  Returns: (ids i32[B, T, k], log-probabilities f32[B, T, k] in nats).
  Raises: ValueError for a k that is not in 1..V; AssertionError at trace time on shapes.
  Source: METHODS 1 and 4 (what a top-k divergence compares).
  """
  chex.assert_rank([hidden, head], [3, 2])
  if not 1 <= k <= head.shape[1]:
    raise ValueError(f"k is {k}; it must be at least 1 and at most the vocabulary, {head.shape[1]}")
  hidden, head = jax.lax.stop_gradient((hidden, head))
  tiles = Tiles.of(hidden.shape, head.shape[1], tile)
  head = tiles.in_lanes(head)

  def one(hidden):
    ids, (logits,), (total,) = _best(tiles, k, [Side(readout, hidden, head, None)])
    return ids, logits - total[..., None]

  out = jax.lax.map(one, tiles.cut(hidden))
  return jax.tree.map(lambda x: tiles.join(x, hidden.shape[1]), out)
