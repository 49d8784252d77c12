"""The weights of Hugging Face checkpoints: one row per weight, read forwards and backwards."""

from collections.abc import Iterator
import itertools
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

  hf: str      # "{}" stands for the layer, a second one for the expert
  path: str    # where it is in our tree; paths under blocks/ have a leading [L], experts [L, E]
  inputs: int  # 0: a vector
  transposed: bool
  stacked: int = 0  # leading axes, before the inputs, that the tensor has too


def rows(config: ModelConfig, stacked_experts: bool = False) -> list[Row]:
  """The table of a family.

  Args:
    config: of the model.
    stacked_experts: whether tensors hold all experts of a layer, as transformers 5 has them in
      memory and saves them under save_original_format=False; else they hold one each.
  """
  return (_gpt2_rows() if config.family == "gpt2" else
          _decoder_rows(config, stacked_experts))


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


def _decoder_rows(config: ModelConfig, stacked_experts: bool) -> list[Row]:
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
  if config.num_experts:
    table.append(Row(f"{layer}mlp.gate.weight", f"{ours}mlp/router", 1, True))
  if config.num_experts and stacked_experts:
    table += [Row(f"{layer}mlp.experts.{hf}_proj", f"{ours}mlp/{name}", 1, True, stacked=1)
              for hf, name in (("gate_up", "gate"), ("gate_up", "up"), ("down", "down"))]
  else:
    mlp = f"{layer}mlp.experts.{{}}" if config.num_experts else f"{layer}mlp"
    table += [Row(f"{mlp}.{'gate_up' if fused and name != 'down' else name}_proj.weight",
                  f"{ours}mlp/{name}", 1, True) for name in ("gate", "up", "down")]
  table.append(Row("model.norm.weight", "final_norm/scale", 0, False))
  if not config.tied_embeddings:
    table.append(Row("lm_head.weight", "head", 1, True))
  return table


class Tensor(NamedTuple):
  """One Hugging Face tensor: the rows that lie in it and the shapes of what they name of ours."""

  name: str
  at: tuple[int, ...]  # where in our arrays: (), (layer,) or (layer, expert); shapes are without
  rows: tuple[Row, ...]
  shapes: tuple[tuple[int, ...], ...]

  @property
  def widths(self) -> list[int]:
    return [math.prod(shape[row.stacked + row.inputs:])
            for row, shape in zip(self.rows, self.shapes)]

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.rows[0]
    if first.inputs == 0:
      return (sum(self.widths),)
    stack, rest = self.shapes[0][:first.stacked], self.shapes[0][first.stacked:]
    matrix = (math.prod(rest[:first.inputs]), sum(self.widths))
    return stack + (matrix[::-1] if first.transposed else matrix)

  def split(self, raw: np.ndarray) -> Iterator[tuple[Row, np.ndarray]]:
    """The Hugging Face tensor -> our arrays, as views."""
    matrix = raw.swapaxes(-1, -2) if self.rows[0].transposed else raw
    stops = np.cumsum(self.widths)
    for row, shape, stop, width in zip(self.rows, self.shapes, stops, self.widths):
      yield row, matrix[..., stop - width:stop].reshape(shape)

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Our arrays, in the order of the rows -> the Hugging Face tensor; the inverse of `split`."""
    first, shape = self.rows[0], self.shapes[0]
    lead = (*shape[:first.stacked], -1) if first.inputs else ()
    flat = lambda x, width: x.reshape(*lead, width)
    matrix = [flat(x, width) for x, width in zip(arrays, self.widths)]
    matrix = matrix[0] if len(matrix) == 1 else np.concatenate(matrix, axis=-1)
    return matrix.swapaxes(-1, -2) if first.transposed else matrix


def tensor_list(config: ModelConfig, stacked_experts: bool = False) -> list[Tensor]:
  """Every tensor of a checkpoint of this model, layer by layer within each kind; see `rows`."""
  boxed = traverse_util.flatten_dict(abstract_params(config), sep="/")
  shapes = {path: leaf.value.shape for path, leaf in boxed.items()}
  groups: dict[str, list[Row]] = {}
  for row in rows(config, stacked_experts):
    groups.setdefault(row.hf, []).append(row)
  result = []
  for hf, group in groups.items():
    depth = hf.count("{}")
    ours = tuple(shapes[row.path][depth:] for row in group)
    for at in itertools.product(*map(range, (config.num_layers, config.num_experts)[:depth])):
      result.append(Tensor(hf.format(*at), at, tuple(group), ours))
  return result
