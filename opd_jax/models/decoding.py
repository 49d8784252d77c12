"""A model and its parameters in the form that decoding wants, made once a rollout.

Each layer has arrays of its own, so that a step reads them where they lie; kernels are in the
compute dtype, so that no step casts them; and no device asks another for its share of them.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from opd_jax.models import build
from opd_jax.sharding import constrain


def unrolled(model: nn.Module) -> nn.Module:
  """The same model for parameters that `preparation` made, called as before.

  Its head is a matrix of its own: a tied one is looked up in one layout, multiplied in another.
  """
  config = dataclasses.replace(model.config, tied_embeddings=False)
  return model.clone(config=config, unrolled=True)


@functools.cache
def preparation(model: nn.Module) -> Callable[[Any], Any]:
  """A function from the parameters of `model` to those of `unrolled(model)`."""
  layer, head = compiled(model)

  def prepare(params: Any) -> Any:
    blocks = {f"layer_{i}": layer(params["blocks"], i) for i in range(model.config.num_layers)}
    return params | {"blocks": blocks, "head": head(params)}

  return prepare


@functools.cache
def compiled(model: nn.Module) -> tuple[Callable[[Any, int], Any], Callable[[Any], Array]]:
  """What `preparation` computes: a layer's parameters from those of all, and the head.

  Embeddings stay as they are, to be looked up and then cast. Vectors stay float32: norms compute
  in it, and biases are cast at use. The layout is that of `sharding.RULES`, but for `embed`: rows
  of weights that training spreads over the `data` axis would be gathered anew at every token.
  """
  names = jax.tree.map(lambda leaf: leaf.names, build.abstract_params(model.config),
                       is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))

  def ready(x: Array, axes: tuple[str | None, ...]) -> Array:
    x = x.astype(model.dtype) if x.ndim > 1 else x
    return constrain(x, *(None if axis == "embed" else axis for axis in axes))

  @jax.jit  # once for all layers: a program for all of them would take long to compile
  def layer(blocks: Any, index: int) -> Any:
    return jax.tree.map(lambda x, axes: ready(x[index], axes[1:]), blocks, names["blocks"])

  @jax.jit
  def head(params: Any) -> Array:
    return ready(build.head(params, model.config), ("embed", "vocab"))

  return layer, head
