"""What the report says, and what it refuses."""

import contextlib
import io
import pathlib
import subprocess
import sys
from types import SimpleNamespace

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax.aot import chips, programs, study
from opd_jax.models import configs as models

ROOT = pathlib.Path(__file__).parents[2]


def fitting(limit):
  """A stand-in for compiling: n parts need 5 + 2 n of a chip that has `limit`."""
  tried = []

  def trial(count):
    tried.append(count)
    row = SimpleNamespace(total=5 + 2 * count)
    return SimpleNamespace(rows=[row], chip=SimpleNamespace(memory=limit),
                           fits=lambda row: row.total <= limit)
  return trial, tried


class StudyTest(parameterized.TestCase):

  @parameterized.parameters((4, 0, 7), (7, 1, 7), (15, 4, 13), (29, 8, 21), (500, 64, 133))
  def test_the_largest_that_fits_is_found_in_few_trials(self, limit, largest, peak):
    trial, tried = fitting(limit)
    self.assertEqual(study.largest(trial, [1, 2, 4, 8, 16, 32, 64]), (largest, peak))
    self.assertLessEqual(len(tried), 4)

  def test_a_tiny_run_is_reported_from_shapes_alone(self):
    said = io.StringIO()
    config = configs.on_policy(rollout=dict(prompts=2, group_size=1, max_prompt=8, max_response=8),
                               loss=dict(surrogate="reverse_kl"))
    with contextlib.redirect_stdout(said):
      self.assertTrue(study.run(config, "cpu:1", sweep=False, largest=False))
    for wanted in ("student: prefill of 2 prompts", "student: decode 16 steps", "| score |",
                   "| update |", "teachers' heads", "KV cache"):
      self.assertIn(wanted, said.getvalue())

  @parameterized.parameters(
      ("v9:2x2", "topology is 'v9:2x2'; wanted KIND:SHAPE"),
      ("cpu:64", "XLA_FLAGS=--xla_force_host_platform_device_count=64"))
  def test_a_topology_that_is_none_is_refused(self, topology, message):
    with self.assertRaisesRegex(ValueError, message):
      chips.devices(topology)

  def test_a_pipeline_whose_functions_are_not_known_is_refused(self):
    with self.assertRaisesRegex(ValueError, "pipeline is 'evaluate'"):
      study.run(configs.evaluate(), "cpu:1", sweep=False, largest=False)

  @parameterized.parameters(
      ("hf:Qwen3-4B", "qwen3_4b"), ("hf:/models/Qwen/Qwen3-1.7B-Base/", "qwen3_1p7b"),
      ("hf:Qwen2.5-7B-Instruct", "qwen2p5_7b"), ("random:phi4", "phi4"))
  def test_a_model_that_is_not_here_has_the_shape_of_its_name(self, source, name):
    section = configs.on_policy(student=dict(source=source)).student
    found = programs.outline(section, configs.on_policy().model)
    self.assertEqual(found.model.config, models.NAMED[name])
    self.assertIsNone(found.params)

  def test_a_model_that_nobody_knows_is_refused(self):
    section = configs.on_policy(student=dict(source="hf:Gizmo-3B")).student
    with self.assertRaisesRegex(ValueError, "'hf:Gizmo-3B' is not here .* Qwen3-4B"):
      programs.outline(section, configs.on_policy().model)

  def test_the_command_says_in_one_line_what_is_missing(self):
    child = subprocess.run([sys.executable, "-m", "opd_jax.aot", "--config=configs/opd.py:smoke"],
                           capture_output=True, text=True, cwd=ROOT, check=False)
    self.assertEqual(child.returncode, 2)
    self.assertRegex(child.stderr, "error: --topology is missing. Usage: python -m opd_jax.aot")


if __name__ == "__main__":
  absltest.main()
