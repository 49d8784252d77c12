"""The parts of a decoder layer: RMSNorm, attention, gated MLP, KV cache."""

from typing import Any

import flax.linen as nn
from flax import struct
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.models import rope
from opd_jax.models.configs import ModelConfig
from opd_jax.sharding import constrain


class KVCache(struct.PyTreeNode):
  """Keys and values of the C slots already seen, layers stacked in front.

  `segment_ids` says which slots hold a token (0: padding or not yet written). All rows
  write slot `index` at once; a row's own position is carried by `positions`, so left
  padding shifts slots but not rotary angles.
  """

  keys: Array         # [L, B, C, K, head_dim]
  values: Array       # [L, B, C, K, head_dim]
  segment_ids: Array  # i32[B, C]
  index: Array        # i32[], the next free slot


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> KVCache:
  """A cache of `slots` free slots for `batch` rows."""
  shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
  return KVCache(
      keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype),
      segment_ids=jnp.zeros((batch, slots), jnp.int32), index=jnp.zeros((), jnp.int32),
  )


def weight(module: nn.Module, name: str, shape: tuple[int, ...], names: tuple[str, ...],
           fan_in: int, dtype: Any) -> Array:
  """A float32 master weight, drawn with std 1/sqrt(fan_in), cast to the compute dtype."""
  init = nn.with_logical_partitioning(nn.initializers.normal(fan_in ** -0.5), names)
  return module.param(name, init, shape, jnp.float32).astype(dtype)


def bias(module: nn.Module, name: str, shape: tuple[int, ...], names: tuple[str | None, ...],
         dtype: Any) -> Array:
  """A float32 master bias, zero at first, cast to the compute dtype."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, names)
  return module.param(name, init, shape, jnp.float32).astype(dtype)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last dimension, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


def slots(cache: KVCache | None, segment_ids: Array) -> tuple[Array, Any, Array]:
  """Where the S tokens of a call go.

  Returns: (slot of the first one i32[], stacked (keys, values) or None, segment ids of all
    slots i32[B, C] with the new ones written in). Without a cache the slots are the tokens.
  """
  if cache is None:
    return jnp.zeros((), jnp.int32), None, segment_ids
  seen = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.index, axis=1)
  return cache.index, (cache.keys, cache.values), seen


def attention_mask(queries: Array, keys: Array, index: Array, window: int | None) -> Array:
  """Which keys each query sees.

  Args:
    queries: i32[B, S], segment ids of the tokens of this call; 0 is padding.
    keys: i32[B, C], segment ids of all slots.
    index: i32[], slot of the first query.
    window: how many slots back a query sees, its own included; None for all.
  Returns: bool[B, S, C]: same non-zero segment, not later, not before the window. Every query
    sees its own slot: a padding query would otherwise see nothing, and a softmax over nothing
    is NaN.
  """
  query_slot = index + jnp.arange(queries.shape[1])[:, None]
  key_slot = jnp.arange(keys.shape[1])
  same = (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
  seen = key_slot <= query_slot
  if window is not None and window < keys.shape[1]:
    seen &= key_slot > query_slot - window
  return (same & seen) | (key_slot == query_slot)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """softmax(q k / sqrt(head_dim)) v, by cuDNN's flash attention where that exists.

  Args:
    q: [B, S, H, head_dim].
    k, v: [B, C, K, head_dim], K divides H.
    mask: bool[B, S, C].
  Returns: [B, S, H, head_dim].
  """
  length, dim = q.shape[1], q.shape[3]
  flash = (jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and length > 1
           and dim % 8 == 0 and dim <= 128)
  if not flash:
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
  # cuDNN's backward pass wants even lengths; a scorer's S + T - 1 tokens seldom are.
  even = lambda x, *axes: jnp.pad(
      x, [(0, size % 2 if axis in axes else 0) for axis, size in enumerate(x.shape)])
  y = jax.nn.dot_product_attention(even(q, 1), even(k, 1), even(v, 1),
                                   mask=even(mask, 1, 2)[:, None], implementation="cudnn")
  return y[:, :length]


def extend(cache: tuple[Array, Array], k: Array, v: Array,
           index: Array) -> tuple[tuple[Array, Array], Array, Array]:
  """Writes k, v [B,S,K,h] at slot `index` -> (cache, all keys, all values)."""
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), index, axis=1)
  cache = put(cache[0], k), put(cache[1], v)
  return cache, cache[0].astype(k.dtype), cache[1].astype(v.dtype)


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions and an optional KV cache."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, index, angles, mask):
    """x [B,S,D], cache (keys, values) [B,C,K,h] or None, mask bool[B,S,C] -> ([B,S,D], cache)."""
    c, dim = self.config, self.config.embed_dim

    def project(name, heads, axis):
      kernel = weight(self, name, (dim, heads, c.head_dim), ("embed", axis, "head_dim"), dim,
                      self.dtype)
      y = jnp.einsum("bsd,dnh->bsnh", x, kernel)
      if c.qkv_bias:
        y += bias(self, f"{name}_bias", (heads, c.head_dim), (axis, "head_dim"), self.dtype)
      return constrain(y, "batch", "length", axis, "head_dim")

    q = project("query", c.num_heads, "heads")
    k = project("key", c.num_kv_heads, "kv_heads")
    v = project("value", c.num_kv_heads, "kv_heads")
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, name="query_norm")(q)
      k = RMSNorm(c.norm_eps, name="key_norm")(k)
    q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    if cache is not None:
      cache, k, v = extend(cache, k, v, index)
    y = attend(q, k, v, mask)
    out = weight(self, "out", (c.num_heads, c.head_dim, dim), ("heads", "head_dim", "embed"),
                 c.num_heads * c.head_dim, self.dtype)
    return jnp.einsum("bsnh,nhd->bsd", y, out), cache


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dim, hidden = self.config.embed_dim, self.config.mlp_dim
    gate = weight(self, "gate", (dim, hidden), ("embed", "mlp"), dim, self.dtype)
    up = weight(self, "up", (dim, hidden), ("embed", "mlp"), dim, self.dtype)
    down = weight(self, "down", (hidden, dim), ("mlp", "embed"), hidden, self.dtype)
    y = constrain(jax.nn.silu(x @ gate) * (x @ up), "batch", "length", "mlp")
    return y @ down
