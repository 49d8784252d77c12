"""Continuous batching: a fixed number of slots, refilled from the queue as rows end.

    queue of prompts -> read a block of them -> slots <-> chunks of decode steps -> responses

The plain sampler decodes until the longest row has ended; here a row that ends makes room for
another. Rows of one group share the reading of their prompt. The cache is as wide as the rows in
it need, in powers of two; when its columns run out, what is still in use moves to the front.

Once nobody waits, the slots become fewer as rows end, a quarter each time: a step costs what all
slots cost, and the long rows at the end would keep those of everybody else.

The host sees who has ended once a chunk, never at a token. What it needs to decide who goes
where, it knows: only keys, values and last tokens are on the device.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from opd_jax import sharding
from opd_jax.models import decoding
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import slots
from opd_jax.rollouts.sampler import Rollout
from opd_jax.rollouts.slots import Rows, Settings

NARROWEST = 128  # columns of the smallest cache: below, attention costs next to nothing
FEWEST = 8       # slots that are never made fewer: below, a step reads weights and little else
TILE = 16        # divides a cache's columns: of another number, a TPU keeps a second, padded cache

KV_DTYPES = ("", "float32", "bfloat16", "int8")

Generate = Callable[..., Rollout]  # see `make`


class Stopped(Exception):
  """A rollout was asked to stop and left what it had: the same key draws it again."""


class Queue(NamedTuple):
  """The rows of one call and their groups: neighbors that have the same prompt."""

  prompt: np.ndarray   # i32[R, S], left-padded
  mask: np.ndarray     # bool[R, S]
  length: np.ndarray   # i32[R], tokens of the prompt
  limit: np.ndarray    # i32[R], tokens that the response may have
  group: np.ndarray    # i32[R], which group a row is of
  leader: np.ndarray   # i32[groups], the first row of each


def make(model: nn.Module, settings: Settings) -> Generate:
  """A function that samples one response a row.

  Row by row it draws what `sampler.sample` draws from the same key, whatever the number of
  slots, the length of a chunk and the other rows, up to rounding: that may depend on how many rows
  a product has, and so may once in a while decide for another token, in bfloat16 before float32.

  Args:
    model: the policy.
    settings: see `Settings`.
  Returns: (params, prompt i32[R, S] left-padded, its mask, scalar key, limit i32[R], stop) ->
    Rollout of numpy [R, T] arrays. A row's own limit is at most T, which it is if none are given.
    `stop()` is asked before every chunk; once it is true, `Stopped` is raised.
  Raises: ValueError for an unknown `kv_dtype`; when called, for a limit that is not in 1..T, or
    for a prompt that with its response is longer than the model allows.
  """
  if settings.kv_dtype not in KV_DTYPES:
    raise ValueError(f"rollout.kv_dtype is {settings.kv_dtype!r}; it must be one of "
                     + ", ".join(repr(name) for name in KV_DTYPES))
  steps, prepare = slots.compiled(model, settings), decoding.preparation(model)

  def generate(params: Any, prompt: np.ndarray, mask: np.ndarray, key: Array,
               limit: np.ndarray | None = None,
               stop: Callable[[], bool] = lambda: False) -> Rollout:
    if limit is None:
      limit = np.full(len(prompt), settings.max_response, np.int32)
    queue = in_groups(np.asarray(prompt), np.asarray(mask), limit)
    check(queue, settings.max_response, model.config.max_positions)
    return run(steps, settings, params, prepare(params), queue, key, stop)
  return generate


def in_groups(prompt: np.ndarray, mask: np.ndarray, limit: np.ndarray) -> Queue:
  """Rows in the order they came in."""
  differs = np.any((prompt[1:] != prompt[:-1]) | (mask[1:] != mask[:-1]), axis=1)
  leads = np.concatenate([[True], differs])
  return Queue(prompt, mask, mask.sum(axis=1, dtype=np.int32), limit, np.cumsum(leads) - 1,
               np.flatnonzero(leads))


def check(queue: Queue, max_response: int, allowed: int) -> None:
  """Refuses limits beyond the columns of the result, and rows beyond the model's positions."""
  if queue.limit.min() < 1 or queue.limit.max() > max_response:
    raise ValueError(f"the rows' limits are {queue.limit.min()} to {queue.limit.max()} tokens; "
                     f"they must be at least 1 and at most max_response = {max_response}")
  row = int(np.argmax(queue.length + queue.limit))
  total = int(queue.length[row] + queue.limit[row])
  if total > allowed:
    raise ValueError(
        f"row {row} has a prompt of {queue.length[row]} tokens; with a response of up to "
        f"{queue.limit[row]} that makes {total}, but the model allows {allowed}; shorten the "
        "prompt or the response")


def run(steps: slots.Steps, settings: Settings, params: Any, weights: Any, queue: Queue,
        key: Array, stop: Callable[[], bool] = lambda: False) -> Rollout:
  """The loop over chunks: fills free slots, decodes, takes down what was drawn.

  Args:
    steps, settings, queue: of this rollout.
    params, weights: the model's parameters, and what `decoding.preparation` made of them.
    key, stop: see `make`.
  """
  total, width = queue.prompt.shape
  count, length, widest = extent(settings, total, width)
  shape = total, settings.max_response
  out = Rollout(np.full(shape, settings.pad_id, np.int32), np.zeros(shape, bool),
                np.zeros(shape, np.float32))
  rows = Rows(*(np.zeros(count, np.int32) for _ in range(4)), np.zeros(count, bool))
  cache, token, column = None, jnp.zeros((count,), jnp.int32), 0

  def room(front: int, ahead: int) -> None:
    """Makes `front` columns before the present one and `ahead` from there on."""
    nonlocal cache, column
    span = int(np.max((rows.prompt + rows.drawn - 1) * rows.live))  # what a row looks back at
    least = max(span, front)
    wide = lambda spare: min(max(NARROWEST, 1 << (least + spare - 1).bit_length()), widest)
    if cache is None:
      cache, column = steps.empty(rows=count, width=wide(ahead)), least
    now = cache.segment_ids.shape[1]
    # Smaller only if it stays so for a while.
    if column < front or column + ahead > now or wide(2 * settings.chunk) < now:
      cache = steps.align(cache, rows.live, column - least, width=wide(ahead))
      column = least

  def take(drawn: Rollout) -> None:
    """Takes down what was drawn, [n, B] in order, and sees who has ended."""
    for slot in np.flatnonzero(drawn.mask.any(axis=0)):
      real, start = drawn.mask[:, slot], rows.drawn[slot]
      rows.drawn[slot] += real.sum()
      where = rows.row[slot], slice(start, rows.drawn[slot])
      for whole, part in zip(out, drawn):
        whole[where] = part[real, slot]
      last = out.response[where][-1]
      rows.live[slot] = rows.drawn[slot] < rows.limit[slot] and last not in settings.eos_ids

  waiting = blocks(steps, settings, params, queue, count, length)
  begin, end, block = 0, 0, None  # rows that the block is for
  for_next = 0                    # the next row that has no slot
  while for_next < total or rows.live.any():
    while for_next < total and not rows.live.all():
      if for_next == end:
        begin, end, block = next(waiting)
      fresh = np.flatnonzero(~rows.live)[:end - for_next]
      room(block.mask.shape[1], min(settings.chunk, settings.max_response - 1))
      rows.row[fresh] = np.arange(for_next, for_next + len(fresh))
      rows.prompt[fresh] = queue.length[rows.row[fresh]]
      rows.limit[fresh] = queue.limit[rows.row[fresh]]
      rows.drawn[fresh], rows.live[fresh] = 0, True
      for_next += len(fresh)
      chosen = np.isin(np.arange(count), fresh)
      source = np.where(chosen, queue.group[rows.row] - queue.group[begin], 0)
      cache, token, drawn = steps.fill(weights, cache, token, block, source, chosen, rows, column,
                                       key)
      take(jax.device_get(drawn))
      if for_next == end:
        block = None  # all of it is in slots: its memory is the next one's
    if stop():
      raise Stopped
    if rows.live.any():
      if for_next == total and (left := fewer(int(rows.live.sum()), count)) < count:
        kept = np.argsort(~rows.live, kind="stable")[:left]  # those that live, and some that do not
        cache, token = steps.keep(cache, token, kept)
        rows, count = Rows(*(x[kept] for x in rows)), left
      ahead = min(settings.chunk, int((rows.limit - rows.drawn)[rows.live].max()))
      room(0, ahead)
      cache, token, drawn = steps.decode(weights, cache, token, rows, column, ahead, key,
                                         length=length)
      drawn = jax.device_get(drawn)
      column += int(drawn.mask.any(axis=1).sum())
      take(drawn)
  return out


def extent(settings: Settings, total: int, width: int) -> tuple[int, int, int]:
  """How large things get: slots, the length of the sequences, columns of the widest cache.

  Args:
    settings: of the rollout.
    total: rows of a call.
    width: of their prompts.
  """
  count = min(settings.slots or total, total)
  columns = width + settings.max_response - 1  # of a row but its last token, not read again
  # Rows that all began together are never wider than that; others take turns at being longest.
  widest = columns if total <= count else columns + settings.chunk
  return count, settings.length or columns, -(-widest // TILE) * TILE


def fewer(live: int, count: int) -> int:
  """The slots that are enough for `live` rows, of `count`: a quarter, or a quarter of that.

  Each number of slots is compiled for, so there are few of them. On a mesh a number that does not
  spread over the devices as `count` does is none.
  """
  while (count > (left := -(-count // 4)) >= max(live, FEWEST)
         and sharding.shards("batch", left) == sharding.shards("batch", count)):
    count = left
  return count


def blocks(steps: slots.Steps, settings: Settings, params: Any, queue: Queue, count: int,
           length: int) -> Iterator[tuple[int, int, slots.Block]]:
  """Reads the prompts, as many groups at a time as fill all slots, each when it is asked for.

  Yields: (first row, row after the last, block).
  """
  total, width = queue.prompt.shape
  groups, size = len(queue.leader), int(queue.group[count - 1]) + 1
  for first in range(0, groups, size):
    # One shape for all: a last block that is not full repeats its last prompt.
    leaders = queue.leader[np.minimum(np.arange(first, first + size), groups - 1)]
    wide = batches.bucket(int(queue.length[leaders].max()),
                          [*(size for size in settings.buckets if size < width), width])
    after = first + size
    yield (int(queue.leader[first]), int(queue.leader[after]) if after < groups else total,
           steps.prefill(params, queue.prompt[leaders, width - wide:],  # kept by nobody here
                         queue.mask[leaders, width - wide:], length=length))
