"""Mixture of experts (Qwen3-MoE): a router sends each token through k of the layer's E MLPs.

Exact: no expert has a capacity and no token is dropped. The k copies of each token are sorted by
expert, so that a product reads an expert's kernel for its own tokens only: a few arrays of
k x tokens rows exist for a moment, none of tokens x E rows ever.

On a mesh the experts are cut over the `model` axis ("expert" in `sharding.RULES`). Along it every
device has all of its data shard's tokens, as in any tensor parallelism: each computes the copies
bound for its own experts, and the sums are added up as a dense MLP's are. So no token travels.
All-to-all would move k vectors a token there and back, and need room for the worst case. How many
copies are a device's own is known only when running: it takes them in passes of a little more
than an even share, nearly always one, and more only while its experts are in demand. Its work
and its buffers so fall as 1 / devices on either axis.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax import sharding
from opd_jax.models import layers
from opd_jax.models.configs import ModelConfig

SLACK = 1.25  # rows of a pass over an even share: more makes second passes rarer, buffers larger
FEWEST = 128  # rows of a pass: few tokens spread unevenly, and cost little


def route(logits: Array, count: int, normalized: bool) -> tuple[Array, Array]:
  """The experts of each token and how much each counts.

  Args:
    logits: f32[T, E], the router's.
    count: k, experts per token.
    normalized: whether the k weights are divided by their sum; else they are shares of all E.
  Returns: weights f32[T, k], through which the router learns, and experts i32[T, k].
  """
  weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
  return weights / jnp.sum(weights, -1, keepdims=True) if normalized else weights, experts


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
  """Zeros to begin a loop with; in a shard_map every device will make its own of them."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  zeros = jnp.zeros(shape, dtype)
  return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _over_blocks(visit: Callable[..., Array], result: Array, rows: int, sizes: Array) -> Array:
  """Folds `visit` over blocks of rows sorted by group, each block within one group.

  Args:
    visit: (result, group, cut, own) -> result; `cut` gives the block's rows of an array, and
      own bool[block, 1] says which of them are the group's.
    result: where to begin.
    rows: how many there are.
    sizes: i32[E], rows of each group; rows beyond them are in no block.
  """
  # About what a group has, within what a product likes.
  block = min(rows, max(8, min(256, rows // len(sizes))))
  counts = (sizes + block - 1) // block
  ends, stops = jnp.cumsum(sizes), jnp.cumsum(counts)

  def body(i, result):
    group = jnp.sum(stops <= i)  # the first one whose blocks are not over
    first = ends[group] - sizes[group] + (i - stops[group] + counts[group]) * block
    start = jnp.minimum(first, rows - block)
    row = start + jnp.arange(block)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)
    return visit(result, group, start, cut, ((row >= first) & (row < ends[group]))[:, None])

  return jax.lax.fori_loop(0, stops[-1], body, result)


def _products(x: Array, kernel: Array, sizes: Array, transposed: bool = False) -> Array:
  """`grouped`, or the same with the transposes of the kernels."""
  if sharding.platform() == "tpu":
    y = jax.lax.ragged_dot(x, kernel.swapaxes(1, 2) if transposed else kernel, sizes)
    return jnp.where(jnp.arange(len(y))[:, None] < jnp.sum(sizes), y, 0)

  def visit(y, group, start, cut, own):
    part = jnp.einsum("md,fd->mf" if transposed else "md,df->mf", cut(x),
                      jax.lax.dynamic_index_in_dim(kernel, group, keepdims=False),
                      preferred_element_type=jnp.float32)
    part = jnp.where(own, part.astype(y.dtype), cut(y))
    return jax.lax.dynamic_update_slice_in_dim(y, part, start, 0)

  width = kernel.shape[1 if transposed else 2]
  return _over_blocks(visit, _zeros((len(x), width), x.dtype), len(x), sizes)


@jax.custom_vjp
def grouped(x: Array, kernel: Array, sizes: Array) -> Array:
  """Rows sorted by group, each times the kernel of its group.

  On TPUs by `jax.lax.ragged_dot`, which there visits only tiles with rows of a group. Elsewhere
  JAX expands it to every row times every kernel, so a loop over blocks of rows takes its place;
  so it does everywhere for the gradient of the kernels, which XLA expands on TPUs too.

  Args:
    x: [M, D]; the first rows are group 0's, the next group 1's, and so on.
    kernel: [E, D, F]. Inside a shard_map, of the same varying axes as x.
    sizes: i32[E], rows of each group, at most M together.
  Returns: [M, F] in x's dtype, sums in float32; zero for rows beyond the last group's.
  """
  return _products(x, kernel, sizes)


def _grouped_forward(x, kernel, sizes):
  return _products(x, kernel, sizes), (x, kernel, sizes)


def _grouped_backward(saved, gradient):
  x, kernel, sizes = saved

  def visit(total, group, start, cut, own):
    part = jnp.einsum("md,mf->df", cut(x), jnp.where(own, cut(gradient), 0),
                      preferred_element_type=jnp.float32)
    return total.at[group].add(part)

  total = _over_blocks(visit, _zeros(kernel.shape, jnp.float32), len(x), sizes)
  return _products(gradient, kernel, sizes, transposed=True), total.astype(kernel.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)


def _pass(rows: int, i: Array, plan: tuple[Array, Array], x: Array, weights: Array,
          kernels: tuple[Array, Array, Array]) -> Array:
  """The weighted outputs f32[rows, D] of the i-th `rows` copies in sorted order."""
  order, ends = plan
  gate, up, down = kernels
  copy = _slice(order, i, rows)
  sizes = jnp.diff(jnp.clip(ends - i * rows, 0, rows), prepend=0)
  x = x[copy // weights.shape[1]]
  wide = lambda kernel: grouped(x, kernel, sizes).astype(jnp.float32)
  y = grouped((jax.nn.silu(wide(gate)) * wide(up)).astype(x.dtype), down, sizes)
  return y.astype(jnp.float32) * weights.reshape(-1)[copy][:, None]


def _slice(order: Array, i: Array, rows: int) -> Array:
  """The i-th `rows` of the sorted copies; the last again, in no group, where there are fewer."""
  return jnp.take(order, i * rows + jnp.arange(rows), mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_copies(rows: int, passes: Array, plan: tuple[Array, Array], x: Array, weights: Array,
                   kernels: tuple[Array, Array, Array]) -> Array:
  """Each token's sum over its copies, `rows` of them at a time; what is between is not saved.

  Args:
    rows, passes: how many copies a pass takes, and how many passes.
    plan: the sorted order of the copies i32[T k], and where each own expert's end in it i32[E].
    x: [T, D].
    weights: f32[T, k].
    kernels: gate and up [E, D, F], down [E, F, D], of the device's own experts.
  Returns: f32[T, D].
  """
  def body(i, y):
    token = _slice(plan[0], i, rows) // weights.shape[1]
    return y.at[token].add(_pass(rows, i, plan, x, weights, kernels))
  return jax.lax.fori_loop(0, passes, body, _zeros(x.shape, jnp.float32))


def _sum_forward(rows, passes, plan, *inputs):
  return _sum_of_copies(rows, passes, plan, *inputs), (passes, plan, inputs)


def _sum_backward(rows, saved, gradient):
  passes, plan, inputs = saved

  def body(i, total):
    _, pull = jax.vjp(functools.partial(_pass, rows, i, plan), *inputs)
    token = _slice(plan[0], i, rows) // inputs[1].shape[1]
    return jax.tree.map(lambda old, new: old + new, total, pull(gradient[token]))

  zero = jax.tree.map(lambda x: _zeros(x.shape, jnp.float32), inputs)
  total = jax.lax.fori_loop(0, passes, body, zero)
  return None, None, *jax.tree.map(lambda x, y: y.astype(x.dtype), inputs, total)


_sum_of_copies.defvjp(_sum_forward, _sum_backward)


def _own_experts(x: Array, logits: Array, kernels: tuple[Array, Array, Array], first: Array | int,
                 count: int, normalized: bool) -> Array:
  """What a device's own experts, of which `first` is the first, add to its tokens x [T, D]."""
  tokens, all_experts = logits.shape
  held = kernels[0].shape[0]
  weights, experts = route(logits, count, normalized)
  own = (experts >= first) & (experts < first + held)
  group = jnp.where(own, experts - first, held).reshape(-1)
  order = jnp.argsort(group)
  ends = jnp.sum(group <= jnp.arange(held)[:, None], axis=1, dtype=jnp.int32)
  most = tokens * min(count, held)  # a token's experts are different ones
  share = -int(-SLACK * tokens * count * held // all_experts)
  rows = min(most, max(share, FEWEST))
  passes = 1 if rows == most else (ends[-1] + rows - 1) // rows
  return _sum_of_copies(rows, passes, (order, ends), x, weights, kernels).astype(x.dtype)


def mixture(x: Array, logits: Array, kernels: tuple[Array, Array, Array], count: int,
            normalized: bool) -> Array:
  """The weighted sum of each token's experts, down(silu(gate(x)) * up(x)) each.

  Args:
    x: [B, S, D].
    logits: f32[B, S, E], the router's.
    kernels: gate and up [E, D, F], down [E, F, D], in x's dtype.
    count, normalized: see `route`.
  Returns: [B, S, D] in x's dtype.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def own(x, logits, kernels, first=0):
    y = _own_experts(x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]), kernels,
                     first, count, normalized)
    return y.reshape(x.shape)

  if mesh.empty:
    return own(x, logits, kernels)
  tokens = sharding.spec(("batch", None, None), x.shape, mesh)
  experts = sharding.spec(("expert", None, None), kernels[0].shape, mesh)
  of_tokens, of_experts = sharding.axes(tokens[0]), sharding.axes(experts[0])
  used = [axis for axis in mesh.axis_names if axis in of_tokens + of_experts]
  if not used:
    return own(x, logits, kernels)

  def call(x, logits, kernels):
    # Said of all of them, that gradients be summed over devices once, and not in every loop.
    spread = lambda tree, cut: jax.tree.map(
        lambda a: jax.lax.pcast(a, tuple(x for x in used if x not in cut), to="varying"), tree)
    (x, logits), kernels = spread((x, logits), of_tokens), spread(kernels, of_experts)
    if not of_experts:
      return own(x, logits, kernels)
    first = jax.lax.axis_index(of_experts) * kernels[0].shape[0]
    return jax.lax.psum(own(x, logits, kernels, first), of_experts)

  return jax.shard_map(call, in_specs=(tokens, tokens, experts), out_specs=tokens,
                       axis_names=set(used))(x, logits, kernels)


class Experts(nn.Module):
  """A router and E gated MLPs; takes the place of `layers.GatedMLP`."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c, dim, hidden = self.config, self.config.embed_dim, self.config.mlp_dim
    router = layers.weight(self, "router", (dim, c.num_experts), ("embed", None), dim, self.dtype)
    wide = lambda name: layers.weight(self, name, (c.num_experts, dim, hidden),
                                      ("expert", "embed", None), dim, self.dtype)
    down = layers.weight(self, "down", (c.num_experts, hidden, dim), ("expert", None, "embed"),
                         hidden, self.dtype)
    logits = jnp.einsum("bsd,de->bse", x, router, preferred_element_type=jnp.float32)
    return mixture(x, logits, (wide("gate"), wide("up"), down), c.experts_per_token,
                   c.normalized_routing)
