"""What the report says, and what it refuses."""

import contextlib
import io
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax.aot import chips, programs, report, study
from opd_jax.models import configs as models

ROOT = pathlib.Path(__file__).parents[2]
TINY = configs.on_policy(rollout=dict(prompts=2, group_size=1, max_prompt=8, max_response=8),
                         loss=dict(surrogate="reverse_kl"))


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
    made, compiled = [], study.compiled
    keep = lambda *args: made.append(compiled(*args)) or made[-1]
    said = io.StringIO()
    with mock.patch.object(study, "compiled", keep), contextlib.redirect_stdout(said):
      self.assertTrue(study.run(TINY, "cpu:1"))
    for wanted in ("student: prefill of 2 prompts", "student: decode 16 steps", "| score |",
                   "| update |", "| evaluation: KL from teacher |", "teachers' heads", "KV cache"):
      self.assertIn(wanted, said.getvalue())

    # The same on chips that are too small.
    small = made[0]
    small.chip = small.chip._replace(
        memory=next(row.total for row in small.rows if row.name == "update") - 1)
    said = io.StringIO()
    with mock.patch.object(study, "compiled", lambda *args: small), \
        contextlib.redirect_stdout(said):
      self.assertFalse(study.run(TINY, "cpu:1"))
    self.assertRegex(said.getvalue(), r"\| update \|.*\| no \|")
    self.assertIn("It does not fit. ", said.getvalue())

  @parameterized.parameters(
      ("update", "raise loss.micro_batches"), ("score", "context.tokens lower"),
      ("judge of 8 cases", "context.tokens lower"),
      ("evaluation: KL from teacher", "micro_batches"),
      ("student: decode 16 steps", "lower rollout.slots"))
  def test_what_does_not_fit_comes_with_what_to_change(self, name, told):
    row = SimpleNamespace(name=name, total=3 * 2**30)
    report = SimpleNamespace(rows=[row], chip=SimpleNamespace(memory=2**30), fits=lambda _: False)
    self.assertRegex(study.advice(report), f"{name} needs 3 GiB of 1: .*{told}")

  @parameterized.parameters(
      ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.21G of 15.75G hbm. "
       "Exceeded hbm capacity by 4.46G.", 20.21 * 2**30),
      ("RESOURCE_EXHAUSTED: allocation (512.00M) is larger than what is left", 2**29),
      ("RESOURCE_EXHAUSTED: no more", math.inf))
  def test_what_a_compiler_wanted_is_read_from_its_words(self, words, found):
    self.assertAlmostEqual(report.wanted(words), found)

  def test_meshes_are_ranked_by_time_and_those_that_do_not_fit_come_last(self):
    seconds = {("nothing", 1): 5.0, ("dots", 1): 3.0}

    def compiled(config, topology):
      self.assertEqual(config.mesh.data, -1)
      key = config.model.remat, config.mesh.model
      if key not in seconds:
        raise ValueError("rows do not go round")
      row = SimpleNamespace(name="update", total=2**30, times=1.0, problem="",
                            costs=SimpleNamespace(flops=1e12, sent=0.0))
      return SimpleNamespace(rows=[row], fits=lambda _: True,
                             seconds=lambda _: {"compute": seconds[key]})

    with mock.patch.object(study, "compiled", compiled), \
        mock.patch.object(study, "REMAT", ("nothing", "dots", "full")):
      found = study.swept(TINY, "cpu:1")[-1].splitlines()[2:]
    self.assertEqual([[x.strip() for x in line.split("|")[2:7]] for line in found],
                     [["dots", "1 (update)", "1", "3", "fits"],
                      ["nothing", "1 (update)", "1", "5", "fits"],
                      ["full", "", "", "", "rows do not go round"]])

  def test_twice_the_devices_do_half_the_work_each(self):
    child = subprocess.run(
        [sys.executable, "-m", "opd_jax.aot", "--config=configs/opd.py:smoke", "--topology=cpu:2",
         "--scaling=cpu:1,cpu:2"], capture_output=True, text=True, cwd=ROOT, check=False)
    self.assertEqual(child.returncode, 0, child.stderr[-2000:])
    rows = [[x.strip() for x in line.split("|")[1:-1]]
            for line in child.stdout.strip().splitlines()[-4:]]
    self.assertEqual([row[:3] for row in rows], [
        [topology, count, what] for topology, count in (("cpu:1", "1"), ("cpu:2", "2"))
        for what in ("sampling", "scores and updates")])
    for one, two in zip(rows[:2], rows[2:]):
      self.assertEqual(one[5], "1.000")
      self.assertAlmostEqual(float(two[5]), 1.0, delta=0.1)  # of all FLOPs
      self.assertGreater(float(two[6]), 0.0)  # sent
    self.assertAlmostEqual(float(rows[3][5]), 1.0, delta=0.01)

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
