"""A small run is compiled for a TPU pod that is not there."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import unittest

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]


@unittest.skipUnless(importlib.util.find_spec("libtpu"),
                     "no libtpu here: pip install --constraint constraints.txt '.[tpu]'")
class TpuTest(absltest.TestCase):

  def test_a_small_run_is_reported_for_four_chips(self):
    child = subprocess.run(
        [sys.executable, "-m", "opd_jax.aot", "--config=configs/exopd.py:smoke",
         "--topology=v5e:2x2", "--config.student.source=random:tiny_student",
         "--config.student.tokenizer=opd_jax/tiny/student", "--config.model.compute_dtype=bfloat16"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"})
    self.assertEqual(child.returncode, 0, child.stderr[-4000:])
    self.assertIn("mesh data=4 x model=1", child.stdout)
    self.assertIn("fits in 15.75 GiB", child.stdout)
    update, = re.findall(r"^\| update \| 1 \| (.*) \|$", child.stdout, re.MULTILINE)
    flops, _, sent, by = update.split(" | ")[:4]
    self.assertGreater(float(flops), 0.0)
    self.assertGreater(float(sent), 0.0)
    self.assertRegex(by, "all-|collective-permute|reduce-scatter|^$")
    self.assertRegex(child.stdout, r"A step: .* TFLOP and .* GB sent a chip, as compiled about")


if __name__ == "__main__":
  absltest.main()
