"""Importing a checkpoint of S bytes needs S plus at most its largest tensor twice.

Measured as the peak resident memory of a process of its own, on a synthetic checkpoint of 1 GB
(OPD_JAX_IMPORT_GB sets another size), on one device and on a mesh of eight.
"""

import json
import os
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from opd_jax.models import hf_config, hf_rows, tensors
from opd_jax.models.configs import ModelConfig

# The largest tensors are the first and, transposed on the way, the last to be read.
VOCAB, WIDTH, MLP = 32_768, 1024, 4096
LAYER_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)

SCRIPT = """
import gc, json, sys
import jax
from opd_jax import sharding
from opd_jax.models import hf

def status(field):
  with open("/proc/self/status") as f:
    return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

warm, folder, data, model = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mesh = sharding.make_mesh(data, model) if data * model > 1 else None
hf.import_hf(warm, mesh=mesh)  # the same shapes with fewer layers: allocators, threads
gc.collect()
before = status("VmRSS")
params = hf.import_hf(folder, mesh=mesh)
jax.block_until_ready(params)
held = sum(x.nbytes for x in jax.tree.leaves(params))
if mesh:  # replicated arrays lie on every device
  held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(json.dumps(dict(held=held, over=status("VmHWM") - before - held)))
"""


def write(folder: str, layers: int) -> tuple[int, int]:
  """A llama of zeros in shards; returns (bytes, bytes of its largest tensor)."""
  config = ModelConfig(
      family="llama", vocab_size=VOCAB, embed_dim=WIDTH, num_layers=layers, num_heads=16,
      num_kv_heads=16, head_dim=64, mlp_dim=MLP, max_positions=128,
      tied_embeddings=False)
  os.mkdir(folder)
  with open(os.path.join(folder, "config.json"), "w") as f:
    json.dump(hf_config.to_hf(config, "float32"), f)
  plan = {t.name: tensors.Planned(t.shape, np.dtype(np.float32),
                                  lambda t=t: np.zeros(t.shape, np.float32))
          for t in hf_rows.tensor_list(config)}
  tensors.write(folder, plan, max_shard_bytes=300_000_000)
  sizes = [planned.size for planned in plan.values()]
  return sum(sizes), max(sizes)


class ImportMemoryTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if not os.path.exists("/proc/self/status"):
      raise absltest.SkipTest("peak memory is read from /proc, which only Linux has")
    cls.room = tempfile.TemporaryDirectory()
    cls.warm, cls.folder = (os.path.join(cls.room.name, name) for name in ("warm", "big"))
    write(cls.warm, 1)
    gigabytes = float(os.environ.get("OPD_JAX_IMPORT_GB", "1"))
    cls.total, cls.largest = write(cls.folder, round((gigabytes * 1e9 - 8 * VOCAB * WIDTH) / LAYER_BYTES))

  @classmethod
  def tearDownClass(cls):
    cls.room.cleanup()
    super().tearDownClass()

  @parameterized.parameters((1, 1), (4, 2))
  def test_host_holds_the_largest_tensor_at_most_twice(self, data, model):
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, self.warm, self.folder, str(data), str(model)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(data * model)},
        check=True, capture_output=True, text=True).stdout
    result = json.loads(out)
    self.assertGreaterEqual(result["held"], self.total)
    print(f"\n{data}x{model}: checkpoint {self.total / 1e6:.0f} MB, largest tensor "
          f"{self.largest / 1e6:.0f} MB, peak beyond the arrays {result['over'] / 1e6:.0f} MB")
    self.assertLessEqual(result["over"], 2 * self.largest)


if __name__ == "__main__":
  absltest.main()
