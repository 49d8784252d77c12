"""The chunked losses never hold [B, T, V], and on a mesh a device only its share of a tile."""

import json
import math
import os
import re
import subprocess
import sys

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import fused, tiles

OF_TEACHER = dict(top_k=4, top_of="teacher", tail="renormalize")
FORMS = (  # every kind, and every choice of tokens
    dict(kind="forward_kl"), dict(kind="forward_kl", **OF_TEACHER),
    dict(kind="reverse_kl", top_k=4), dict(kind="jsd"), dict(kind="jsd", **OF_TEACHER))


class MemoryTest(parameterized.TestCase):
  """B T V elements are more than any other array of the problem has."""

  ROWS, LENGTH, WIDTH, VOCAB, TILE = 4, 64, 8, 97, (8, 16)

  def compiled(self, function, width=WIDTH, vocabulary=VOCAB, dtype=jnp.float32):
    hidden = jax.ShapeDtypeStruct((self.ROWS, self.LENGTH, width), jnp.bfloat16)
    return jax.jit(function).lower(
        hidden, jax.ShapeDtypeStruct((width, vocabulary), dtype)).compile()

  def losses(self, tile=TILE):
    mask = np.ones((self.ROWS, self.LENGTH), bool)
    tokens = np.zeros((self.ROWS, self.LENGTH), np.int32)
    for form in FORMS:
      yield str(form), lambda h, w, form=form: fused.fused_divergence(
          h, w, 2 * h, w, mask, tile=tile, **form)[0]
    yield "logprobs", lambda h, w: sum(
        x.sum() for x in fused.fused_logprobs(h, w, tokens, tile=tile))

  def test_no_array_has_as_many_elements_as_a_column_of_tiles(self):
    whole = self.ROWS * self.LENGTH * self.VOCAB
    naive = self.compiled(lambda h, w: jax.nn.logsumexp(jnp.sort(h @ w)))
    self.assertGreaterEqual(self.largest(naive), whole)  # the measure sees one where there is one
    states = self.ROWS * self.LENGTH * self.WIDTH
    tile = self.ROWS * math.prod(self.TILE)
    for name, loss in self.losses():
      for kind, function in (("forward", loss), ("both", jax.value_and_grad(loss, (0, 1)))):
        largest = self.largest(self.compiled(function))
        self.assertLessEqual(largest, max(states, 2 * tile), (name, kind))
    topk = self.compiled(lambda h, w: fused.fused_topk(h, w, 5, tile=self.TILE))
    self.assertLessEqual(self.largest(topk), max(states, 2 * tile))

  def largest(self, compiled):
    shapes = re.findall(r"\w\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_heads_and_their_gradient_are_never_copied(self, dtype):
    size = 64 * 4099  # far more than states and tiles
    for name, loss in self.losses():
      step = jax.value_and_grad(loss, (0, 1))
      extra = self.compiled(step, 64, 4099, dtype).memory_analysis().temp_size_in_bytes
      # A bfloat16 head has its gradient collected in float32: one array that is no result.
      self.assertLess(extra, 4 * size * (0.4 + (dtype == jnp.bfloat16)), name)

  def test_a_vocabulary_of_one_block_takes_as_many_products_as_the_plain_form(self):
    product = 2 * self.ROWS * self.LENGTH * self.WIDTH * self.VOCAB
    for name, loss in self.losses(tile=(0, 0)):
      products = 3 if name == "logprobs" else 4
      flops = self.compiled(jax.value_and_grad(loss, (0, 1))).cost_analysis()["flops"]
      self.assertLess(flops, (products + 0.5) * product + 60 * product / (2 * self.WIDTH), name)

  @parameterized.parameters(
      (1, 4096, 151_936), (64, 80, 320), (512, 100, 151_936), (2, 100, 50), (8192, 3, 49_152))
  def test_tiles_hold_to_the_budget_and_differ_by_little(self, rows, length, vocabulary):
    cut = tiles.Tiles.of((rows, length), vocabulary, (0, 0))
    self.assertLessEqual(rows * cut.columns * cut.block, 1.1 * tiles.ELEMENTS)
    self.assertLess(-(-length // cut.columns) * cut.columns - length, -(-length // cut.columns))
    self.assertLess(len(cut.blocks) * cut.block - vocabulary, len(cut.blocks) * 128)


SCRIPT = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from opd_jax import sharding
from opd_jax.losses import fused
from opd_jax.losses.tiles import Tiles

rng = np.random.default_rng(0)
B, T, D, V = 8, 10, 16, int(sys.argv[1])
hidden, teacher = rng.normal(size=(2, B, T, D)).astype(np.float32)
head, teacher_head = (0.5 * rng.normal(size=(D, n)).astype(np.float32)
                      for n in (V, V + 2 * (V % 8)))
tokens, mask = rng.integers(0, V, (B, T)), np.arange(T) < rng.integers(0, T + 1, (B, 1))

def divergence(settings):
  def loss(hidden, head, teacher, teacher_head, tokens, mask):
    return fused.fused_divergence(hidden, head, teacher, teacher_head, mask, tile=(3, 12),
                                  **settings)
  return loss

def logprobs(hidden, head, teacher, teacher_head, tokens, mask):
  logprobs, entropy = fused.fused_logprobs(hidden, head, tokens, tile=(3, 12))
  return jnp.sum(jnp.where(mask, logprobs + 0.3 * entropy, 0.0)), logprobs

cases = {kind: divergence(dict(kind=kind)) for kind in ("forward_kl", "reverse_kl", "jsd")}
cases |= {"top_k": divergence(dict(kind="jsd", top_k=5)), "logprobs": logprobs,
          "topk": lambda hidden, head, *_: ((hidden * 0).sum() + (head * 0).sum(), [
              x.astype(jnp.float32) for x in fused.fused_topk(hidden, head, 5, tile=(3, 12))])}
result = {}
for name, loss in cases.items():
  both = jax.value_and_grad(loss, (0, 1), has_aux=True)
  operands = hidden, head, teacher, teacher_head, tokens, mask
  want = jax.tree.leaves(jax.jit(both)(*operands))
  for data, model in ((8, 1), (4, 2), (2, 4)):
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
      rows = NamedSharding(mesh, P("data"))
      columns = NamedSharding(mesh, P(None, "model") if V % model == 0 else P())
      placed = jax.device_put(operands, (rows, columns, rows, columns, rows, rows))
      step = jax.jit(both).lower(*placed).compile()
      got = jax.tree.leaves(step(*placed))
      cut = Tiles.of((B, T), V, (3, 12))
    # Of a tile [B, columns, lanes, block] a device has its rows and one lane.
    text = step.as_text()
    shapes = [list(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    tiles = [shape for shape in shapes
             if len(shape) == 4 and shape[1::2] == [cut.columns, cut.block]]
    joined = [line.split("jit(")[0] for line in text.splitlines()
              if re.search(r" (all-reduce|all-gather|all-to-all|collective-permute)\(", line)
              and "while/body/closed_call/while" in line]
    result[f"{name} {data}x{model}"] = dict(
        error=max(float(np.abs(a - b).max() / (1 + np.abs(b).max())) for a, b in zip(got, want)),
        tiles=len(tiles), whole=sum(shape[0] > B // data or shape[2] > 1 for shape in tiles),
        joined=joined)
print(json.dumps(result))
"""


class MeshTest(parameterized.TestCase):

  # 64 divides by every number of devices; 63 by none, and then they all hold all of it.
  @parameterized.parameters(64, 63)
  def test_eight_devices_equal_one_and_hold_only_their_share_of_a_tile(self, vocabulary):
    env = os.environ | {"JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "8"}
    child = subprocess.run([sys.executable, "-c", SCRIPT, str(vocabulary)], env=env,
                           capture_output=True, text=True)
    self.assertEqual(child.returncode, 0, child.stderr)
    result = json.loads(child.stdout)
    self.assertLen(result, 18)
    for case, found in result.items():
      self.assertLess(found["error"], 2e-6, case)
      self.assertGreater(found["tiles"], 0, case)
      self.assertEqual(found["whole"], 0, case)
      self.assertEmpty(found["joined"], case)  # no device waits for another between blocks


if __name__ == "__main__":
  absltest.main()
