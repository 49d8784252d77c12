"""The parts of a decoder layer: RMSNorm, attention, gated MLP, KV cache."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax.linen as nn
from flax import struct
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax import sharding
from opd_jax.models import attention, rope
from opd_jax.models.attention import Mask
from opd_jax.models.configs import ModelConfig
from opd_jax.sharding import constrain


class LayerCache(NamedTuple):
  """What one layer remembers; int8 entries are integers times a scale for each token and head."""

  keys: Array                       # [B, K, C, head_dim]
  values: Array                     # [B, K, C, head_dim]
  key_scale: Array | None = None    # f32[B, K, C], of int8 keys
  value_scale: Array | None = None  # f32[B, K, C], of int8 values


class KVCache(struct.PyTreeNode):
  """Keys and values of the C slots already seen.

  `segment_ids` says which slots hold a token (0: padding or not yet written). All rows
  write slot `index` at once; a row's own position is carried by `positions`, so left
  padding shifts slots but not rotary angles.
  """

  layers: Any         # LayerCache with [L] in front of every array, or a tuple of L of them
  segment_ids: Array  # i32[B, C]
  index: Array        # i32[], the next free slot


def empty_layer(config: ModelConfig, batch: int, slots: int, dtype: Any) -> LayerCache:
  """One layer's `slots` free slots for `batch` rows; dtype int8 brings scales along."""
  shape = (batch, config.num_kv_heads, slots)
  entries = lambda: constrain(jnp.zeros((*shape, config.head_dim), dtype),
                              "batch", "kv_heads", None, "head_dim")
  if jnp.dtype(dtype) != jnp.int8:
    return LayerCache(entries(), entries())
  scales = lambda: constrain(jnp.zeros(shape, jnp.float32), "batch", "kv_heads", None)
  return LayerCache(entries(), entries(), scales(), scales())


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: Any,
                unrolled: bool = False) -> KVCache:
  """A cache of `slots` free slots for `batch` rows.

  Args:
    config: of the model.
    batch, slots: B, C.
    dtype: of keys and values: a float type, or int8.
    unrolled: for a model whose layers are `unrolled`.
  """
  count = config.num_layers
  if unrolled:
    entries = tuple(empty_layer(config, batch, slots, dtype) for _ in range(count))
  else:
    names = None, "batch", "kv_heads", None, "head_dim"  # scales end before head_dim
    entries = jax.tree.map(
        lambda x: constrain(jnp.zeros((count, *x.shape), x.dtype), *names[:x.ndim + 1]),
        empty_layer(config, batch, slots, dtype))
  return KVCache(entries, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


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


def dense(equation: str, x: Array, kernel: Array) -> Array:
  """einsum of activations and a kernel, in x's dtype; sums run in float32.

  Accelerators sum in float32 anyway. A CPU asked for a bfloat16 result leaves its bfloat16
  instructions unused (8 to 15 times slower at one token a row), so there the result is asked
  for in float32 and rounded, in the backward pass too.
  """
  if x.dtype != jnp.bfloat16 or sharding.platform() != "cpu":
    return jnp.einsum(equation, x, kernel)
  return _sum_then_round(equation, x, kernel)


def _rounded(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_then_round(equation: str, a: Array, b: Array) -> Array:
  return _rounded(equation, a, b)


def _forward(equation, a, b):
  return _rounded(equation, a, b), (a, b)


def _backward(equation, saved, gradient):
  a, b = saved
  inputs, out = equation.split("->")
  left, right = inputs.split(",")
  return (_rounded(f"{out},{right}->{left}", gradient, b),
          _rounded(f"{left},{out}->{right}", a, gradient))


_sum_then_round.defvjp(_forward, _backward)


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

  Returns: (slot of the first one i32[], the layers' caches or None, segment ids of all
    slots i32[B, C] with the new ones written in). Without a cache the slots are the tokens.
  """
  if cache is None:
    return jnp.zeros((), jnp.int32), None, segment_ids
  seen = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.index, axis=1)
  return cache.index, cache.layers, seen


def quantize(x: Array) -> tuple[Array, Array]:
  """[..., head_dim] -> int8 of the same shape and f32[...] scales, so that x = int8 * scale."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
  return jnp.round(x / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale


def stored(k: Array, v: Array, dtype: Any) -> LayerCache:
  """Keys and values [B, K, S, head_dim] in the form that a cache of `dtype` holds."""
  if jnp.dtype(dtype) != jnp.int8:
    return LayerCache(k.astype(dtype), v.astype(dtype))
  (k, key_scale), (v, value_scale) = quantize(k), quantize(v)
  return LayerCache(k, v, key_scale, value_scale)


def apart(compute: Callable[[Any], Any], x: Any, some: Array) -> Any:
  """compute(x), of the shapes and types of x, and on CPUs not fused into what uses it.

  XLA drops barriers there before it fuses, and computes what it has fused once a use. It does not
  fuse across a loop, even of one turn, if it cannot know that it is one.

  Args:
    some: i32[], any number that is not known when compiling.
  """
  if sharding.platform() != "cpu":
    return compute(x)
  return jax.lax.fori_loop(some, some + 1, lambda _, x: compute(x), x)


def attend_cached(q: Array, k: Array, v: Array, cache: LayerCache, index: Array,
                  mask: Mask) -> tuple[Array, LayerCache]:
  """Writes k and v at slot `index` of the cache, and attends over all of its slots.

  Args:
    q: [B, S, H, head_dim].
    k, v: [B, S, K, head_dim], K divides H.
    cache: of C slots.
    index: i32[], slot of the first of the S tokens.
    mask: of all slots.
  Returns: [B, S, H, head_dim] and the cache.
  """
  new = stored(k.swapaxes(1, 2), v.swapaxes(1, 2), cache.keys.dtype)
  write = lambda at, cache: jax.tree.map(
      lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, at, axis=2), cache, new)
  if cache.keys.dtype == q.dtype:
    cache = write(index, cache)
  else:
    # Or the update would be fused into the cast that reads it, which leaves the old cache in use,
    # and so copied whole.
    cache = apart(functools.partial(write, index), cache, index)
  if q.shape[1] == 1:
    return _attend_one(q, cache, mask.seen), cache
  if k.shape[1] < cache.keys.shape[2]:  # else these are all that there are
    whole = lambda x, scale: (x if scale is None else x * scale[..., None]).astype(q.dtype)
    k, v = (whole(cache.keys, cache.key_scale).swapaxes(1, 2),
            whole(cache.values, cache.value_scale).swapaxes(1, 2))
  return attention.attend(q, k, v, mask), cache


def _attend_one(q: Array, cache: LayerCache, mask: Array) -> Array:
  """One query a row. The cache is read where it lies, in its own dtype, and never copied.

  Slots stand next to head_dim, behind the heads, because a product over the other order is
  preceded by a transposition of the whole cache: ten times slower on a CPU. A scale is the
  same for all of head_dim, so it may multiply scores and probabilities, which are smaller.
  """
  batch, _, heads, dim = q.shape
  kv_heads = cache.keys.shape[1]
  q = q.reshape(batch, kv_heads, heads // kv_heads, dim)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product("bkgh,bkch->bkgc", q, cache.keys.astype(q.dtype)) * dim ** -0.5
  if cache.key_scale is not None:
    scores *= cache.key_scale[:, :, None]
  scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
  share = jax.nn.softmax(scores, axis=-1)
  if cache.value_scale is not None:
    share *= cache.value_scale[:, :, None]
  y = product("bkgc,bkch->bkgh", share.astype(q.dtype), cache.values.astype(q.dtype))
  return y.astype(q.dtype).reshape(batch, 1, heads, dim)


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions and an optional KV cache."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, index, angles, mask):
    """x [B,S,D], cache LayerCache or None, mask Mask -> ([B,S,D], cache)."""
    c, dim = self.config, self.config.embed_dim

    def project(name, heads, axis):
      kernel = weight(self, name, (dim, heads, c.head_dim), ("embed", axis, "head_dim"), dim,
                      self.dtype)
      y = dense("bsd,dnh->bsnh", x, kernel)
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
    if cache is None:
      y = attention.attend(q, k, v, mask)
    else:
      y, cache = attend_cached(q, k, v, cache, index, mask)
    out = weight(self, "out", (c.num_heads, c.head_dim, dim), ("heads", "head_dim", "embed"),
                 c.num_heads * c.head_dim, self.dtype)
    # One dimension, not two: summed over two, a CPU first transposes the kernel.
    y = y.reshape(*y.shape[:2], -1)
    return dense("bsf,fd->bsd", y, out.reshape(-1, dim)), cache


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
    # In float32: in bfloat16 a CPU rounds after each of silu's operations, and takes longer.
    wide = lambda kernel: dense("bsd,df->bsf", x, kernel).astype(jnp.float32)
    y = (jax.nn.silu(wide(gate)) * wide(up)).astype(self.dtype)
    return dense("bsf,fd->bsd", constrain(y, "batch", "length", "mlp"), down)
