"""Configs are complete and locked, and a mistake in one is named with its nearest key."""

import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax import main, progress, writer

ROOT = pathlib.Path(__file__).parents[1]


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(optimizer=dict(learning_rat=1.0)), "config.optimizer.learning_rat.*'learning_rate'"),
      (dict(rolout={}), "config.rolout.*'rollout'"),
      (dict(total_steps="3"), "config.total_steps must be a int, found '3'"),
      (dict(optimizer=3), "config.optimizer is a section"),
  )
  def test_mistakes_are_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      configs.on_policy(**changes)

  def test_a_config_is_locked_and_whole_numbers_serve_as_floats(self):
    config = configs.on_policy(optimizer=dict(learning_rate=1))
    self.assertIsInstance(config.optimizer.learning_rate, float)
    with self.assertRaises(AttributeError):
      config.optimizer.nope = 3

  def test_impossible_numbers_are_refused(self):
    for changes, message in ((dict(rollout=dict(prompts=0)), "rollout.prompts is 0"),
                             (dict(eval=dict(ks=(16,))), "eval.samples >= 16")):
      with self.assertRaisesRegex(ValueError, message):
        configs.validate(configs.on_policy(**changes))

  def test_an_unknown_form_lists_the_known(self):
    with self.assertRaisesRegex(ValueError, "no form 'qick'; it has '', 'quick'"):
      configs.form("qick", "", "quick")


class CommandLineTest(parameterized.TestCase):

  def command(self, *arguments):
    return subprocess.run([sys.executable, "-m", "opd_jax.main", *arguments], cwd=ROOT,
                          capture_output=True, text=True)

  def test_mistakes_are_one_line_and_exit_2(self):
    workdir = f"--workdir={self.create_tempdir().full_path}"
    quick = "--config=configs/quickstart.py"
    for arguments, message in (
        ((quick, workdir, "--config.optimizer.learning_rat=1"), 'Did you mean "learning_rate"'),
        ((quick, workdir, "--config.total_steps=x"), "invalid literal for int"),
        ((quick,), "--workdir is missing"),
        (("--config=configs/none.py", workdir), "No such file or directory: 'configs/none.py'"),
        (("--config=configs/quickstart.py:qick", workdir), "no form 'qick'"),
        ((quick, workdir, "--config.rollout.temperature=0.6"), "allow_biased_sampling"),
    ):
      done = self.command(*arguments)
      self.assertEqual(done.returncode, 2, done.stderr)
      self.assertIn(message, done.stderr)
      self.assertNotIn("Traceback", done.stderr)
      self.assertStartsWith(done.stderr.strip().splitlines()[-1][:200] or "error", "error")


class WriterTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    self.config = configs.offline()

  def test_a_resumed_run_reads_as_if_unbroken(self):
    with writer.Writer(self.workdir, self.config, 0) as out:
      for step in (1, 2, 3):
        out.write(step, {"loss/total": step})
    path = pathlib.Path(self.workdir, "metrics.jsonl")
    path.write_text(path.read_text() + '{"step": 4, "loss/to')  # killed while writing
    with writer.Writer(self.workdir, self.config, 2) as out:
      out.write(3, {"loss/total": 30})
    self.assertEqual(writer.read(self.workdir), [
        {"step": 1, "loss/total": 1.0}, {"step": 2, "loss/total": 2.0},
        {"step": 3, "loss/total": 30.0}])

  def test_tensorboard_events_and_the_report_are_written(self):
    with writer.Writer(self.workdir, self.config, 0) as out:
      for step in (1, 2):
        out.write(step, {"loss/total": step, "eval/mean@8": 0.5, "rollout/reward": 0.1})
    self.assertNotEmpty(list(pathlib.Path(self.workdir, "tensorboard").iterdir()))
    progress.report(self.workdir)
    self.assertEqual(pathlib.Path(self.workdir, "report.png").read_bytes()[:4], b"\x89PNG")

  def test_unknown_writers_are_named(self):
    with self.assertRaisesRegex(ValueError, "csv.*jsonl, tensorboard, wandb"):
      writer.Writer(self.workdir, configs.offline(writers=("csv",)), 0)


if __name__ == "__main__":
  absltest.main()
