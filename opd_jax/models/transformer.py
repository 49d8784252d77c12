"""One decoder for Qwen3 (and its MoE), Qwen2, Llama and Phi: differences are ModelConfig fields.

Layers are scanned: every layer parameter has a leading [L], and compile time does not
grow with depth.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.models import attention, layers, moe, rope
from opd_jax.models.configs import ModelConfig
from opd_jax.models.layers import KVCache
from opd_jax.sharding import constrain

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Unrolled(nn.Module):
  """The layers one after the other, each with parameters and a cache of its own.

  A scan slices every layer's weights and cache out of stacked arrays, which copies them: next
  to nothing for a batch of sequences, most of the time of a step that adds one token a row.
  """

  block: type[nn.Module]
  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, *context):
    caches = []
    for i in range(self.config.num_layers):
      layer = self.block(self.config, self.dtype, name=f"layer_{i}")
      x, kept = layer(x, None if cache is None else cache[i], *context)
      caches.append(kept)
    return x, tuple(caches)


def stack(block: type[nn.Module], config: ModelConfig, dtype: Any, remat: str,
          unrolled: bool) -> nn.Module:
  """All layers as one module: scanned, their activations recomputed as `remat` says, or `Unrolled`.

  Raises: ValueError for an unknown `remat`.
  """
  if remat not in REMAT:
    raise ValueError(f"model.remat is {remat!r}; it must be one of {list(REMAT)}")
  if unrolled:
    return Unrolled(block, config, dtype)
  if REMAT[remat] is not None:
    block = nn.remat(block, policy=REMAT[remat], prevent_cse=False)
  scanned = nn.scan(
      block, variable_axes={"params": 0}, split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast), length=config.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config, dtype)


class Block(nn.Module):
  """One pre-norm layer: attention, then one MLP or several, each added to the residual stream."""

  config: ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, index, angles, mask):
    norm = lambda name: layers.RMSNorm(self.config.norm_eps, name=name)
    y, cache = layers.Attention(self.config, self.dtype, name="attention")(
        norm("attention_norm")(x), cache, index, angles, mask)
    x = constrain(x + y, "batch", "length", "act_embed")
    mlp = moe.Experts if self.config.num_experts else layers.GatedMLP
    x = x + mlp(self.config, self.dtype, name="mlp")(norm("mlp_norm")(x))
    return constrain(x, "batch", "length", "act_embed"), cache


class Transformer(nn.Module):
  """Decoder-only language model.

  Attributes:
    config: shape and dialect.
    dtype: compute dtype; master weights are float32 and are cast at use.
    remat: which activations the backward pass recomputes, a key of `REMAT`.
    unrolled: whether parameters and cache are per layer instead of stacked (see decoding.py).
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = "dots"
  unrolled: bool = False

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)
    self.blocks = stack(Block, c, self.dtype, self.remat, self.unrolled)
    self.final_norm = layers.RMSNorm(c.norm_eps)
    if not c.tied_embeddings:
      init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
      self.head = self.param("head", init, (c.embed_dim, c.vocab_size), jnp.float32)

  def __call__(self, tokens: Array, positions: Array, segment_ids: Array,
               cache: KVCache | None = None,
               length: int | None = None) -> tuple[Array, KVCache | None]:
    """Hidden states after the final norm.

    Args:
      tokens: i32[B, S].
      positions: i32[B, S], rotary position of each token within its own sequence.
      segment_ids: i32[B, S]; a token sees earlier tokens of its own segment. 0 is
        padding. One mechanism serves left padding and packing.
      cache: slots already filled; the S tokens are written behind them.
      length: what rotary angles that depend on a length are stretched to (see rope.py); the
        slots of the cache, or S without one, if it is None.
    Returns: hidden [B, S, D] in the compute dtype, and the extended cache (or None).
    """
    x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
    x = constrain(x, "batch", "length", "act_embed")
    index, kv, seen = layers.slots(cache, segment_ids)
    angles = self._angles(positions, length or seen.shape[1], index)
    mask = attention.mask(segment_ids, seen, index, self.config.sliding_window)
    x, kv = self.blocks(x, kv, index, angles, mask)
    if cache is not None:
      cache = KVCache(kv, seen, index + tokens.shape[1])
    return self.final_norm(x), cache

  def _angles(self, positions: Array, length: int, index: Array) -> tuple[Array, Array]:
    """Rotary angles for all layers; if those are unrolled, not computed anew in each."""
    compute = lambda *_: rope.angles(self.config, positions, length)
    if not self.unrolled:
      return compute()
    blank = jnp.zeros((*positions.shape, self.config.rotary_dim // 2), jnp.float32)
    return layers.apart(compute, (blank, blank), index)

  def logits(self, hidden: Array) -> Array:
    """Hidden states [B, T, D] -> logits f32[B, T, V]."""
    head = self.embedding.T if self.config.tied_embeddings else self.head
    logits = jnp.einsum("btd,dv->btv", hidden, head.astype(self.dtype),
                        preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "length", "vocab")
