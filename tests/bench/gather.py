"""By what libtpu gathers one sharded matrix on pods of several sizes: nothing of ours is in it.

    python tests/bench/gather.py v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8

Prints which collectives the compiled product of a replicated weight has, where XLA is left to
gather it, where it is told to (`all_gather`), and where it is told to in two stages; no TPU is
needed.
"""

import os
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from opd_jax import sharding
from opd_jax.aot import chips
from opd_jax.aot.report import shape


def left_to_xla(weight: jax.Array, x: jax.Array) -> jax.Array:
  return x @ jax.lax.with_sharding_constraint(weight.astype(jnp.bfloat16), PartitionSpec())


def told(weight: jax.Array, x: jax.Array, stages=(None,)) -> jax.Array:
  def gather(part):
    part = part.astype(jnp.bfloat16)
    for groups in stages:
      part = jax.lax.all_gather(part, "data", axis_index_groups=groups, tiled=True)
    return part
  return x @ jax.shard_map(gather, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
                           check_vma=False)(weight)


def in_stages(weight: jax.Array, x: jax.Array) -> jax.Array:
  """Of 16 chips, then of those that have the same sixteenth."""
  groups = np.arange(jax.sharding.get_abstract_mesh().shape["data"]).reshape(-1, 16)
  return told(weight, x, (groups.tolist(), groups.T.tolist()))


for topology in sys.argv[1:]:
  mesh = sharding.make_mesh(devices=chips.devices(topology)[0])
  for product in (left_to_xla, told, in_stages):
    with jax.set_mesh(mesh):
      text = jax.jit(product).trace(
          shape(mesh, (2560, 9728), jnp.float32, "embed"),
          shape(mesh, (256 * mesh.size, 2560), jnp.bfloat16, "batch")).lower().compile().as_text()
    found = re.findall(r"(all-gather|all-reduce|collective-permute)(?:-start)?\(", text)
    print(topology, f"{mesh.size} chips, {product.__name__}:", ", ".join(sorted(set(found))),
          flush=True)
