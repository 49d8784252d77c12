"""Hugging Face config.json <-> ModelConfig.

A field that changes what a model computes and is not implemented is refused by name, never
ignored. Dropout rates are ignored: nothing here trains with dropout.
"""

import math
from typing import Any

from opd_jax.models.configs import ModelConfig, RopeScaling

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM", "gpt2": "GPT2LMHeadModel",
}

# What these fields may say if they are there at all.
IMPLEMENTED: dict[str, tuple] = {
    "hidden_act": ("silu",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,),
    "use_sliding_window": (False,), "quantization_config": (None,), "quantization": (None,),
    "rope_interleaved": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,),
    "is_encoder_decoder": (False,), "text_config": (None,),
    # Layers are scanned, so all are alike: in a mixture of experts, none has a dense MLP.
    "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
  """The content of a config.json -> ModelConfig.

  Both spellings of rotary settings are read: `rope_theta` and `rope_scaling` side by side
  (transformers 4) and `rope_parameters` (transformers 5).

  Raises: ValueError for a model_type without an implementation, for a missing field and for
    a feature that is not implemented.
  """
  family = raw.get("model_type")
  if family not in ARCHITECTURES:
    raise ValueError(f"config.json: model_type is {family!r}; supported are "
                     f"{', '.join(sorted(ARCHITECTURES))}")
  for name, accepted in IMPLEMENTED.items():
    if raw.get(name) is not None and raw[name] not in accepted:
      raise ValueError(f"config.json: {name}={raw[name]!r} is not implemented for {family}; "
                       f"only {' or '.join(map(repr, accepted))} is")
  if set(raw.get("layer_types") or ()) - {"full_attention"}:
    raise ValueError(f"config.json: layer_types={sorted(set(raw['layer_types']))} is not "
                     "implemented; every layer must be 'full_attention'")
  return _gpt2(raw) if family == "gpt2" else _decoder(raw, family)


def _need(raw: dict[str, Any], name: str) -> Any:
  if raw.get(name) is None:
    raise ValueError(f"config.json: the field {name!r} is missing")
  return raw[name]


def _gpt2(raw: dict[str, Any]) -> ModelConfig:
  width, heads = _need(raw, "n_embd"), _need(raw, "n_head")
  if raw.get("tie_word_embeddings") is False:
    raise ValueError("config.json: tie_word_embeddings=False is not implemented for gpt2")
  return ModelConfig(
      family="gpt2", vocab_size=_need(raw, "vocab_size"), embed_dim=width,
      num_layers=_need(raw, "n_layer"), num_heads=heads, num_kv_heads=heads,
      head_dim=width // heads, mlp_dim=raw.get("n_inner") or 4 * width,
      max_positions=_need(raw, "n_positions"), norm_eps=_need(raw, "layer_norm_epsilon"),
      qkv_bias=True,
  )


def _decoder(raw: dict[str, Any], family: str) -> ModelConfig:
  width, heads = _need(raw, "hidden_size"), _need(raw, "num_attention_heads")
  # transformers leaves a field out of config.json only where its default applies.
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  fraction = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
  if fraction != 1.0 and family != "phi3":
    raise ValueError(f"config.json: partial_rotary_factor={fraction} is not implemented for "
                     f"{family}")
  scaling = _rope_scaling(raw, rope, family)
  max_positions = _need(raw, "max_position_embeddings")
  if scaling.kind in ("yarn", "dynamic"):
    # Their configs keep the pre-training length here and name the factor beside it.
    max_positions = max(max_positions, int(scaling.factor * scaling.original_positions))
  moe = family == "qwen3_moe"
  return ModelConfig(
      family=family, vocab_size=_need(raw, "vocab_size"), embed_dim=width,
      num_layers=_need(raw, "num_hidden_layers"), num_heads=heads,
      num_kv_heads=raw.get("num_key_value_heads") or heads,
      head_dim=raw.get("head_dim") or width // heads,
      mlp_dim=_need(raw, "moe_intermediate_size" if moe else "intermediate_size"),
      max_positions=max_positions,
      rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
      rope_scaling=scaling, rotary_fraction=float(fraction),
      sliding_window=raw.get("sliding_window") if family == "phi3" else None,
      norm_eps=_need(raw, "rms_norm_eps"), qk_norm=family in ("qwen3", "qwen3_moe"),
      qkv_bias=family == "qwen2", tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
      **(_experts(raw) if moe else {}),
  )


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
  count = raw.get("num_experts") or _need(raw, "num_local_experts")  # transformers 4, and 5
  chosen = _need(raw, "num_experts_per_tok")
  if not 1 <= chosen <= count:
    raise ValueError(f"config.json: num_experts_per_tok={chosen} of {count} experts; it must be "
                     "at least 1 and at most their number")
  return dict(num_experts=count, experts_per_token=chosen,
              normalized_routing=bool(raw.get("norm_topk_prob", False)))


def _rope_scaling(raw: dict[str, Any], rope: dict[str, Any], family: str) -> RopeScaling:
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "su" or (kind == "yarn" and family == "phi3"):
    kind = "longrope"  # names that Phi-3's first configs gave it
  if kind == "default":
    return RopeScaling()
  if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope"):
    raise ValueError(f"config.json: RoPE scaling {kind!r} is not implemented; default, linear, "
                     "dynamic, llama3, yarn and longrope are")
  longest = _need(raw, "max_position_embeddings")
  original = (raw.get("original_max_position_embeddings")
              or rope.get("original_max_position_embeddings") or longest)
  if kind == "dynamic":
    original = longest  # transformers measures this one against max_position_embeddings
  factor = rope.get("factor") or (longest / original if kind == "longrope" else None)
  if factor is None:
    raise ValueError(f"config.json: RoPE scaling {kind!r} lacks its 'factor'")
  fields = dict(kind=kind, factor=float(factor), original_positions=original)
  if kind == "llama3":
    fields.update({name: float(_need(rope, name))
                   for name in ("low_freq_factor", "high_freq_factor")})
  if kind == "yarn":
    fields.update(beta_fast=float(rope.get("beta_fast") or 32), truncate=rope.get("truncate", True),
                  beta_slow=float(rope.get("beta_slow") or 1))
  if kind == "longrope":
    fields.update({name: tuple(map(float, _need(rope, name)))
                   for name in ("short_factor", "long_factor")})
  if kind in ("yarn", "longrope"):
    given = rope.get("attention_factor")
    fields["attention_factor"] = float(
        _attention_factor(kind, factor, original, rope) if given is None else given)
  return RopeScaling(**fields)


def _attention_factor(kind: str, factor: float, original: int, rope: dict[str, Any]) -> float:
  """What transformers derives if a config does not state it."""
  if kind == "longrope":
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  scale = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
  return scale(1.0)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """ModelConfig -> the content of a config.json that transformers 4 and 5 read.

  Token ids are null: the families' defaults belong to other tokenizers (and an id beyond the
  vocabulary breaks the embedding). Whoever knows the tokenizer overwrites them.
  """
  raw = dict(
      architectures=[ARCHITECTURES[config.family]], model_type=config.family, torch_dtype=dtype,
      vocab_size=config.vocab_size, tie_word_embeddings=config.tied_embeddings,
      bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True)
  if config.family == "gpt2":
    return raw | dict(
        n_embd=config.embed_dim, n_layer=config.num_layers, n_head=config.num_heads,
        n_inner=config.mlp_dim, n_positions=config.max_positions,
        layer_norm_epsilon=config.norm_eps, activation_function="gelu_new",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
  raw |= dict(
      hidden_size=config.embed_dim, num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim, intermediate_size=config.mlp_dim,
      max_position_embeddings=config.max_positions, hidden_act="silu",
      rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
      rope_scaling=_rope_to_hf(config), attention_dropout=0.0)
  if config.rope_scaling.kind == "dynamic":
    raw["max_position_embeddings"] = config.rope_scaling.original_positions
  if config.family == "phi3":
    original = config.rope_scaling.original_positions or config.max_positions
    raw |= dict(original_max_position_embeddings=original, resid_pdrop=0.0, embd_pdrop=0.0,
                partial_rotary_factor=config.rotary_fraction, sliding_window=config.sliding_window)
  if config.num_experts:
    # No layer is as wide as intermediate_size says: it is of dense layers, and there are none.
    raw |= dict(
        moe_intermediate_size=config.mlp_dim, num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token, norm_topk_prob=config.normalized_routing,
        decoder_sparse_step=1, mlp_only_layers=[])
  if config.family in ("qwen2", "qwen3", "qwen3_moe"):
    raw["use_sliding_window"] = False
  if config.family in ("llama", "qwen3", "qwen3_moe"):
    raw["attention_bias"] = False
  return raw


def _rope_to_hf(config: ModelConfig) -> dict[str, Any] | None:
  scaling = config.rope_scaling
  if scaling.kind == "none":
    return None
  raw: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind}
  if scaling.kind == "longrope":
    raw |= dict(short_factor=list(scaling.short_factor), long_factor=list(scaling.long_factor))
    derived = _attention_factor("longrope", config.max_positions / scaling.original_positions,
                                scaling.original_positions, {})
    if scaling.attention_factor != derived:
      raw |= dict(factor=scaling.factor, attention_factor=scaling.attention_factor)
    else:
      del raw["rope_type"]  # transformers 4 wants exactly three fields here
    return raw
  raw["factor"] = scaling.factor
  if scaling.kind in ("llama3", "yarn"):
    raw["original_max_position_embeddings"] = scaling.original_positions
  if scaling.kind == "llama3":
    raw |= dict(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor)
  if scaling.kind == "yarn":
    raw |= dict(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow,
                truncate=scaling.truncate, attention_factor=scaling.attention_factor)
  return raw
