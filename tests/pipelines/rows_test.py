"""Every pipeline refuses, in our words, a batch that its devices cannot share."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized
import jax

from opd_jax.pipelines import policy as policies

ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
import json, tempfile
from opd_jax import config as configs
from opd_jax import main
odd = dict(eval=dict(batch=3, samples=1, ks=(1,)))
found = {}
for name, config in dict(
    opd=configs.on_policy(rollout=dict(prompts=3, group_size=2)), opd_eval=configs.on_policy(**odd),
    sft=configs.offline(batch=dict(tokens=384, buckets=(96, 128))),
    sft_eval=configs.offline(batch=dict(tokens=768, buckets=(96,)), **odd),
    evaluate=configs.evaluate(**odd), context_use=configs.context_use(**odd),
    position_bias=configs.position_bias(**odd),
    critique_refine=configs.critique_refine(**odd)).items():
  try:
    main.pick(config.pipeline).run(config, tempfile.mkdtemp())
  except ValueError as error:
    found[name] = str(error)
print(json.dumps(found))
"""


class RowsTest(parameterized.TestCase):

  @parameterized.parameters((32, 8, 4, True), (32, 8, 8, False), (32, 5, 1, False), (5, 5, 1, True))
  def test_rows_must_be_a_multiple_of_devices_times_parts(self, rows, data, parts, good):
    mesh = jax.sharding.AbstractMesh((1, data, 2), ("replica", "data", "model"))
    if good:
      policies.check_rows("x", rows, mesh, parts)
    else:
      with self.assertRaisesRegex(ValueError, f"x = {rows} rows .* data={data} devices"
                                  f".*make it a multiple of {data * parts}"):
        policies.check_rows("x", rows, mesh, parts)

  def test_copies_of_the_weights_have_rows_of_their_own(self):
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ("replica", "data", "model"))
    policies.check_rows("x", 8, mesh)
    with self.assertRaisesRegex(ValueError, "mesh replica=2 x data=4 devices; make it .* of 8"):
      policies.check_rows("x", 4, mesh)

  def test_every_pipeline_asks_before_it_loads_anything(self):
    child = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"})
    self.assertEqual(child.returncode, 0, child.stderr)
    ends = "rows cannot be spread over mesh data=8 devices; make it a multiple of 8"
    self.assertEqual(json.loads(child.stdout.splitlines()[-1]), {
        "opd": f"rollout.prompts x rollout.group_size = 6 {ends}",
        "opd_eval": f"eval.batch x eval.samples = 3 {ends}",
        "sft": f"batch.tokens // bucket = 384 // 96 = 4 {ends}",
        "sft_eval": f"eval.batch x eval.samples = 3 {ends}",
        "evaluate": f"eval.batch x eval.samples = 3 {ends}",
        "context_use": f"eval.batch = 3 {ends}",
        "position_bias": f"eval.batch x eval.samples = 3 {ends}",
        "critique_refine": f"eval.batch x eval.samples = 3 {ends}"})


if __name__ == "__main__":
  absltest.main()
