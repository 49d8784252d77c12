"""One device equals eight fake ones, on every shape of mesh, import and export included.

The number of devices is fixed when JAX starts, so this file's tests run in one child process
and report what they found.
"""

import json
import os
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

MESHES = {"8x1": dict(data=8), "4x2": dict(data=4, model=2), "2x4": dict(data=2, model=4),
          "2x2x2": dict(replica=2, data=2, model=2)}

SCRIPT = """
import dataclasses, json, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from opd_jax import keys, sharding
from opd_jax.models import attention, build, configs, hf, layers, surgery

MESHES = json.loads(sys.argv[1])
SMALL = dict(vocab_size=64, embed_dim=64, num_layers=4, num_heads=8, head_dim=8, mlp_dim=48)
CONFIGS = {
    "qwen3": dataclasses.replace(configs.NAMED["qwen3_8b"], **SMALL, num_kv_heads=2),
    "gpt2": dataclasses.replace(configs.NAMED["gpt2"], **SMALL, num_kv_heads=8,
                                max_positions=30),
}
tokens = np.random.default_rng(0).integers(0, 64, (8, 12))
mask = (np.arange(12) >= np.arange(8)[:, None] % 4).astype(np.int32)
positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

def forward(model, params):  # prefill and one cached token, as a sampler does
  cache = layers.empty_cache(model.config, 8, 12, jnp.float32)
  call = lambda a, b, cache: model.apply(
      {"params": params}, tokens[:, a:b], positions[:, a:b], mask[:, a:b], cache)
  first, cache = call(0, 11, cache)
  last, _ = call(11, 12, cache)
  hidden = jnp.concatenate([first, last], axis=1)
  return model.apply({"params": params}, hidden, method="logits")

equal = lambda a, b: all(jax.tree.leaves(jax.tree.map(
    lambda x, y: bool(np.array_equal(x, y)), jax.device_get(a), jax.device_get(b))))
result = {}
for name, config in CONFIGS.items():
  model, key = build.build(config), keys.root(0)
  alone = build.init_params(config, key)
  want = np.asarray(jax.jit(lambda p: forward(model, p))(alone))
  room = tempfile.mkdtemp()
  hf.export_hf(alone, config, room + "/alone")
  for where in MESHES if name == "qwen3" else ["4x2"]:
    mesh = sharding.make_mesh(**MESHES[where])
    with jax.set_mesh(mesh):
      born = build.init_params(config, key, mesh)
      got = np.asarray(jax.jit(lambda p: forward(model, p))(born))
      result[f"{name} {where}"] = dict(error=float(np.abs(got - want).max()))
      if name == "gpt2":
        continue
      read = hf.import_hf(room + "/alone", mesh=mesh)
      hf.export_hf(born, config, room + "/sharded")
      dropped, _ = surgery.drop_layers(born, config, 3)
      sliced, smaller = surgery.slice_vocab(born, config, 61)
    up = born["blocks"]["mlp"]["up"]
    kept = np.array([0, 1, 3])
    result[f"{name} {where}"] |= dict(
        born=equal(born, alone), read=equal(read, alone),
        same_layout=all(jax.tree.leaves(jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), born, read))),
        written=equal(hf.import_hf(room + "/sharded"), alone),
        share=up.size // up.addressable_shards[0].data.size, spec=tuple(up.sharding.spec),
        dropped=equal(dropped["blocks"], jax.tree.map(lambda x: x[kept], alone["blocks"])),
        dropped_spec=tuple(dropped["blocks"]["mlp"]["up"].sharding.spec),
        sliced=equal(sliced["embedding"], np.asarray(alone["embedding"])[:61]))

# The kernel of TPUs, interpreted: heads are cut, and keys and values with them or (of 2 heads on 4
# devices) repeated first.
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.normal(size=(4, 130, heads, 64)), jnp.float32) for heads in (4, 2, 2))
segments = jnp.asarray(np.arange(130) >= 3 * np.arange(4)[:, None], jnp.int32)
weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * segments[:, :, None, None]
both = lambda attend: jax.value_and_grad(lambda x: jnp.vdot(attend(*x), weight))((q, k, v))
mask = attention.seen(segments, segments, jnp.int32(0), None)
want = both(lambda *x: attention.in_blocks(*x, mask))
for where in list(MESHES)[1:]:
  with jax.set_mesh(sharding.make_mesh(**MESHES[where])):
    kernel = lambda *x: attention.splash(*x, segments, interpret=True)
    got, spec = jax.jit(lambda: both(kernel))(), jax.jit(kernel)(q, k, v).sharding.spec
  errors = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), got, want)
  result[f"splash {where}"] = dict(errors=jax.tree.leaves(errors), spec=tuple(spec))
print(json.dumps(result))
"""



class MeshTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    env = os.environ | {"JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "8"}
    child = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(MESHES)], env=env,
                           capture_output=True, text=True)
    if child.returncode:
      raise AssertionError(child.stderr)
    cls.result = json.loads(child.stdout)

  @parameterized.parameters(*(f"qwen3 {mesh}" for mesh in MESHES), "gpt2 4x2")
  def test_prefill_and_decode_equal_one_device(self, case):
    self.assertLess(self.result[case]["error"], 1e-5)

  @parameterized.parameters(*list(MESHES)[1:])
  def test_the_kernel_of_tpus_on_every_devices_own_heads_equals_plain_attention(self, mesh):
    result = self.result[f"splash {mesh}"]
    value, *gradients = result["errors"]
    self.assertLess(value, 1e-3)  # of a sum of thousands
    self.assertLess(max(gradients), 1e-4)
    rows = ["replica", "data"] if mesh == "2x2x2" else "data"
    self.assertEqual(result["spec"][:3], [rows, None, "model"])

  @parameterized.parameters(*MESHES)
  def test_parameters_are_born_and_read_sharded_and_equal(self, mesh):
    result = self.result[f"qwen3 {mesh}"]
    self.assertTrue(result["born"])
    self.assertTrue(result["read"])
    self.assertTrue(result["same_layout"])
    # No device holds more than its eighth; of two copies, than a quarter.
    self.assertEqual(result["share"], 4 if mesh == "2x2x2" else 8)
    self.assertEqual(result["spec"], [None, "data", "model"])

  @parameterized.parameters(*MESHES)
  def test_export_from_shards_equals_export_from_one_device(self, mesh):
    self.assertTrue(self.result[f"qwen3 {mesh}"]["written"])

  @parameterized.parameters(*MESHES)
  def test_fewer_layers_and_tokens_keep_the_layout(self, mesh):
    result = self.result[f"qwen3 {mesh}"]
    self.assertTrue(result["dropped"])
    self.assertTrue(result["sliced"])
    self.assertEqual(result["dropped_spec"], result["spec"])


if __name__ == "__main__":
  absltest.main()
