"""Supervised training finishes once, resumes, and refuses what it cannot learn from."""

import contextlib
import json
import os
import pathlib
import re
import types
from unittest import mock

from absl.testing import absltest

from opd_jax import config as configs
from opd_jax import main
from opd_jax.pipelines import given, offline


def tiny(**changes):
  """An SFT run of a few seconds."""
  settings = dict(
      total_steps=3, log_every=1, writers=("jsonl",), export=False,
      data=dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0))),
      batch=dict(tokens=512, buckets=(128,), chunk=16),
      rollout=dict(max_prompt=40, max_response=8),
      eval=dict(prompts=4, samples=1, ks=(1,), batch=4),
      checkpoint=dict(every=1, best_metric="eval/mean@1"))
  for section, values in changes.items():
    settings[section] = ({**settings.get(section, {}), **values} if isinstance(values, dict)
                         else values)
  return configs.offline(**settings)


def run(config, workdir):
  configs.validate(config)
  main.remember(config, workdir)
  main.pick(config.pipeline).run(config, workdir)


def read(workdir):
  return [json.loads(line) for line in
          pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]


class OfflineTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path

  def test_a_finished_run_finishes_again_and_never_goes_back(self):
    run(tiny(), self.workdir)
    lines = read(self.workdir)
    run(tiny(), self.workdir)
    self.assertEqual(read(self.workdir), lines)
    with self.assertRaisesRegex(ValueError, "total_steps is 2, but .* holds 3 updates"):
      run(tiny(total_steps=2), self.workdir)

  def test_tokens_per_second_leave_evaluations_out_wherever_they_fall(self):
    seconds, as_batch = [0.0], given.as_batch

    def spend(amount, result):
      seconds[0] += amount
      return result

    clock = types.SimpleNamespace(perf_counter=lambda: seconds[0])
    evaluate = lambda params, name: spend(100.0, {"mean@1": 0.0})
    found = []
    for every in (3, 0):
      workdir = self.create_tempdir().full_path
      with (mock.patch.object(offline, "time", clock),
            mock.patch.object(given, "as_batch", lambda *args: spend(1.0, as_batch(*args))),
            mock.patch.object(offline.evaluation, "make", lambda *args: evaluate),
            mock.patch.object(offline.evaluation, "read", lambda *args: {})):
        run(tiny(total_steps=8, log_every=4, eval=dict(every=every)), workdir)
      found.append([line["time/tokens_per_s"] for line in read(workdir)
                    if "time/tokens_per_s" in line])
    self.assertLen(found[0], 2)
    self.assertEqual(found[0], found[1])

  def test_a_stop_asked_for_at_any_moment_is_saved_before_it_is_obeyed(self):
    answers = iter([False, True])  # the signal comes right after the first time of asking
    guard = lambda: contextlib.nullcontext(lambda: next(answers))
    with mock.patch.object(offline.preemption, "guard", guard):
      run(tiny(checkpoint=dict(every=9)), self.workdir)
    self.assertIn("2", os.listdir(f"{self.workdir}/checkpoints"))

  def test_compilations_are_counted_by_function(self):
    run(tiny(eval=dict(every=1)), self.workdir)
    last = [line for line in read(self.workdir) if "loss/total" in line][-1]
    self.assertEqual(last["compile/train_step"], 1)
    self.assertLessEqual(last.get("compile/decode", 0), 1)  # 0: a run before this one has done so

  def test_a_row_without_a_response_is_named(self):
    file = self.create_tempfile("rows.jsonl", '{"id": "gsm-17", "q": "1+1?", "a": "2"}').full_path
    kw = dict(train=file, test=file, question="q", answer="a")
    with self.assertRaisesRegex(ValueError, "row 'gsm-17' has an empty `response`"):
      run(tiny(data=dict(builder="jsonl", builder_kw=kw), eval=dict(prompts=1)), self.workdir)

  def test_a_batch_that_cannot_be_divided(self):
    with self.assertRaisesRegex(ValueError, r"batch.tokens // bucket = 512 // 128 = 4 rows cannot "
                                "be spread .*loss.micro_batches=3 parts; make it a multiple of 3"):
      run(tiny(loss=dict(micro_batches=3)), self.workdir)

  def test_a_loss_that_is_not_finite_is_never_saved(self):
    settings = dict(total_steps=9, optimizer=dict(learning_rate=1e30, clip_norm=1e30))
    with self.assertRaises(FloatingPointError) as caught:
      run(tiny(**settings), self.workdir)
    bad = int(re.search(r"update (\d+)", str(caught.exception))[1])
    saved = [int(n) for n in os.listdir(f"{self.workdir}/checkpoints") if n.isdigit()]
    self.assertEqual(max(saved, default=0), bad - 1)


if __name__ == "__main__":
  absltest.main()
