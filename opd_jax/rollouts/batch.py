"""Batch: the container of one training step, and how rows become arrays.

Static shapes: prompts and responses are padded to one of a few bucket lengths each, so a run
compiles each function at most once for each pair.
"""

from collections.abc import Sequence
from typing import Any

from flax import struct
from jax import Array
import jax
import numpy as np


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
  reward: Array | None = None             # f32[B]
  teacher_logprobs: Array | None = None   # f32[B, T]
  teacher_hidden: Array | None = None     # [B, T, D], for distribution-level losses
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
            pad_id: int) -> Batch:
  """P prompts -> a Batch of P*G rows, each prompt repeated G times, padded to its bucket."""
  length = bucket(max(map(len, rows)), buckets)
  ids, mask = pad(rows, length, pad_id, left=True)
  return Batch(np.repeat(ids, group_size, axis=0), np.repeat(mask, group_size, axis=0))


def pair(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]],
         prompt_length: int, response_length: int, pad_id: int) -> Batch:
  """Given responses (offline data, or another context for the same response) as a Batch."""
  prompt, prompt_mask = pad(prompt_ids, prompt_length, pad_id, left=True)
  response, mask = pad(response_ids, response_length, pad_id)
  return Batch(prompt, prompt_mask, response, mask)


def split(batch: Any, count: int) -> Any:
  """[B, ...] leaves -> [count, B/count, ...], for a scan over micro-batches.

  Rows are dealt out in turn (row i to micro-batch i mod count), so every micro-batch
  stays spread over all devices of the `data` axis.
  """
  def one(x):
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(one, batch)


def join(parts: Any) -> Any:
  """Undoes `split`: [count, B/count, ...] leaves -> [B, ...], rows in their first order."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
