"""ModelConfig: what distinguishes one decoder from another, and the named instances."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the pre-training length (see `rope.py`).

  `original_positions` is that pre-training length. Only the fields of its own `kind` matter;
  the defaults of the others are those of the Hugging Face configs.
  """

  kind: str = "none"  # "none" "linear" "dynamic" "llama3" "yarn" "longrope"
  factor: float = 1.0
  original_positions: int = 0
  low_freq_factor: float = 1.0          # llama3
  high_freq_factor: float = 4.0         # llama3
  beta_fast: float = 32.0               # yarn
  beta_slow: float = 1.0                # yarn
  truncate: bool = True                 # yarn: whole dimensions as bounds of its ramp
  attention_factor: float = 1.0         # yarn, longrope: multiplies cos and sin
  short_factor: tuple[float, ...] = ()  # longrope: divisors up to original_positions
  long_factor: tuple[float, ...] = ()   # longrope: divisors beyond them


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and dialect of a decoder. Hashable, so that it can be a static jit argument."""

  family: str                    # "qwen3" "qwen3_moe" "qwen2" "llama" "phi3" "gpt2": HF model_type
  vocab_size: int                # V, rows of the embedding (may be padded beyond the tokenizer)
  embed_dim: int                 # D
  num_layers: int                # L
  num_heads: int                 # H
  num_kv_heads: int              # K, divides H
  head_dim: int
  mlp_dim: int                   # of each expert, if there are any
  max_positions: int             # the longest prompt + response the model allows
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  rotary_fraction: float = 1.0   # leading share of head_dim that rotates (Phi-4-mini)
  sliding_window: int | None = None  # keys a query sees, itself included; None for all (Phi-3)
  norm_eps: float = 1e-6
  qk_norm: bool = False          # RMSNorm on queries and keys per head (Qwen3)
  qkv_bias: bool = False         # Qwen2
  tied_embeddings: bool = True
  num_experts: int = 0           # E; 0: one MLP a layer
  experts_per_token: int = 0     # k
  normalized_routing: bool = False  # a token's k weights sum to 1 (norm_topk_prob)

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.rotary_fraction)


def _tiny(layers: int, width: int, heads: int, kv_heads: int) -> ModelConfig:
  return ModelConfig(
      family="qwen3", vocab_size=320, embed_dim=width, num_layers=layers, num_heads=heads,
      num_kv_heads=kv_heads, head_dim=32, mlp_dim=2 * width, max_positions=512, qk_norm=True,
  )


def _qwen3(layers: int, width: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
  return ModelConfig(
      family="qwen3", vocab_size=151_936, embed_dim=width, num_layers=layers, num_heads=heads,
      num_kv_heads=8, head_dim=128, mlp_dim=mlp, max_positions=40_960, rope_theta=1e6,
      qk_norm=True, tied_embeddings=tied,
  )


def _qwen3_moe(layers: int, width: int, heads: int, mlp: int) -> ModelConfig:
  return ModelConfig(
      family="qwen3_moe", vocab_size=151_936, embed_dim=width, num_layers=layers, num_heads=heads,
      num_kv_heads=4, head_dim=128, mlp_dim=mlp, max_positions=40_960, rope_theta=1e6,
      qk_norm=True, tied_embeddings=False, num_experts=128, experts_per_token=8,
      normalized_routing=True,
  )


def _qwen2p5(vocab: int, width: int, heads: int, kv_heads: int, mlp: int,
             tied: bool) -> ModelConfig:
  return ModelConfig(
      family="qwen2", vocab_size=vocab, embed_dim=width, num_layers=28, num_heads=heads,
      num_kv_heads=kv_heads, head_dim=128, mlp_dim=mlp, max_positions=32_768, rope_theta=1e6,
      qkv_bias=True, tied_embeddings=tied,
  )


def _llama3(layers: int, width: int, head_dim: int, mlp: int, factor: float,
            tied: bool) -> ModelConfig:
  return ModelConfig(
      family="llama", vocab_size=128_256, embed_dim=width, num_layers=layers, num_heads=32,
      num_kv_heads=8, head_dim=head_dim, mlp_dim=mlp, max_positions=131_072, rope_theta=5e5,
      rope_scaling=RopeScaling("llama3", factor, original_positions=8192), norm_eps=1e-5,
      tied_embeddings=tied,
  )


def _gpt2(layers: int, width: int, heads: int) -> ModelConfig:
  return ModelConfig(
      family="gpt2", vocab_size=50_257, embed_dim=width, num_layers=layers, num_heads=heads,
      num_kv_heads=heads, head_dim=64, mlp_dim=4 * width, max_positions=1024, norm_eps=1e-5,
      qkv_bias=True,
  )


# sqrt(1 + ln(131072 / 4096) / ln(4096)), what Phi's config leaves to be derived.
_PHI4_MINI_ROPE = RopeScaling(
    "longrope", factor=32.0, original_positions=4096, attention_factor=1.1902380714238083,
    short_factor=(1.0,) * 48,
    long_factor=(
        1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817,
        2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023,
        4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372,
        10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807,
        22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
        32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
    ),
)

# The numbers are those of each model's public config.json.
NAMED: dict[str, ModelConfig] = {
    "tiny_teacher": _tiny(layers=3, width=128, heads=4, kv_heads=2),
    "tiny_student": _tiny(layers=3, width=96, heads=3, kv_heads=1),
    "tiny_weak": _tiny(layers=2, width=64, heads=2, kv_heads=1),
    "qwen3_0p6b": _qwen3(layers=28, width=1024, heads=16, mlp=3072, tied=True),
    "qwen3_1p7b": _qwen3(layers=28, width=2048, heads=16, mlp=6144, tied=True),
    "qwen3_4b": _qwen3(layers=36, width=2560, heads=32, mlp=9728, tied=True),
    "qwen3_8b": _qwen3(layers=36, width=4096, heads=32, mlp=12_288, tied=False),
    "qwen3_14b": _qwen3(layers=40, width=5120, heads=40, mlp=17_408, tied=False),
    "qwen3_32b": _qwen3(layers=64, width=5120, heads=64, mlp=25_600, tied=False),
    "qwen3_30b_a3b": _qwen3_moe(layers=48, width=2048, heads=32, mlp=768),
    "qwen3_235b_a22b": _qwen3_moe(layers=94, width=4096, heads=64, mlp=1536),
    "qwen2p5_1p5b": _qwen2p5(151_936, width=1536, heads=12, kv_heads=2, mlp=8960, tied=True),
    "qwen2p5_7b": _qwen2p5(152_064, width=3584, heads=28, kv_heads=4, mlp=18_944, tied=False),
    "llama3p2_1b": _llama3(layers=16, width=2048, head_dim=64, mlp=8192, factor=32.0, tied=True),
    "llama3p1_8b": _llama3(layers=32, width=4096, head_dim=128, mlp=14_336, factor=8.0,
                           tied=False),
    "smollm2_135m": ModelConfig(
        family="llama", vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, mlp_dim=1536, max_positions=8192, rope_theta=1e5,
        norm_eps=1e-5),
    "phi3_mini": ModelConfig(
        family="phi3", vocab_size=32_064, embed_dim=3072, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=96, mlp_dim=8192, max_positions=4096, sliding_window=2047,
        norm_eps=1e-5, tied_embeddings=False),
    "phi4": ModelConfig(
        family="phi3", vocab_size=100_352, embed_dim=5120, num_layers=40, num_heads=40,
        num_kv_heads=10, head_dim=128, mlp_dim=17_920, max_positions=16_384, rope_theta=250_000.0,
        norm_eps=1e-5, tied_embeddings=False),
    "phi4_mini": ModelConfig(
        family="phi3", vocab_size=200_064, embed_dim=3072, num_layers=32, num_heads=24,
        num_kv_heads=8, head_dim=128, mlp_dim=8192, max_positions=131_072,
        rope_scaling=_PHI4_MINI_ROPE, rotary_fraction=0.75, sliding_window=262_144,
        norm_eps=1e-5),
    "gpt2": _gpt2(layers=12, width=768, heads=12),
    "gpt2_medium": _gpt2(layers=24, width=1024, heads=16),
    "gpt2_large": _gpt2(layers=36, width=1280, heads=20),
    "gpt2_xl": _gpt2(layers=48, width=1600, heads=25),
}

# By the name of a model's repository, the last part of its path: for who asks for the shape of
# a model that is not here.
REPOSITORIES: dict[str, str] = {
    "Qwen3-0.6B": "qwen3_0p6b", "Qwen3-1.7B": "qwen3_1p7b", "Qwen3-4B": "qwen3_4b",
    "Qwen3-8B": "qwen3_8b", "Qwen3-14B": "qwen3_14b", "Qwen3-32B": "qwen3_32b",
    "Qwen3-30B-A3B": "qwen3_30b_a3b", "Qwen3-235B-A22B": "qwen3_235b_a22b",
    "Qwen2.5-1.5B": "qwen2p5_1p5b", "Qwen2.5-7B": "qwen2p5_7b", "Llama-3.2-1B": "llama3p2_1b",
    "Llama-3.1-8B": "llama3p1_8b", "Phi-3-mini-4k-instruct": "phi3_mini", "phi-4": "phi4",
    "Phi-4-mini-instruct": "phi4_mini", "gpt2": "gpt2", "gpt2-medium": "gpt2_medium",
    "gpt2-large": "gpt2_large", "gpt2-xl": "gpt2_xl",
}


def of_repository(name: str) -> ModelConfig | None:
  """The shape of a repository by its name, those of its tuned variants too; None if not known."""
  for tuned in ("", "-Base", "-Instruct", "-Instruct-2507", "-expert", "-sft",
                "-dpo"):
    known = REPOSITORIES.get(name.rstrip("/").rpartition("/")[2].removesuffix(tuned))
    if known:
      return NAMED[known]
  return None
