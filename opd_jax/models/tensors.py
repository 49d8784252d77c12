"""The safetensors format, read and written one tensor at a time.

The safetensors library maps a whole file into memory or wants all tensors at once; a
checkpoint of S bytes must pass through here with no more than its largest tensor on the host.
A file is: header length (u64, little endian), header (JSON: name -> dtype, shape, offsets), data.
"""

from collections.abc import Callable
import json
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Entry(NamedTuple):
  """Where a tensor lies."""

  path: str
  offset: int
  dtype: str
  shape: tuple[int, ...]


def read_header(path: str) -> dict[str, Entry]:
  """Tensors of one file by name.

  Raises: ValueError if the file is cut off or is no safetensors file.
  """
  size = os.path.getsize(path)
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise ValueError(f"{path}: not a whole safetensors file ({size} bytes, header of {length})")
    try:
      header = json.loads(f.read(length))
    except ValueError as error:
      raise ValueError(f"{path}: not a safetensors file, its header is no JSON") from error
  header.pop("__metadata__", None)
  entries = {}
  for name, info in header.items():
    start, end = info["data_offsets"]
    if 8 + length + end > size:
      raise ValueError(f"{path}: cut off inside tensor {name!r} ({size} bytes, "
                       f"{8 + length + end} wanted); copy the file again")
    entries[name] = Entry(path, 8 + length + start, info["dtype"], tuple(info["shape"]))
  return entries


def find(folder: str) -> dict[str, Entry]:
  """All tensors of a Hugging Face folder, from one file or from the shards of its index.

  Raises: ValueError if there are only pickles, which can run code, or no weights at all, or if
    the index cannot be read.
  """
  index = os.path.join(folder, INDEX)
  if os.path.exists(os.path.join(folder, SINGLE)):
    files = [SINGLE]
  elif os.path.exists(index):
    files = _read_index(index)
    for name in files:
      if os.path.basename(name) != name or not os.path.exists(os.path.join(folder, name)):
        raise ValueError(f"{index} names {name!r}, which is not a file of that folder")
  else:
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
      raise ValueError(
          f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when "
          "read and is refused; convert it to safetensors with transformers: "
          "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)")
    raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}; found {found or 'no such folder'}")
  entries = {}
  for name in files:
    entries.update(read_header(os.path.join(folder, name)))
  return entries


def _read_index(path: str) -> list[str]:
  """The shards that an index names."""
  try:
    with open(path, encoding="utf-8") as f:
      index = json.load(f)
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); it may be cut off, copy it again") from error
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{path} has no weight_map (tensor name -> file); copy it again")
  return sorted(set(weight_map.values()))


def read(entry: Entry) -> np.ndarray:
  """One tensor, in a buffer of its own."""
  count = int(np.prod(entry.shape, dtype=np.int64))
  return np.fromfile(entry.path, DTYPES[entry.dtype], count, offset=entry.offset).reshape(
      entry.shape)


class Planned(NamedTuple):
  """A tensor to be written: its shape now, its content when asked."""

  shape: tuple[int, ...]
  dtype: np.dtype
  content: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write(folder: str, plan: dict[str, Planned], max_shard_bytes: int) -> None:
  """Writes model.safetensors, or shards of at most `max_shard_bytes` and their index."""
  shards, room = [[]], max_shard_bytes
  for name, tensor in plan.items():
    if tensor.size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= tensor.size
  total, weight_map = len(shards), {}
  for i, names in enumerate(shards):
    file = SINGLE if total == 1 else f"model-{i + 1:05}-of-{total:05}.safetensors"
    weight_map.update(dict.fromkeys(names, file))
    _write_file(os.path.join(folder, file), {name: plan[name] for name in names})
  if total > 1:
    size = sum(tensor.size for tensor in plan.values())
    with open(os.path.join(folder, INDEX), "w") as f:
      json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, f, indent=2)


def _write_file(path: str, plan: dict[str, Planned]) -> None:
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in plan.items():
    header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                    "data_offsets": [offset, offset + tensor.size]}
    offset += tensor.size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # readers map the data: keep it aligned
  with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little"))
    f.write(text)
    for tensor in plan.values():
      np.ascontiguousarray(tensor.content(), tensor.dtype).tofile(f)
