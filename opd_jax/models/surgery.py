"""Models made from models: fewer layers, a vocabulary without its padding, extrapolated weights."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from opd_jax import sharding
from opd_jax.models.build import abstract_params
from opd_jax.models.configs import ModelConfig


def _rebuild(change: Any, params: Any, config: ModelConfig) -> Any:
  """`change(params)`, laid out on the mesh of `params` as `config` wants it; None of None."""
  if params is None:
    return None
  layout = params["embedding"].sharding if isinstance(params["embedding"], jax.Array) else None
  if not isinstance(layout, NamedSharding):
    return jax.jit(change)(params)
  out = sharding.of_params(abstract_params(config), layout.mesh)
  return jax.jit(change, out_shardings=out)(params)


def drop_layers(params: Any, config: ModelConfig, every: int) -> tuple[Any, ModelConfig]:
  """Leaves out every n-th layer: every=3 leaves out layers 2, 5, 8, ... (counted from 0).

  Raises: ValueError unless 2 <= every <= number of layers.
  """
  if not 2 <= every <= config.num_layers:
    raise ValueError(f"drop_layers_every is {every}; a model of {config.num_layers} layers "
                     f"allows 2 to {config.num_layers} (0 drops none)")
  kept = np.array([i for i in range(config.num_layers) if (i + 1) % every])
  config = dataclasses.replace(config, num_layers=len(kept))
  change = lambda p: p | {"blocks": jax.tree.map(lambda x: x[kept], p["blocks"])}
  return _rebuild(change, params, config), config


def extrapolate(params: Any, config: ModelConfig, base: Any, base_config: ModelConfig,
                alpha: float) -> Any:
  """ExPO: base + alpha (params - base), `alpha` times as far from the base as `params` are.

  At alpha = 0 it is the base, at 1 `params`, and above 1 beyond them. The base's arrays are used
  up.

  Raises: ValueError unless both are models of one shape.
  Source: "Weak-to-Strong Extrapolation Expedites Alignment".
  """
  if config != base_config:
    differ = [f"{field.name} {getattr(config, field.name)!r} and "
              f"{getattr(base_config, field.name)!r}" for field in dataclasses.fields(config)
              if getattr(config, field.name) != getattr(base_config, field.name)]
    raise ValueError(f"weights can be extrapolated only from a base of the same shape; model and "
                     f"base have {', '.join(differ)}")
  move = lambda b, x: b + alpha * (x - b)
  return jax.jit(lambda b, p: jax.tree.map(move, b, p), donate_argnums=0)(base, params)


def slice_vocab(params: Any, config: ModelConfig, vocab_size: int) -> tuple[Any, ModelConfig]:
  """Keeps the first `vocab_size` rows of the embedding (and columns of the head).

  For a teacher and a student that share a tokenizer but pad its vocabulary differently.
  Raises: ValueError if the model has fewer.
  """
  if vocab_size > config.vocab_size:
    raise ValueError(f"cannot slice a vocabulary of {config.vocab_size} to {vocab_size}")
  config = dataclasses.replace(config, vocab_size=vocab_size)

  def change(p):
    p = p | {"embedding": p["embedding"][:vocab_size]}
    return p if config.tied_embeddings else p | {"head": p["head"][:, :vocab_size]}

  return _rebuild(change, params, config), config
