"""The weights of Hugging Face checkpoints: one row per weight, read forwards and backwards."""

from collections.abc import Iterator
import math
from typing import NamedTuple

from flax import traverse_util
import numpy as np

from opd_jax.models.build import abstract_params
from opd_jax.models.configs import ModelConfig


class Row(NamedTuple):
  """One weight of ours and the Hugging Face tensor that holds it.

  Our array, its first `inputs` axes joined and the others joined, is a matrix [in, out]; Hugging
  Face stores it as it is or transposed. Rows that name the same tensor lie in it side by side
  along `out`, in the order of the rows: Phi's qkv_proj and gate_up_proj, GPT-2's c_attn.
  """

  hf: str      # "{}" stands for the layer
  path: str    # where it is in our tree; paths under blocks/ have a leading [L]
  inputs: int  # 0: a vector
  transposed: bool


def rows(config: ModelConfig) -> list[Row]:
  """The table of a family."""
  return _gpt2_rows() if config.family == "gpt2" else _decoder_rows(config)


def _gpt2_rows() -> list[Row]:
  layer, ours = "transformer.h.{}.", "blocks/"
  table = [Row("transformer.wte.weight", "embedding", 1, False),
           Row("transformer.wpe.weight", "positions", 1, False)]
  for norm, name in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
    table += [Row(f"{layer}{norm}.weight", f"{ours}{name}/scale", 0, False),
              Row(f"{layer}{norm}.bias", f"{ours}{name}/bias", 0, False)]
  # Conv1D stores [in, out]; nn.Linear, in the other families, [out, in].
  for hf, names, inputs in (("attn.c_attn", ("query", "key", "value"), 1),
                            ("attn.c_proj", ("out",), 2),
                            ("mlp.c_fc", ("up",), 1), ("mlp.c_proj", ("down",), 1)):
    part = "attention" if hf.startswith("attn") else "mlp"
    table += [Row(f"{layer}{hf}.weight", f"{ours}{part}/{n}", inputs, False) for n in names]
    table += [Row(f"{layer}{hf}.bias", f"{ours}{part}/{n}_bias", 0, False) for n in names]
  return table + [Row("transformer.ln_f.weight", "final_norm/scale", 0, False),
                  Row("transformer.ln_f.bias", "final_norm/bias", 0, False)]


def _decoder_rows(config: ModelConfig) -> list[Row]:
  layer, ours = "model.layers.{}.", "blocks/"
  fused = config.family == "phi3"
  table = [Row("model.embed_tokens.weight", "embedding", 1, False),
           Row(f"{layer}input_layernorm.weight", f"{ours}attention_norm/scale", 0, False),
           Row(f"{layer}post_attention_layernorm.weight", f"{ours}mlp_norm/scale", 0, False)]
  for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
    hf = f"{layer}self_attn.{'qkv' if fused else short}_proj"
    table.append(Row(f"{hf}.weight", f"{ours}attention/{name}", 1, True))
    if config.qkv_bias:
      table.append(Row(f"{hf}.bias", f"{ours}attention/{name}_bias", 0, False))
    if config.qk_norm and short != "v":
      table.append(Row(f"{layer}self_attn.{short}_norm.weight",
                       f"{ours}attention/{name}_norm/scale", 0, False))
  table.append(Row(f"{layer}self_attn.o_proj.weight", f"{ours}attention/out", 2, True))
  for name in ("gate", "up"):
    hf = "gate_up" if fused else name
    table.append(Row(f"{layer}mlp.{hf}_proj.weight", f"{ours}mlp/{name}", 1, True))
  table += [Row(f"{layer}mlp.down_proj.weight", f"{ours}mlp/down", 1, True),
            Row("model.norm.weight", "final_norm/scale", 0, False)]
  if not config.tied_embeddings:
    table.append(Row("lm_head.weight", "head", 1, True))
  return table


class Tensor(NamedTuple):
  """One Hugging Face tensor: the rows that lie in it and their shapes (without [L])."""

  name: str
  layer: int | None
  rows: tuple[Row, ...]
  shapes: tuple[tuple[int, ...], ...]

  @property
  def widths(self) -> list[int]:
    return [math.prod(shape[row.inputs:]) for row, shape in zip(self.rows, self.shapes)]

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.rows[0]
    if first.inputs == 0:
      return (sum(self.widths),)
    matrix = (math.prod(self.shapes[0][:first.inputs]), sum(self.widths))
    return matrix[::-1] if first.transposed else matrix

  def split(self, raw: np.ndarray) -> Iterator[tuple[Row, np.ndarray]]:
    """The Hugging Face tensor -> our arrays, as views."""
    matrix = raw.T if self.rows[0].transposed else raw
    stops = np.cumsum(self.widths)
    for row, shape, stop, width in zip(self.rows, self.shapes, stops, self.widths):
      yield row, matrix[..., stop - width:stop].reshape(shape)

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Our arrays, in the order of the rows -> the Hugging Face tensor; the inverse of `split`."""
    flat = lambda x, width: x.reshape(width) if self.rows[0].inputs == 0 else x.reshape(-1, width)
    matrix = [flat(x, width) for x, width in zip(arrays, self.widths)]
    matrix = matrix[0] if len(matrix) == 1 else np.concatenate(matrix, axis=-1)
    return matrix.T if self.rows[0].transposed else matrix


def tensor_list(config: ModelConfig) -> list[Tensor]:
  """Every tensor of a checkpoint of this model, layer by layer within each kind."""
  boxed = traverse_util.flatten_dict(abstract_params(config), sep="/")
  shapes = {path: leaf.value.shape for path, leaf in boxed.items()}
  groups: dict[str, list[Row]] = {}
  for row in rows(config):
    groups.setdefault(row.hf, []).append(row)
  result = []
  for hf, group in groups.items():
    layered = "{}" in hf
    ours = tuple(shapes[row.path][1:] if layered else shapes[row.path] for row in group)
    for layer in range(config.num_layers) if layered else (None,):
      result.append(Tensor(hf.format(layer), layer, tuple(group), ours))
  return result
