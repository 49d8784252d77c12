"""From a ModelConfig to a module, and to parameters that are born sharded."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import keys, sharding
from opd_jax.models import gpt2, transformer
from opd_jax.models.configs import ModelConfig

MODULES = {
    "qwen3": transformer.Transformer, "qwen3_moe": transformer.Transformer,
    "qwen2": transformer.Transformer, "llama": transformer.Transformer,
    "phi3": transformer.Transformer, "gpt2": gpt2.GPT2,
}


def build(config: ModelConfig, dtype: Any = jnp.float32, remat: str = "dots") -> nn.Module:
  """The module of a config's family.

  Args:
    config: shape and dialect.
    dtype: compute dtype.
    remat: a key of `transformer.REMAT`.
  """
  return MODULES[config.family](config, dtype, remat)


def _init(config: ModelConfig, key: Array) -> Any:
  """Parameters with their logical names, drawn from `key`; the tree that goes under "params"."""
  token = jnp.zeros((1, 1), jnp.int32)
  return build(config).init(key, token, token, token)["params"]


def abstract_params(config: ModelConfig) -> Any:
  """Shapes and logical names of the parameters, without any array."""
  return jax.eval_shape(lambda: _init(config, keys.root(0)))


def shapes(config: ModelConfig, mesh: Mesh) -> Any:
  """The parameters as they would lie on the mesh: jax.ShapeDtypeStruct with shardings."""
  boxed = abstract_params(config)
  return jax.tree.map(lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
                      sharding.unboxed(boxed), sharding.of_params(boxed, mesh))


@functools.cache
def _initializer(config: ModelConfig, mesh: Mesh | None) -> Any:
  """The compiled draw of a config's parameters; a second model of that shape reuses it."""
  init = lambda key: sharding.unboxed(_init(config, key))
  if mesh is None:
    return jax.jit(init)
  return jax.jit(init, out_shardings=sharding.of_params(abstract_params(config), mesh))


def init_params(config: ModelConfig, key: Array, mesh: Mesh | None = None) -> Any:
  """Random float32 parameters: the plain nested dict that goes under {"params": ...}.

  With a mesh they are born sharded: no device ever holds more than its share.
  """
  return _initializer(config, mesh)(key)


def count_params(config: ModelConfig) -> tuple[int, int]:
  """How many parameters a model has, and how many of them one token passes through.

  They differ for mixtures of experts, by the experts that a token is not sent to. An embedding
  counts whole in both, as model cards count it.
  """
  leaves = jax.tree.leaves(abstract_params(config),
                           is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  size = lambda leaf: math.prod(leaf.value.shape)
  experts = sum(size(leaf) for leaf in leaves if "expert" in leaf.names)
  idle = experts - experts * config.experts_per_token // max(config.num_experts, 1)
  count = sum(map(size, leaves))
  return count, count - idle


def head(params: Any, config: ModelConfig) -> Array:
  """The matrix [D, V] that turns hidden states into logits."""
  return params["embedding"].T if config.tied_embeddings else params["head"]
