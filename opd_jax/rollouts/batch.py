"""Batch: the container of one training step, and how rows become arrays.

Static shapes: prompts and responses are padded to one of a few bucket lengths each, so a run
compiles each function at most once for each pair.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import struct
from jax import Array
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import sharding


class Batch(struct.PyTreeNode):
  """B = P*G rows; the G rows of a group are neighbors and share their prompt.

  Column t of every [B, T] array speaks about `response[:, t]`. What the rollout, the
  verifier and the teachers have not filled in yet is None.
  """

  prompt: Array                           # i32[B, S], left-padded
  prompt_mask: Array                      # bool[B, S]
  response: Array | None = None           # i32[B, T], right-padded
  mask: Array | None = None               # bool[B, T], true up to and including EOS
  learn: Array | None = None              # bool[B, T], the tokens of the mask that carry loss
  sampler_logprobs: Array | None = None   # f32[B, T], of the distribution sampled from
  old_logprobs: Array | None = None       # f32[B, T], the trainer's before the first of its updates
  reward: Array | None = None             # f32[B]
  advantage: Array | None = None          # f32[B], what its reward and its group's teach
  teacher_id: Array | None = None         # i32[B], which of the teachers each row learns from
  teacher_logprobs: Array | None = None   # f32[B, T], under each row's own teacher
  teacher_hidden: Array | None = None     # [B, T, D], its states, D the widest teacher's
  teacher_top_ids: Array | None = None    # i32[B, T, K], its likeliest tokens, if said ahead
  teacher_top_logprobs: Array | None = None  # f32[B, T, K], log-probabilities of these
  reference_logprobs: Array | None = None  # f32[B, T]


def bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length`.

  Raises: ValueError if none does; rows are dropped and counted when loaded, never cut here.
  """
  for size in sorted(buckets):
    if length <= size:
      return size
  raise ValueError(f"a row of {length} tokens is longer than the largest bucket, {max(buckets)}")


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int,
        left: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Rows of ids -> (i32[B, length], bool[B, length]); masks come from lengths, never from ids."""
  ids = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    where = slice(length - len(row), None) if left else slice(0, len(row))
    ids[i, where] = row
    mask[i, where] = True
  return ids, mask


def prompts(rows: Sequence[Sequence[int]], group_size: int, buckets: Sequence[int],
            pad_id: int, teacher_ids: Sequence[int] | None = None) -> Batch:
  """P prompts -> a Batch of P*G rows, each prompt repeated G times, padded to its bucket."""
  length = bucket(max(map(len, rows)), buckets)
  ids, mask = pad(rows, length, pad_id, left=True)
  batch = Batch(np.repeat(ids, group_size, axis=0), np.repeat(mask, group_size, axis=0))
  if teacher_ids is None:
    return batch
  return batch.replace(teacher_id=np.repeat(np.array(teacher_ids, np.int32), group_size))


def answered(batch: Batch, response_ids: Sequence[Sequence[int]], buckets: Sequence[int],
             pad_id: int) -> Batch:
  """A Batch of prompts with given responses in the place of a rollout: nobody sampled them."""
  response, mask = pad(response_ids, bucket(max(map(len, response_ids)), buckets), pad_id)
  return batch.replace(response=response, mask=mask, learn=mask)


def pair(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]],
         prompt_length: int, response_length: int, pad_id: int) -> Batch:
  """Given responses (offline data, or another context for the same response) as a Batch."""
  prompt, prompt_mask = pad(prompt_ids, prompt_length, pad_id, left=True)
  response, mask = pad(response_ids, response_length, pad_id)
  return Batch(prompt, prompt_mask, response, mask)


def split(batch: Any, count: int) -> Any:
  """[B, ...] leaves -> [count, B/count, ...], for a scan over micro-batches.

  Rows are dealt out in turn (row i to micro-batch i mod count), so every micro-batch
  stays spread over all devices that rows are cut over.
  """
  def one(x):
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(one, batch)


def join(parts: Any) -> Any:
  """Undoes `split`: [count, B/count, ...] leaves -> [B, ...], rows in their first order."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def in_parts(function: Callable[[Any], Any], count: int, rows: Any) -> Any:
  """`function(rows)`, computed on one of `count` equal parts of the rows after the other.

  So the intermediate arrays of one part exist at a time. For functions that see each row alone.

  Args:
    function: [B/count, ...] leaves -> [B/count, ...] leaves.
    count: how many parts, as `split` deals them.
    rows: [B, ...] leaves.
  """
  return function(rows) if count == 1 else join(jax.lax.map(function, split(rows, count)))


def parts(rows: int, most: int) -> int:
  """Into how many equal parts `rows` must be cut to have no more than `most` each.

  Every device that rows are cut over keeps as many as the others, and at least one. Of a number
  of rows a device that is prime, that may be one.
  """
  own = rows // sharding.shards("batch", rows)
  whole = max(most * own // rows, 1)  # rows of a part on one device
  return next(n for n in range(1, own + 1) if own % n == 0 and own // n <= whole)


def routed(functions: Sequence[Callable[[Any, Array], tuple[Any, Any]]], choice: Array | None,
           rows: Any) -> tuple[Any, Any]:
  """Every row through the one function that it chooses, and through no other.

  Rows of one choice share blocks of a fixed size, the last of which is filled up. So shapes are
  static whatever the rows choose, and about a quarter more rows are computed than there are.

  Args:
    functions: N functions of (rows, real), both of one block: [b, ...] leaves, and bool[b], false
      where a row only fills the block. Each returns ([b, ...] leaves, a tree to be summed over
      the blocks), of shapes that are the same for all.
    choice: i32[B] in [0, N), or None if there is but one function: it has all rows at once.
    rows: [B, ...] leaves. No gradient passes through their being put into blocks.
  Returns: [B, ...] leaves, each row's own result, and the sums.
  """
  total, kinds = jax.tree.leaves(rows)[0].shape[0], len(functions)
  if kinds == 1:
    return functions[0](rows, jnp.ones(total, bool))
  devices = sharding.shards("batch", total)
  size = max(total // (4 * kinds * devices), 1) * devices
  blocks = (total + kinds * (size - 1)) // size  # enough for any choice
  mine = choice[:, None] == jnp.arange(kinds)
  needed = -(-jnp.sum(mine, axis=0) // size)
  last = jnp.cumsum(needed)
  rank = jnp.sum(jnp.where(mine, jnp.cumsum(mine, axis=0) - 1, 0), axis=1)
  place = size * (last - needed)[choice] + rank
  source = jnp.full(blocks * size, total).at[place].set(jnp.arange(total))
  owner = jnp.minimum(jnp.searchsorted(last, jnp.arange(blocks), side="right"), kinds - 1)

  def block(owner, source):
    part = jax.tree.map(lambda x: sharding.constrain(
        x.at[source].get(mode="clip"), "batch", *[None] * (x.ndim - 1)), rows)
    return jax.lax.switch(owner, functions, part, source < total)

  def body(sums, x):
    out, more = block(*x)
    return jax.tree.map(jnp.add, sums, more), out

  each = owner, source.reshape(blocks, size)
  _, sums = jax.eval_shape(block, *(x[0] for x in each))
  sums, out = jax.lax.scan(body, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), each)
  return jax.tree.map(lambda x: sharding.constrain(
      x.reshape(-1, *x.shape[2:])[place], "batch", *[None] * (x.ndim - 2)), out), sums
