"""A small run is compiled for a TPU pod that is not there."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest

from absl.testing import absltest

# Attention and its gradients on 2 x 2 chips, each with one row of 1024 and half of the heads.
ATTENTION = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from opd_jax import sharding
from opd_jax.aot import chips, hlo
from opd_jax.models import attention
mesh = sharding.make_mesh(2, 2, chips.devices("v5e:2x2")[0])
put = lambda dtype, spec, *dims: jax.ShapeDtypeStruct(
    dims, dtype, sharding=NamedSharding(mesh, P(*spec)))
heads = lambda count: put(jnp.bfloat16, ("data", None, "model", None), 2, 1024, count, 64)
ids = put(jnp.int32, ("data", None), 2, 1024)

def loss(q, k, v, ids):
  mask = attention.mask(ids, ids, jnp.int32(0), None)
  return jnp.sum(attention.attend(q, k, v, mask).astype(jnp.float32))

with jax.set_mesh(mesh):
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  text = gradient.trace(heads(8), heads(4), heads(4), ids).lower().compile().as_text()
costs = hlo.costs(text)
print(json.dumps([costs.flops, costs.hbm, len(costs.collectives), text.count("1024,1024]")]))
"""
# A row of 16384 on each of four chips, and weights of which each has a part.
GATHERED = """
import json, os, sys
from opd_jax import compilations
if sys.argv[1] == "asked":
  compilations.for_tpus()
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from opd_jax import sharding
from opd_jax.aot import chips, hlo
mesh = sharding.make_mesh(4, 1, chips.devices("v5e:2x2")[0])
rows = NamedSharding(mesh, P("data"))
put = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=rows)
product = jax.jit(lambda x, w: jnp.einsum("btd,df->btf", x, w), out_shardings=rows)
text = product.lower(put(4, 16384, 2560), put(2560, 9728)).compile().as_text()
costs = hlo.costs(text)
print(json.dumps([costs.flops, costs.hbm, costs.sent]))
"""
# Keys of 256 prompts, of which each of 64 chips has read four, into slots.
FILLED = """
import json
import jax, jax.numpy as jnp
from opd_jax import sharding
from opd_jax.aot import chips, hlo
from opd_jax.rollouts import slots
mesh = sharding.make_mesh(16, 1, chips.devices("v5p:4x4x4")[0], replica=4)
put = lambda where, dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=where)
keys = lambda width: {"keys": put(sharding.of_batch(mesh), jnp.bfloat16, 256, 8, width, 128)}
rows = lambda dtype: put(sharding.replicated(mesh), dtype, 256)
with jax.set_mesh(mesh):
  program = slots.placed.lower(keys(18560), keys(2048), rows(jnp.int32), rows(bool), 2048)
  costs = hlo.costs(program.compile().as_text())
print(json.dumps([costs.sent, sorted({each.kind for each, _ in costs.collectives})]))
"""
ROOT = pathlib.Path(__file__).parents[2]


@unittest.skipUnless(importlib.util.find_spec("libtpu"),
                     "no libtpu here: pip install --constraint constraints.txt '.[tpu]'")
class TpuTest(absltest.TestCase):

  def test_attention_is_a_kernel_that_keeps_its_scores_to_itself(self):
    child = subprocess.run(
        [sys.executable, "-c", ATTENTION], capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1",
                          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    self.assertEqual(child.returncode, 0, child.stderr[-4000:])
    flops, moved, collectives, scores = json.loads(child.stdout.splitlines()[-1])
    # Forward 2 products, of the queries' gradients 3, of keys' and values' 4; of 2 x 2 blocks 3.
    self.assertEqual(flops, (2 + 3 + 4) * 2 * 4 * 1024**2 * 64 * 3 / 4)
    self.assertEqual((collectives, scores), (0, 0))
    self.assertLess(moved, 4 * 1024**2 * 4 * 2)  # float32 scores, written and read once

  def test_weights_are_gathered_before_a_product(self):
    found = {}
    for how in ("asked", "not"):
      child = subprocess.run(
          [sys.executable, "-c", GATHERED, how], capture_output=True, text=True, cwd=ROOT,
          check=False, env=os.environ | {
              "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1",
              "LIBTPU_INIT_ARGS": "", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
      self.assertEqual(child.returncode, 0, child.stderr[-4000:])
      found[how] = json.loads(child.stdout.splitlines()[-1])
    flops, moved, sent = found["asked"]
    rows, weights, made = 16384 * 2560 * 2, 2560 * 9728 * 2, 16384 * 9728 * 2
    self.assertEqual(flops, 2 * 16384 * 2560 * 9728)
    self.assertEqual(sent, weights * 3 / 4)
    self.assertBetween(moved, rows + weights + made, rows + 3 * weights + made)
    self.assertLess(1.5 * moved, found["not"][1])

  def test_slots_are_handed_each_prompt_once(self):
    child = subprocess.run(
        [sys.executable, "-c", FILLED], capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1",
                          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    self.assertEqual(child.returncode, 0, child.stderr[-4000:])
    sent, kinds = json.loads(child.stdout.splitlines()[-1])
    self.assertEqual(kinds, ["all-gather"])
    self.assertEqual(sent, 256 * 8 * 2048 * 128 * 2 * 63 / 64)

  def report(self, *arguments):
    """A report of the tiny models, as it is printed."""
    child = subprocess.run(
        [sys.executable, "-m", "opd_jax.aot", "--config=configs/exopd.py:smoke",
         "--config.student.source=random:tiny_student",
         "--config.student.tokenizer=opd_jax/tiny/student",
         "--config.model.compute_dtype=bfloat16", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    self.assertEqual(child.returncode, 0, child.stderr[-4000:])
    return child.stdout

  def test_libtpu_compiles_32_slots_a_chip(self):
    said = self.report("--topology=v5p:2x2x1", "--config.rollout.prompts=128",
                       "--config.rollout.group_size=1", "--config.rollout.max_prompt=256")
    self.assertIn("prefill of 128 prompts", said)
    self.assertIn("| student: first tokens | 1 |", said)

  def test_a_small_run_is_reported_for_four_chips(self):
    said = self.report("--topology=v5e:2x2")
    self.assertIn("mesh data=4 x model=1", said)
    self.assertIn("fits in 15.75 GiB", said)
    update, = re.findall(r"^\| update \| 1 \| (.*) \|$", said, re.MULTILINE)
    flops, _, sent, by = update.split(" | ")[:4]
    self.assertGreater(float(flops), 0.0)
    self.assertGreater(float(sent), 0.0)
    self.assertRegex(by, "all-|collective-permute|reduce-scatter|^$")
    self.assertRegex(said, r"A step: .* TFLOP and .* GB sent a chip, as compiled about")


if __name__ == "__main__":
  absltest.main()
