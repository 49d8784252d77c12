"""metrics.jsonl of a resumed run reads as if it had never been broken."""

import json
import math
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
import numpy as np

from opd_jax import config as configs
from opd_jax import progress, writer


class WriterTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    self.path = pathlib.Path(self.workdir, "metrics.jsonl")
    self.config = configs.offline(writers=("jsonl",))

  def write(self, first_step, *steps):
    with writer.Writer(self.workdir, self.config, first_step) as out:
      for step in steps:
        out.write(step, {"loss/total": np.float32(step)})

  def steps(self):
    return [line["step"] for line in writer.read(self.workdir)]

  def test_a_resumed_run_reads_as_if_unbroken(self):
    self.write(0, 0, 1, 2, 3)
    self.path.write_text(self.path.read_text() + '{"step": 4, "loss/to')  # killed while writing
    self.write(2, 3, 4)
    broken = self.path.read_bytes()
    self.path.unlink()
    self.write(0, 0, 1, 2, 3, 4)
    self.assertEqual(broken, self.path.read_bytes())

  def test_a_run_killed_before_its_first_checkpoint_begins_anew(self):
    self.write(0, 0, 1)
    self.write(0, 0, 1, 2)
    self.assertEqual(self.steps(), [0, 1, 2])

  def test_what_is_read_while_a_line_is_being_written_is_whole(self):
    self.write(0, 1)
    self.path.write_text(self.path.read_text() + json.dumps({"step": 2}))  # no end of line yet
    self.assertEqual(self.steps(), [1])

  def test_tensorboard_events_and_the_report_are_written(self):
    with writer.Writer(self.workdir, configs.offline(), 0) as out:
      for step in (1, 2):
        out.write(step, {"loss/total": step, "eval/mean@8": 0.5, "rollout/reward": 0.1})
    self.assertNotEmpty(list(pathlib.Path(self.workdir, "tensorboard").iterdir()))
    progress.report(self.workdir)
    self.assertEqual(pathlib.Path(self.workdir, "report.png").read_bytes()[:4], b"\x89PNG")

  def test_tensorboard_is_told_to_forget_what_the_resumed_run_repeats(self):
    with mock.patch("tensorboardX.SummaryWriter") as summary:
      with writer.Writer(self.workdir, configs.offline(), 7):
        self.assertEqual(summary.call_args.kwargs["purge_step"], 8)

  def test_writers_that_are_unknown_or_not_installed_are_named(self):
    with self.assertRaisesRegex(ValueError, "csv.*jsonl, tensorboard, wandb"):
      writer.Writer(self.workdir, configs.offline(writers=("csv",)), 0)
    with mock.patch.dict(sys.modules, wandb=None):
      with self.assertRaisesRegex(ValueError, "wandb.*EXTRAS=wandb bash launch/env.sh"):
        writer.Writer(self.workdir, configs.offline(writers=("wandb",)), 0)

  def test_a_resumed_run_goes_on_in_its_own_wandb_run(self):
    def wandb_id(workdir, first_step):
      with mock.patch.dict(sys.modules, wandb=mock.MagicMock()) as modules:
        with writer.Writer(workdir, configs.offline(writers=("wandb",)), first_step):
          return modules["wandb"].init.call_args.kwargs["id"]
    first = wandb_id(self.workdir, 0)
    self.assertNotEmpty(first)
    self.assertEqual(wandb_id(self.workdir, 5), first)
    self.assertNotEqual(wandb_id(self.create_tempdir().full_path, 0), first)

  def test_values_that_are_not_finite_are_null_in_json_and_no_point_in_tensorboard(self):
    with mock.patch("tensorboardX.SummaryWriter") as summary:
      with writer.Writer(self.workdir, configs.offline(), 0) as out:
        out.write(1, {"loss/total": math.nan, "student/entropy": math.inf, "rollout/reward": 0.5})
        self.assertEqual(summary().add_scalar.call_args_list, [mock.call("rollout/reward", 0.5, 1)])

    def refuse(name):
      raise AssertionError(f"{name} is not strict JSON")
    self.assertEqual(json.loads(self.path.read_text(), parse_constant=refuse), {
        "step": 1, "loss/total": None, "student/entropy": None, "rollout/reward": 0.5})
    self.assertTrue(math.isnan(writer.read(self.workdir)[0]["loss/total"]))
    progress.report(self.workdir)


if __name__ == "__main__":
  absltest.main()
