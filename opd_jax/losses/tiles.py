"""Tiles: how logits are made piece by piece, some columns of T by a block of the vocabulary.

The vocabulary is seen in passes of blocks. The first pass keeps each block's logsumexp l_i and its
means under its own softmax; from these the means over the whole vocabulary follow,

    l = log sum_v e^z = logsumexp_i(l_i),    E[x] = sum_i e^(l_i - l) E_i[x],

so nothing is rescaled on the way. A later pass makes the same logits again and turns them into
slopes and these into gradients. Where one block is the whole vocabulary, XLA sees that it is the
same product and makes it once.

On a mesh every device keeps its own rows and its own part of the vocabulary, a lane: blocks are cut
from all lanes at once, and what devices must add up, they add after the last block. Only the sizes
of the mesh are asked for; without one the same code runs on one device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from opd_jax import sharding

# Elements of one model's logits that exist at a time on a device: 32 MiB in float32. A few such
# tiles are below 5% of what the naive form takes (tests/bench).
ELEMENTS = 2**23
# Rows x columns of a tile, if the vocabulary is too long for one block: every tile reads the heads
# and adds to the head's gradient once, and every block does so with the states.
HEIGHT = 4096
# A logit without probability that may still be subtracted from another: inf - inf is NaN.
LOW = -1e30


class Readout(NamedTuple):
  """How a family turns hidden @ head into the logits of its distribution. Static.

      logits = cap(hidden @ head * scale) / temperature,   cap(x) = soft_cap tanh(x / soft_cap)
  """

  scale: float = 1.0
  soft_cap: float | None = None
  temperature: float = 1.0

  def __call__(self, product: Array) -> Array:
    logits = product * self.scale
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    return logits / self.temperature

  def back(self, logits: Array, slope: Array) -> Array:
    """Derivative with respect to the product, from that with respect to the logits."""
    slope = slope * (self.scale / self.temperature)
    if self.soft_cap is None:
      return slope
    share = jnp.clip(logits * self.temperature / self.soft_cap, -1.0, 1.0)  # LOW^2 is no number
    return slope * (1.0 - jnp.square(share))


class Tiles(NamedTuple):
  """How [T] x [V] is cut. Static."""

  columns: int  # of T in a tile
  parts: int    # of the rows, one a device
  lanes: int    # parts of the vocabulary, one a device
  size: int     # tokens of a lane
  block: int    # of them in a tile

  @classmethod
  def of(cls, shape: tuple[int, ...], vocabulary: int, asked: tuple[int, int]) -> "Tiles":
    """As asked for, or as the budget allows; tiles of nearly equal size.

    Args:
      shape: [B, T, ...] of the states.
      vocabulary: V.
      asked: columns of T and tokens of V in a tile; 0 leaves that one to us.
    """
    parts, lanes = sharding.shards("batch", shape[0]), sharding.shards("vocab", vocabulary)
    rows, size = max(shape[0] // parts, 1), vocabulary // lanes
    height = max(HEIGHT, ELEMENTS // size)
    columns = _even(shape[1], asked[0] or max(height // rows, 1))
    block = _even(size, asked[1] or max(ELEMENTS // (rows * columns), 1))
    aligned = block if asked[1] else min(-(-block // 128) * 128, size)  # a vector unit's width
    return cls(columns, parts, lanes, size, aligned)

  @property
  def blocks(self) -> Array:
    """Numbers of the blocks, to loop over."""
    return jnp.arange(-(-self.size // self.block))

  def start(self, i: Array) -> Array:
    """Where block i begins in every lane: the last one begins early, to end with the lane."""
    return jnp.minimum(i * self.block, self.size - self.block)

  def new(self, i: Array) -> Array:
    """bool[block], false for what an earlier block has seen."""
    return self.start(i) + jnp.arange(self.block) >= i * self.block

  def ids(self, i: Array) -> Array:
    """i32[lanes, block], the tokens of block i."""
    lanes = self.size * jnp.arange(self.lanes)[:, None]
    return lanes + self.start(i) + jnp.arange(self.block)

  def chosen(self, i: Array, tokens: Array) -> Array:
    """bool[B, t, lanes, block], where block i has the token of a column, i32[B, t]."""
    return (tokens[..., None, None] == self.ids(i)) & self.new(i)

  def places(self, i: Array, ids: Array) -> Array:
    """Where in block i tokens i32[B, t, k] stand, i32[B, t, lanes, k]; `block` if they do not."""
    place = ids[:, :, None] - self.size * jnp.arange(self.lanes)[:, None] - self.start(i)
    seen = i * self.block - self.start(i)  # of the last block, by the one before
    return jnp.where((place >= seen) & (place < self.block), place, self.block)

  def in_lanes(self, x: Array) -> Array:
    """[..., V] -> [lanes, ..., size], each lane on its device."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], self.lanes, self.size), -2, 0)

  def collector(self, width: int) -> Array:
    """Zeros f32[parts, lanes, D, size], where each device collects its rows' gradient of a head."""
    zeros = jnp.zeros((self.parts, self.lanes, width, self.size), jnp.float32)
    return sharding.constrain(zeros, "batch", "vocab", None, None)

  def collected(self, x: Array) -> Array:
    """What all devices collected, f32[D, V]."""
    return jnp.moveaxis(jnp.sum(x, axis=0), 0, 1).reshape(x.shape[2], self.lanes * self.size)

  def take(self, x: Array, i: Array) -> Array:
    """[lanes, ..., size] -> [lanes, ..., block]."""
    # XLA on a CPU slices bfloat16 by way of float32, and would convert all of it before the loop.
    x, i = jax.lax.optimization_barrier((x, i))
    return jax.lax.dynamic_slice_in_dim(x, self.start(i), self.block, -1)

  def add(self, x: Array, i: Array, share: Array) -> Array:
    """The inverse of `take`, in place in a loop."""
    return jax.lax.dynamic_update_slice_in_dim(x, self.take(x, i) + share, self.start(i), -1)

  def cut(self, x: Array) -> Array:
    """[B, T, ...] -> [tiles, B, columns, ...], zeros behind T."""
    count = -(-x.shape[1] // self.columns)
    x = jnp.pad(x, [(0, 0), (0, count * self.columns - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], count, self.columns, *x.shape[2:]).swapaxes(0, 1)

  @staticmethod
  def join(x: Array, length: int) -> Array:
    """The inverse of `cut`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _even(length: int, most: int) -> int:
  """The size of pieces, of at most `most`, that are nearly equal."""
  return -(-length // -(-length // most)) if length else 1


class Side(NamedTuple):
  """One model, student or teacher, at the columns of a tile."""

  readout: Readout
  hidden: Array         # [B, t, D]
  head: Array           # [lanes, D, size]
  banned: Array | None  # bool[lanes, size]

  def logits(self, tiles: Tiles, i: Array) -> Array:
    """f32[B, t, lanes, block] of block i; `LOW` where a token is banned or was seen before."""
    product = jnp.einsum("btd,mdv->btmv", self.hidden, self.block(tiles, i),
                         preferred_element_type=jnp.float32)
    dead = ~tiles.new(i)
    if self.banned is not None:
      dead = dead | tiles.take(self.banned, i)
    return jnp.where(dead, LOW, self.readout(product))

  def block(self, tiles: Tiles, i: Array) -> Array:
    """[lanes, D, block] of the head, in the dtype of products."""
    return tiles.take(self.head, i).astype(self.hidden.dtype)

  def gradients(self, tiles: Tiles, slope: Callable[[Array, Array], Array], collected: Array
                ) -> tuple[Array, Array]:
    """Backward pass of the logits.

    Args:
      slope: (i, logits of block i) -> f32[B, t, lanes, block], derivative with respect to them.
      collected: from `Tiles.collector`, changed in place in a loop.
    Returns: the gradient [B, t, D] of the hidden states, and `collected` with the tile's share.
    """
    columns, width = self.hidden.shape[1:]
    # Transposed before the loop: a CPU is slow at products over two first dimensions.
    hidden = self.hidden.reshape(tiles.parts, -1, columns, width).transpose(0, 3, 1, 2)

    def add(carry, i):
      of_hidden, collected = carry
      logits = self.logits(tiles, i)
      # In the states' dtype: float32 against bfloat16 is several times slower.
      slopes = self.readout.back(logits, slope(i, logits)).astype(self.hidden.dtype)
      of_hidden += jnp.einsum("btmv,mdv->mbtd", slopes, self.block(tiles, i),
                              preferred_element_type=jnp.float32)
      share = jnp.einsum("ndbt,nbtmv->ndmv", hidden,
                         slopes.reshape(tiles.parts, -1, *slopes.shape[1:]),
                         preferred_element_type=jnp.float32)
      return (of_hidden, tiles.add(collected, i, jnp.moveaxis(share, 2, 1))), None

    of_hidden = sharding.constrain(jnp.zeros((tiles.lanes, *self.hidden.shape), jnp.float32),
                                   "vocab", "batch", None, None)
    (of_hidden, collected), _ = jax.lax.scan(add, (of_hidden, collected), tiles.blocks)
    return jnp.sum(of_hidden, axis=0).astype(self.hidden.dtype), collected


def weighted_sum(logprobs: Array, x: Array) -> Array:
  """sum_v e^logprobs x over the tokens of a block, [B, t, lanes]."""
  # As a product: XLA on a CPU takes ten times longer for a sum that it fuses with two factors.
  return jnp.einsum("btmv,btmv->btm", jnp.exp(logprobs), x, precision=jax.lax.Precision.HIGHEST)


def over_blocks(totals: Array) -> tuple[Array, Array]:
  """What blocks' logsumexps l_i, [blocks, B, t, lanes], make together.

  Returns: l of the whole vocabulary, [B, t], and the logarithms l_i - l of the blocks' shares.
  """
  total = jax.nn.logsumexp(totals, axis=(0, 3))
  return total, totals - total[..., None]


def minus_infinity(logprobs: Array) -> Array:
  """`LOW` is only for inside: log-probabilities of what cannot happen are -inf to a caller."""
  return jnp.where(logprobs < LOW / 2, -jnp.inf, logprobs)
