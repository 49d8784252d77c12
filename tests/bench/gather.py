"""By what libtpu gathers one sharded matrix on pods of several sizes: nothing of ours is in it.

    python tests/bench/gather.py v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8

Prints which collectives the compiled product of a replicated weight has; no TPU is needed.
"""

import os
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opd_jax import sharding
from opd_jax.aot import chips
from opd_jax.aot.report import shape


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
  return x @ jax.lax.with_sharding_constraint(weight.astype(jnp.bfloat16), PartitionSpec())


for topology in sys.argv[1:]:
  mesh = sharding.make_mesh(devices=chips.devices(topology)[0])
  with jax.set_mesh(mesh):
    text = jax.jit(product).trace(
        shape(mesh, (2560, 9728), jnp.float32, "data"),
        shape(mesh, (256 * mesh.size, 2560), jnp.bfloat16, "data")).lower().compile().as_text()
  found = re.findall(r"(all-gather|all-reduce|collective-permute)(?:-start)?\(", text)
  print(topology, f"{mesh.size} chips:", ", ".join(sorted(set(found))), flush=True)
