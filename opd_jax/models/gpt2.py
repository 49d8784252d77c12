"""GPT-2: learned positions, LayerNorm with bias, biases everywhere, GELU. Called like Transformer.

Dropout is left out: no method here trains with it, and transformers' own is off in eval mode.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.models import attention, layers, transformer
from opd_jax.models.configs import ModelConfig
from opd_jax.models.layers import KVCache
from opd_jax.sharding import constrain


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias over the last dimension, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
    shift = layers.bias(self, "bias", (x.shape[-1],), (None,), jnp.float32)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale + shift).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention with biases and an optional KV cache."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, index, mask):
    """x [B,S,D], cache LayerCache or None, mask Mask -> ([B,S,D], cache)."""
    c, dim = self.config, self.config.embed_dim

    def project(name):
      kernel = layers.weight(self, name, (dim, c.num_heads, c.head_dim),
                             ("embed", "heads", "head_dim"), dim, self.dtype)
      shift = layers.bias(self, f"{name}_bias", (c.num_heads, c.head_dim), ("heads", "head_dim"),
                          self.dtype)
      return constrain(layers.dense("bsd,dnh->bsnh", x, kernel) + shift,
                       "batch", "length", "heads", "head_dim")

    q, k, v = project("query"), project("key"), project("value")
    if cache is None:
      y = attention.attend(q, k, v, mask)
    else:
      y, cache = layers.attend_cached(q, k, v, cache, index, mask)
    out = layers.weight(self, "out", (c.num_heads, c.head_dim, dim),
                        ("heads", "head_dim", "embed"), dim, self.dtype)
    shift = layers.bias(self, "out_bias", (dim,), (None,), self.dtype)
    y = y.reshape(*y.shape[:2], -1)
    return layers.dense("bsf,fd->bsd", y, out.reshape(-1, dim)) + shift, cache


class MLP(nn.Module):
  """down(gelu(up(x))), with the tanh form of GELU."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dim, hidden = self.config.embed_dim, self.config.mlp_dim
    up = layers.weight(self, "up", (dim, hidden), ("embed", "mlp"), dim, self.dtype)
    up_bias = layers.bias(self, "up_bias", (hidden,), ("mlp",), self.dtype)
    down = layers.weight(self, "down", (hidden, dim), ("mlp", "embed"), hidden, self.dtype)
    down_bias = layers.bias(self, "down_bias", (dim,), (None,), self.dtype)
    y = jax.nn.gelu(layers.dense("bsd,df->bsf", x, up) + up_bias, approximate=True)
    y = constrain(y, "batch", "length", "mlp")
    return layers.dense("bsf,fd->bsd", y, down) + down_bias


class Block(nn.Module):
  """One pre-norm layer: attention, then MLP, each added to the residual stream."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, index, _, mask):
    norm = lambda name: LayerNorm(self.config.norm_eps, name=name)
    y, cache = Attention(self.config, self.dtype, name="attention")(
        norm("attention_norm")(x), cache, index, mask)
    x = constrain(x + y, "batch", "length", "act_embed")
    x = x + MLP(self.config, self.dtype, name="mlp")(norm("mlp_norm")(x))
    return constrain(x, "batch", "length", "act_embed"), cache


class GPT2(nn.Module):
  """Decoder-only language model; attributes and calls are those of `transformer.Transformer`."""

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = "dots"
  unrolled: bool = False

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
    self.positions = self.param("positions", init, (c.max_positions, c.embed_dim), jnp.float32)
    self.blocks = transformer.stack(Block, c, self.dtype, self.remat, self.unrolled)
    self.final_norm = LayerNorm(c.norm_eps)
    if not c.tied_embeddings:
      init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
      self.head = self.param("head", init, (c.embed_dim, c.vocab_size), jnp.float32)

  def __call__(self, tokens: Array, positions: Array, segment_ids: Array,
               cache: KVCache | None = None,
               length: int | None = None) -> tuple[Array, KVCache | None]:
    """Hidden states [B, S, D] after the final norm, and the extended cache; see Transformer."""
    del length  # nothing here is stretched
    x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
    x += jnp.take(self.positions, positions, axis=0).astype(self.dtype)
    x = constrain(x, "batch", "length", "act_embed")
    index, kv, seen = layers.slots(cache, segment_ids)
    mask = attention.mask(segment_ids, seen, index, self.config.sliding_window)
    x, kv = self.blocks(x, kv, index, None, mask)
    if cache is not None:
      cache = KVCache(kv, seen, index + tokens.shape[1])
    return self.final_norm(x), cache

  def logits(self, hidden: Array) -> Array:
    """Hidden states [B, T, D] -> logits f32[B, T, V]."""
    head = self.embedding.T if self.config.tied_embeddings else self.head
    logits = jnp.einsum("btd,dv->btv", hidden, head.astype(self.dtype),
                        preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "length", "vocab")
