"""The device's part of the engine: what happens to slots, each a compiled function.

All slots write the same column of the cache at a step, so that a write is one update of a buffer
that stays where it is, and no scatter. A row's tokens end at the present column, wherever they
began; columns that it does not own are masked by their segment id, 0.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from opd_jax.models import decoding, layers
from opd_jax.models.layers import KVCache
from opd_jax.rollouts import sampler
from opd_jax.rollouts.sampler import Rollout, Sampling
from opd_jax.sharding import constrain, gather_rows


class Settings(NamedTuple):
  """What a rollout is made for, whatever the prompts. Static: changing it compiles anew."""

  max_response: int                # T, the longest response in tokens, EOS included
  eos_ids: tuple[int, ...]         # end a response
  pad_id: int                      # stands after it
  vocab_size: int                  # of the tokenizer; ids from there on are never drawn
  sampling: Sampling = Sampling()
  slots: int = 0                   # rows decoded at once; 0: all rows of a call
  chunk: int = 16                  # decode steps between two looks at who has ended
  kv_dtype: str = ""               # "": the compute dtype; or "float32", "bfloat16", "int8"
  buckets: tuple[int, ...] = ()    # widths that prompts are padded to, besides the call's own
  length: int = 0                  # of the sequences; 0: as wide as prompts and responses (rope.py)


class Block(NamedTuple):
  """Prompts that have been read and wait for slots."""

  layers: tuple[layers.LayerCache, ...]  # [N, K, S, head_dim] each, in the form of the cache
  mask: Array                            # bool[N, S], left-padded
  hidden: Array                          # [N, D], of the last token


class Rows(NamedTuple):
  """Who is in the slots; all [B], kept by the host."""

  row: Any     # i32, place in the call: names the random numbers
  prompt: Any  # i32, tokens of the prompt
  drawn: Any   # i32, tokens of the response so far; the last of them is not in the cache yet
  limit: Any   # i32, tokens that the response may have
  live: Any    # bool, false: the slot is free


class Steps(NamedTuple):
  """Compiled once for each shape.

  Prompts are read by the model as it is, from its parameters: that is a pass like any other. The
  other steps want the model unrolled, and weights from `decoding.preparation`.
  """

  empty: Callable[..., KVCache]
  prefill: Callable[..., Block]
  fill: Callable[..., tuple[KVCache, Array, Rollout]]
  align: Callable[..., KVCache]
  keep: Callable[..., tuple[KVCache, Array]]
  decode: Callable[..., tuple[KVCache, Array, Rollout]]


@functools.cache
def compiled(model: nn.Module, settings: Settings) -> Steps:
  """The steps of one model, shared by all who ask for the same."""
  unrolled = lambda step: functools.partial(step, decoding.unrolled(model), settings)
  return Steps(
      empty=jax.jit(unrolled(empty), static_argnames=("rows", "width")),
      prefill=jax.jit(functools.partial(prefill, model, settings), static_argnames="length"),
      fill=functools.partial(fill, jax.jit(unrolled(begin))),
      align=align, keep=jax.jit(keep),
      decode=jax.jit(unrolled(decode), static_argnames="length", donate_argnames="cache"))


def empty(model: nn.Module, settings: Settings, *, rows: int, width: int) -> KVCache:
  """A cache of `width` columns for that many slots, nothing in it."""
  return layers.empty_cache(model.config, rows, width, cache_dtype(model, settings), unrolled=True)


def prefill(model: nn.Module, settings: Settings, params: Any, prompt: Array, mask: Array, *,
            length: int) -> Block:
  """Reads prompts i32[N, S], left-padded, as part of sequences of `length` tokens."""
  cache = layers.empty_cache(model.config, *prompt.shape, model.dtype)
  positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  hidden, cache = model.apply({"params": params}, prompt, positions, mask.astype(jnp.int32),
                              cache, length)
  kept = layers.stored(cache.layers.keys, cache.layers.values, cache_dtype(model, settings))
  apart = tuple(jax.tree.map(lambda x: x[i], kept) for i in range(model.config.num_layers))
  return Block(apart, mask, hidden[:, -1])


def fill(first: Callable[..., Any], weights: Any, cache: KVCache, token: Array, block: Block,
         source: Array, fresh: Array, rows: Rows, column: int,
         key: Array) -> tuple[KVCache, Array, Rollout]:
  """Puts prompts into slots, ending before `column`, and draws their first tokens.

  One layer after the other: on a mesh every device is handed the prompts of all others, of which it
  keeps its own slots'; there is room for a layer of these, not for all.

  Args:
    first: the compiled `begin`.
    weights: prepared.
    cache, token: of all slots; the cache is updated in place.
    block: S tokens each of some prompts.
    source: i32[B], which of them goes into each slot that is `fresh`, bool[B].
    rows: with the fresh ones already in it.
    column: i32, at least S.
    key: of this rollout.
  Returns: cache, token i32[B], and what was drawn, [1, B].
  """
  layers = tuple(placed(old, new, source, fresh, column)
                 for old, new in zip(cache.layers, block.layers))
  segment_ids, token, drawn = first(weights, cache.segment_ids, token, block.mask, block.hidden,
                                    source, fresh, rows, column, key)
  return cache.replace(layers=layers, segment_ids=segment_ids), token, drawn


@functools.partial(jax.jit, donate_argnums=0)
def placed(old: layers.LayerCache, new: layers.LayerCache, source: Array, fresh: Array,
           column: Array) -> layers.LayerCache:
  """`fill` of one layer."""
  return jax.tree.map(lambda old, new: _place(
      old, gather_rows(new, "kv_heads", *[None] * (new.ndim - 2)), source, fresh, column, 2),
      old, new)


def _place(old: Array, new: Array, source: Array, fresh: Array, column: Array,
           axis: int) -> Array:
  """Columns of fresh slots, along `axis`, ending before `column`."""
  width = new.shape[axis]
  chosen = fresh.reshape(-1, *(1,) * (old.ndim - 1))
  here = jax.lax.dynamic_slice_in_dim(old, column - width, width, axis)
  return jax.lax.dynamic_update_slice_in_dim(
      old, jnp.where(chosen, new[source].astype(old.dtype), here), column - width, axis)


def begin(model: nn.Module, settings: Settings, weights: Any, segment_ids: Array, token: Array,
          mask: Array, hidden: Array, source: Array, fresh: Array, rows: Rows, column: Array,
          key: Array) -> tuple[Array, Array, Rollout]:
  """`fill` without the layers: segment ids, last tokens and what was drawn of fresh slots."""
  # The mask stays of bools until each device has its rows: libtpu 0.0.42 aborts over a cast before
  # that where a chip of v5p has 32 of them.
  segment_ids = _place(jnp.where(fresh[:, None], 0, segment_ids), mask, source, fresh, column, 1)
  first, logprob = draw(model, settings, weights, hidden[source], rows, key)
  return (segment_ids, jnp.where(fresh, first, token),
          whole(first[None], fresh[None], logprob[None]))


def align(cache: KVCache, live: Array, shift: Array, *, width: int) -> KVCache:
  """Moves columns to the front by `shift` (or back, if negative), in a cache of `width`.

  What leaves at one end may come back at the other: none of it belongs to a live row. The old cache
  is used up layer by layer, so that there are never two of them.
  """
  layers = []
  for old in cache.layers:
    layers.append(moved(old, shift, width=width, axis=2))
    jax.tree.map(lambda x: x.delete(), old)  # of another width it cannot be donated
  return cache.replace(layers=tuple(layers), segment_ids=moved(
      owned(cache.segment_ids, live), shift, width=width, axis=1))


@jax.jit
def owned(segment_ids: Array, live: Array) -> Array:
  """Segment ids i32[B, C] without those of rows that have ended."""
  return jnp.where(live[:, None], segment_ids, 0)


@functools.partial(jax.jit, static_argnames=("width", "axis"))
def moved(entries: Any, shift: Array, *, width: int, axis: int) -> Any:
  """`align` of one layer: arrays of columns along `axis`."""
  def move(x: Array) -> Array:
    grown = max(width - x.shape[axis], 0)
    x = jnp.pad(x, [(0, grown if i == axis else 0) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(jnp.roll(x, -shift, axis), 0, width, axis=axis)
  return jax.tree.map(move, entries)


def keep(cache: KVCache, token: Array, kept: Array) -> tuple[KVCache, Array]:
  """Only the slots i32[n] of a cache of more, with their last tokens."""
  entries = jax.tree.map(lambda x: constrain(
      x[kept], "batch", "kv_heads", *[None] * (x.ndim - 2)), cache.layers)
  segment_ids = constrain(cache.segment_ids[kept], "batch", None)
  return cache.replace(layers=entries, segment_ids=segment_ids), constrain(token[kept], "batch")


def decode(model: nn.Module, settings: Settings, weights: Any, cache: KVCache, token: Array,
           rows: Rows, column: Array, steps: Array, key: Array, *,
           length: int) -> tuple[KVCache, Array, Rollout]:
  """At most `steps` steps, fewer if all rows end.

  Args:
    model, settings, weights: of the policy; the model is unrolled, the weights are prepared.
    cache, token: of all slots; the cache is updated in place.
    rows: who is in them.
    column: i32, the next one to be written.
    steps: i32, at most `settings.chunk`.
    key: of this rollout.
    length: of the sequences, see `prefill`.
  Returns: cache, token i32[B], and what was drawn, [chunk, B]: of a row a column, true in its
    mask while the row lived.
  """
  eos = jnp.asarray(settings.eos_ids, jnp.int32)

  def cond(state):
    step, _, _, rows, _ = state
    return (step < steps) & jnp.any(rows.live)

  def body(state):
    step, cache, token, rows, out = state
    live = rows.live
    # Where nobody is, any position will do, but not one that the model does not know.
    position = jnp.where(live, rows.prompt + rows.drawn - 1, 0)
    hidden, cache = model.apply({"params": weights}, token[:, None], position[:, None],
                                live[:, None].astype(jnp.int32), cache, length)
    token, logprob = draw(model, settings, weights, hidden[:, 0], rows, key)
    out = jax.tree.map(lambda steps, now: jax.lax.dynamic_update_index_in_dim(
        steps, now, step, axis=0), out, Rollout(token, live, logprob))
    drawn = rows.drawn + live
    live = live & ~jnp.isin(token, eos) & (drawn < rows.limit)
    return step + 1, cache, token, rows._replace(drawn=drawn, live=live), out

  blank = lambda dtype: jnp.zeros((settings.chunk, token.shape[0]), dtype)
  out = Rollout(blank(jnp.int32), blank(bool), blank(jnp.float32))
  state = jnp.zeros((), jnp.int32), cache.replace(index=jnp.int32(column)), token, rows, out
  _, cache, token, _, out = jax.lax.while_loop(cond, body, state)
  return cache, token, whole(*out)


def cache_dtype(model: nn.Module, settings: Settings) -> jnp.dtype:
  """What keys and values are stored in."""
  return jnp.dtype(settings.kv_dtype or model.dtype)


def draw(model: nn.Module, settings: Settings, weights: Any, hidden: Array, rows: Rows,
         key: Array) -> tuple[Array, Array]:
  """The next token of each row, from hidden [B, D], with the key of (row, position)."""
  logits = model.apply({"params": weights}, hidden[:, None], method="logits")[:, 0]
  logits = jnp.where(jnp.arange(logits.shape[-1]) < settings.vocab_size, logits, -jnp.inf)
  keys = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(key, row), t))(
      rows.row, rows.drawn)
  return sampler.draw(logits, keys, settings.sampling)


def whole(*columns: Array) -> Rollout:
  """On a mesh, every host reads all of it."""
  return Rollout(*(constrain(x, None, None) for x in columns))
