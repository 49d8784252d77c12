"""The command line answers a mistake with one line, and a workdir belongs to one run."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax import main

ROOT = pathlib.Path(__file__).parents[1]
QUICK = "--config=configs/quickstart.py"


class CommandLineTest(parameterized.TestCase):

  @parameterized.parameters(
      ((QUICK, "--workdir=W", "--config.optimizer.learning_rat=1"),
       "unknown config key config.optimizer.learning_rat. Did you mean 'learning_rate'?"),
      ((QUICK, "--workdir=W", "--config.zzz=1"), "config has: checkpoint, data, ema, eval"),
      ((QUICK, "--workdir=W", "--config.seed.x=1"), "config.seed is 0, not a section"),
      ((QUICK, "--workdir=W", "--config.total_steps=x"), "--config.total_steps=x: invalid literal"),
      ((QUICK, "--workdir=W", "--config.eval.ks=a"), "eval.ks is ('a',); it must be whole numbers"),
      ((QUICK, "--workdir=W", "--config.rollout.temperature=0.6"), "allow_biased_sampling"),
      ((QUICK,), "--workdir is missing"),
      (("--config=configs/none.py", "--workdir=W"), "No such file or directory"),
      ((QUICK + ":qick", "--workdir=W"), "no form 'qick'"),
  )
  def test_a_mistake_is_one_line_and_exit_2(self, arguments, message):
    workdir = self.create_tempdir().full_path
    done = subprocess.run(
        [sys.executable, "-m", "opd_jax.main",
         *(argument.replace("=W", f"={workdir}") for argument in arguments)],
        cwd=ROOT, capture_output=True, text=True)
    self.assertEqual(done.returncode, 2, done.stderr)
    lines = done.stderr.strip().splitlines()
    self.assertLen(lines, 1, done.stderr)
    self.assertStartsWith(lines[0], "error: ")
    self.assertIn(message, lines[0])
    self.assertEmpty(os.listdir(workdir))


class WorkdirTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path
    self.config_file = pathlib.Path(self.workdir, "config.json")

  def leave_results(self):
    pathlib.Path(self.workdir, "metrics.jsonl").write_text('{"step": 1}\n')

  def test_another_config_is_refused_key_by_key(self):
    main.remember(configs.on_policy(seed=1), self.workdir)
    self.leave_results()
    before = self.config_file.read_text()
    with self.assertRaisesRegex(ValueError, "ema.rate: 0.0 there, 0.1 now\n  seed: 1 there, 2 now"):
      main.remember(configs.on_policy(seed=2, ema=dict(rate=0.1)), self.workdir)
    self.assertEqual(self.config_file.read_text(), before)

  def test_chains_are_results_once_there_is_one(self):
    main.remember(configs.critique_refine(), self.workdir)
    chains = pathlib.Path(self.workdir, "chains", "answers.jsonl")
    chains.parent.mkdir()
    chains.touch()
    main.remember(configs.critique_refine(seed=1), self.workdir)
    chains.write_text("{}\n")
    with self.assertRaisesRegex(ValueError, "critic.source: tiny:weak there, tiny:student now"):
      main.remember(configs.critique_refine(seed=1, critic=dict(source="tiny:student")),
                    self.workdir)

  def test_a_run_may_go_on_for_longer_or_save_more_often(self):
    main.remember(configs.on_policy(), self.workdir)
    self.leave_results()
    main.remember(configs.on_policy(total_steps=900, log_every=1, checkpoint=dict(every=9),
                                    eval=dict(every=5), writers=("jsonl",)), self.workdir)
    self.assertIn('"total_steps": 900', self.config_file.read_text())

  def test_a_run_that_failed_at_the_start_may_be_tried_again(self):
    main.remember(configs.on_policy(student=dict(source="tiny:mistyped")), self.workdir)
    main.remember(configs.on_policy(), self.workdir)
    self.assertIn("tiny:student", self.config_file.read_text())

  def test_a_workdir_in_use_names_the_process_and_is_free_after_it(self):
    with main.locked(self.workdir):
      with self.assertRaisesRegex(ValueError, f"by process {os.getpid()} on .*; wait .*lock"):
        with main.locked(self.workdir):
          self.fail("two runs in one workdir")
    with main.locked(self.workdir):
      pass

  def test_an_unknown_pipeline_names_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "'evaluat'; it must be one of opd, .* mean 'evaluate'"):
      main.pick("evaluat")


if __name__ == "__main__":
  absltest.main()
