"""Who sees whom, and softmax(q k / sqrt(head_dim)) v by the best kernel that the platform has."""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from opd_jax import sharding

# Attention scores that exist at a time on a device: 512 MiB in float32. The longest of our training
# runs on CPUs stay below, so that nothing changes for them.
SCORES = 2**27
BLOCK = 512  # queries, and keys, that a TPU's kernel has in the core at a time
LANES = 128  # what a block is a multiple of


class Mask(NamedTuple):
  """Which keys each query sees; what is not used is not computed."""

  seen: Array                    # bool[B, S, C]
  segments: Array | None = None  # i32[B, S], if they say the same: a token sees its own, backwards


def mask(queries: Array, keys: Array, index: Array, window: int | None) -> Mask:
  """The mask of a call.

  Args:
    queries: i32[B, S], segment ids of the tokens of this call; 0 is padding.
    keys: i32[B, C], segment ids of all slots. As many as queries: they are the queries' own.
    index: i32[], slot of the first query.
    window: how many slots back a query sees, its own included; None for all.
  """
  narrow = window is not None and window < keys.shape[1]
  alone = queries.shape == keys.shape and not narrow
  return Mask(seen(queries, keys, index, window), queries if alone else None)


def seen(queries: Array, keys: Array, index: Array, window: int | None) -> Array:
  """bool[B, S, C], arguments as those of `mask`: same non-zero segment, not later, not before the
  window. Every query sees its own slot: a padding query would otherwise see nothing, and a softmax
  over nothing is NaN.
  """
  query_slot = index + jnp.arange(queries.shape[1])[:, None]
  key_slot = jnp.arange(keys.shape[1])
  same = (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
  near = key_slot <= query_slot
  if window is not None and window < keys.shape[1]:
    near &= key_slot > query_slot - window
  return (same & near) | (key_slot == query_slot)


def attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
  """softmax(q k / sqrt(head_dim)) v.

  In bfloat16 by cuDNN's flash attention on GPUs, by JAX's splash kernel on TPUs, where they know
  the shape; elsewhere scores of a block of queries exist at a time (`in_blocks`).

  Args:
    q: [B, S, H, head_dim].
    k, v: [B, C, K, head_dim], K divides H.
  Returns: [B, S, H, head_dim]; what a padding query gets differs from kernel to kernel.
  """
  length, dim = q.shape[1], q.shape[3]
  if q.dtype == jnp.bfloat16 and length > 1:
    where = sharding.platform()
    if where == "gpu" and dim % 8 == 0 and dim <= 128:
      return cudnn(q, k, v, mask.seen)
    if where == "tpu" and dim % 64 == 0 and mask.segments is not None:
      return splash(q, k, v, mask.segments)
  return in_blocks(q, k, v, mask.seen)


def cudnn(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """By cuDNN. Its backward pass wants even lengths; a scorer's S + T - 1 tokens seldom are."""
  even = lambda x, *axes: jnp.pad(
      x, [(0, size % 2 if axis in axes else 0) for axis, size in enumerate(x.shape)])
  y = jax.nn.dot_product_attention(even(q, 1), even(k, 1), even(v, 1),
                                   mask=even(mask, 1, 2)[:, None], implementation="cudnn")
  return y[:, :q.shape[1]]


def splash(q: Array, k: Array, v: Array, segments: Array, interpret: bool = False) -> Array:
  """By a TPU's cores, each device on its own rows and heads; scores never reach its memory.

  A padding query sees earlier padding, where others see themselves alone.

  Args:
    interpret: as plain JAX, for machines that are no TPU.
  """
  # Imports much, and only TPUs want it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  rows, length, heads, dim = q.shape
  kv_heads = k.shape[2]
  if sharding.shards("heads", heads) > sharding.shards("kv_heads", kv_heads):
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))  # cut as the queries are
    kv_heads = heads
  count = -(-length // BLOCK)
  block = -(-length // (count * LANES)) * LANES  # of equal size: little is padding
  size = count * block
  blocks = kernels.BlockSizes(**dict.fromkeys(
      ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
       "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block))

  def own(q, k, v, segments):  # [B, S, K, G, d], twice [B, S, K, 1, d], [B, S, 1, 1, 1]
    each = lambda x: jnp.pad(x.reshape(*x.shape[:2], -1, dim), [(0, 0), (0, size - length)]
                             + [(0, 0)] * 2).swapaxes(1, 2)
    ids = jnp.pad(segments[:, :, 0, 0, 0], [(0, 0), (0, size - length)])
    asked = each(q)
    causal = masks.MultiHeadMask([masks.CausalMask((size, size))] * asked.shape[1])
    kernel = kernels.make_splash_mha(causal, block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                     interpret=interpret)
    y = jax.vmap(kernel)(asked * jnp.asarray(dim ** -0.5, q.dtype), each(k), each(v),
                         kernels.SegmentIds(ids, ids))
    return y.swapaxes(1, 2)[:, :length].reshape(q.shape)

  grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, dim)
  y = sharding.on_shards(own, "batch", "length", "kv_heads", None, None, check=False)(
      grouped, k[:, :, :, None], v[:, :, :, None], segments[:, :, None, None, None])
  return y.reshape(q.shape)


def in_blocks(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """By plain products, for as many queries at a time as `SCORES` allows.

  A query's softmax does not know of other queries, so blocks change memory and nothing else. The
  backward pass makes a block's scores anew.
  """
  plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  rows, length, heads, _ = q.shape
  own = (rows // sharding.shards("batch", rows)) * (heads // sharding.shards("heads", heads))
  block = max(SCORES // (own * k.shape[1]), 1)
  if block >= length:
    return plain(q, k, v, mask=mask[:, None])
  count = -(-length // block)
  block = -(-length // count)  # of nearly equal size
  short = [(0, count * block - length)]

  def cut(x):  # [B, S, ...] -> [count, B, block, ...]
    x = jnp.pad(x, [(0, 0)] + short + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows, count, block, *x.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def one(x):
    q, mask = x
    return plain(q, k, v, mask=mask[:, None])

  y = jax.lax.map(one, (cut(q), cut(mask)))
  return y.swapaxes(0, 1).reshape(rows, count * block, *q.shape[2:])[:, :length]
