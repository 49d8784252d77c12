"""Hugging Face folders in and out: tensors by the table of hf_rows.py, one at a time."""

import functools
import json
import os
import re
import tempfile
from typing import Any, Protocol

from flax import traverse_util
import jax
from jax import Array
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from opd_jax import sharding
from opd_jax.models import hf_config, hf_rows, tensors
from opd_jax.models.build import abstract_params
from opd_jax.models.configs import ModelConfig


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def load_config(folder: str) -> ModelConfig:
  """The ModelConfig of a Hugging Face folder.

  Raises: ValueError if config.json is missing, unreadable or asks for what is not implemented.
  """
  path = os.path.join(folder, "config.json")
  if not os.path.exists(path):
    raise ValueError(f"{folder}: no config.json; a Hugging Face model folder is wanted")
  with open(path) as f:
    try:
      raw = json.load(f)
    except ValueError as error:
      raise ValueError(f"{path} is not valid JSON: {error}") from error
  return hf_config.from_hf(raw)


# Buffers that old checkpoints carry: rotary tables and causal masks, which are computed.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")


def _find(folder: str,
          config: ModelConfig) -> tuple[list[hf_rows.Tensor], dict[str, tensors.Entry]]:
  """The tensors of a model and the file entries of a folder, checked to be exactly theirs.

  Raises: ValueError naming tensors that are missing, unexpected, of another shape or type.
  """
  found = tensors.find(folder)
  wanted = hf_rows.tensor_list(
      config, stacked_experts=any(name.endswith(".experts.down_proj") for name in found))
  prefix = wanted[0].name.split(".")[0] + "."
  if not any(name.startswith(prefix) for name in found):
    # Saved without the language-model head around it, as the original GPT-2 is.
    found = {name if name == "lm_head.weight" else prefix + name: e for name, e in found.items()}
  extra = {name for name in found if not _BUFFERS.search(name)} - {t.name for t in wanted}
  if config.tied_embeddings:
    extra.discard("lm_head.weight")  # a copy of the embedding
  missing = [tensor.name for tensor in wanted if tensor.name not in found]
  for what, names in (("lacks", missing), ("has unexpected", sorted(extra))):
    if names:
      raise ValueError(f"{folder} {what} {len(names)} tensor(s) for a {config.family} of "
                       f"{config.num_layers} layers: {', '.join(names[:4])}"
                       f"{', ...' if len(names) > 4 else ''}")
  for tensor in wanted:
    entry = found[tensor.name]
    if entry.shape != tensor.shape:
      raise ValueError(f"{entry.path}: tensor {tensor.name} is {list(entry.shape)}, config.json "
                       f"asks for {list(tensor.shape)}")
    if entry.dtype not in tensors.DTYPES:
      raise ValueError(f"{entry.path}: tensor {tensor.name} is stored as {entry.dtype}; "
                       f"{', '.join(tensors.DTYPES)} can be read (no quantized checkpoints)")
  return wanted, found


@functools.partial(jax.jit, donate_argnums=0)
def _store(stack: Array, piece: Array, at: tuple[int, ...]) -> Array:
  piece = piece.astype(stack.dtype).reshape((1,) * len(at) + piece.shape)
  return jax.lax.dynamic_update_slice(stack, piece, at + (0,) * (stack.ndim - len(at)))


def import_hf(folder: str, config: ModelConfig | None = None, mesh: Mesh | None = None,
              dtype: Any = jnp.float32) -> Any:
  """Loads the weights of a Hugging Face folder, tensor by tensor.

  The host never holds more than one tensor twice (as read, and in our layout) beside the
  arrays themselves: a stack of layers is allocated once, sharded, and layers are written into it.

  Args:
    folder: config.json and model.safetensors, or shards with model.safetensors.index.json.
    config: what config.json is expected to say; read from it by default.
    mesh: arrays are born sharded on it by `sharding.RULES`; None for one device.
    dtype: of the arrays.
  Returns: the plain nested dict that goes under {"params": ...}.
  Raises: ValueError for a pickle, and for tensors missing, unexpected or mis-shaped, by name.
  """
  config = config or load_config(folder)
  wanted, found = _find(folder, config)
  boxed = _flat(abstract_params(config))
  layouts = _flat(sharding.of_params(abstract_params(config), mesh)) if mesh else {}

  def place(row, piece, at):
    if not mesh:
      return jax.device_put(piece)  # jnp.asarray would hold one copy more
    layout = NamedSharding(mesh, PartitionSpec(*layouts[row.path].spec[len(at):]))
    return jax.make_array_from_callback(piece.shape, layout, lambda index: piece[index])

  params = {}
  for tensor in wanted:
    raw = tensors.read(found[tensor.name])
    pieces = [(row, np.ascontiguousarray(piece)) for row, piece in tensor.split(raw)]
    del raw  # now once; while it is copied onto devices, twice again
    while pieces:
      row, piece = pieces.pop()
      if not tensor.at:
        params[row.path] = place(row, piece, ()).astype(dtype)
      else:
        if row.path not in params:
          params[row.path] = jnp.zeros(boxed[row.path].value.shape, dtype,
                                       device=layouts.get(row.path))
        params[row.path] = _store(params[row.path], place(row, piece, tensor.at), tensor.at)
      # Dispatch is asynchronous: without waiting, many host copies would be alive at once.
      params[row.path].block_until_ready()
      del piece
  return traverse_util.unflatten_dict(params, sep="/")


@jax.jit
def _part(stack: Array, at: tuple[int, ...]) -> Array:
  for i in at:
    stack = jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)
  return stack


def _fetch(array: Any, at: tuple[int, ...]) -> np.ndarray:
  """One layer of an array, or an expert of it, or all, on the host, wherever its shards live."""
  if at:
    array = _part(array, at)
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


class SavesTokenizer(Protocol):
  """What `export_hf` needs of a tokenizer (see data/tokenizer.py)."""

  eos_ids: tuple[int, ...]
  pad_id: int

  def save(self, folder: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""


def export_hf(params: Any, config: ModelConfig, folder: str,
              tokenizer: SavesTokenizer | None = None, max_shard_bytes: int = 5_000_000_000,
              dtype: Any = None) -> None:
  """Writes a folder that transformers loads: config, generation config, weights, tokenizer.

  It appears whole or not at all, and replaces an earlier model of that name. With several
  processes all must call this; the first one writes.

  Args:
    params: as from `import_hf`; jax or numpy arrays, sharded or not.
    config: their shape and dialect.
    folder: where to write.
    tokenizer: saved beside the weights; its ids for end and padding go into the configs.
    max_shard_bytes: weights beyond this are split, with an index.
    dtype: of the tensors in the file; that of each array by default.
  Raises: ValueError if `folder` holds something that is not a model.
  """
  flat = _flat(params)
  plan = {}
  for tensor in hf_rows.tensor_list(config):
    arrays = [flat[row.path] for row in tensor.rows]
    content = lambda t=tensor, arrays=arrays: t.join([_fetch(x, t.at) for x in arrays])
    plan[tensor.name] = tensors.Planned(tensor.shape, np.dtype(dtype or arrays[0].dtype), content)
  if jax.process_index() != 0:
    for tensor in plan.values():
      tensor.content()  # takes part in the gathering
    return
  folder = os.path.abspath(folder)
  if os.path.isdir(folder) and os.listdir(folder) and "config.json" not in os.listdir(folder):
    raise ValueError(f"{folder} exists and is no exported model (it has no config.json); name "
                     "another folder to export to")
  os.makedirs(os.path.dirname(folder), exist_ok=True)
  with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=".export-") as room:
    new, old = os.path.join(room, "new"), os.path.join(room, "old")
    os.mkdir(new)
    tensors.write(new, plan, max_shard_bytes)
    _write_configs(new, config, np.dtype(dtype or flat["embedding"].dtype).name, tokenizer)
    if os.path.isdir(folder):
      os.rename(folder, old)
    os.rename(new, folder)


def _write_configs(folder: str, config: ModelConfig, dtype: str,
                   tokenizer: SavesTokenizer | None) -> None:
  raw, generation = hf_config.to_hf(config, dtype), {}
  if tokenizer is not None:
    tokenizer.save(folder)
    eos = list(tokenizer.eos_ids)
    generation = {"eos_token_id": eos if len(eos) > 1 else eos[0],
                  "pad_token_id": tokenizer.pad_id}
    raw |= generation
  for name, content in (("config.json", raw), ("generation_config.json", generation)):
    with open(os.path.join(folder, name), "w") as f:
      json.dump(content, f, indent=2)
