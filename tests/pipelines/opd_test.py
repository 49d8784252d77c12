"""The loop resumes exactly, is the same on any mesh, and refuses what cannot work."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, main, preemption, sharding, train_state
from opd_jax.data import tokenizer as tokenizers
from opd_jax.losses import masked
from opd_jax.pipelines import on_policy, opd
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts.batch import Batch

ROOT = pathlib.Path(__file__).parents[2]


def tiny(**changes):
  """An OPD run of a few seconds."""
  settings = dict(
      total_steps=6, log_every=1, writers=("jsonl",),
      data=dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0))),
      rollout=dict(prompts=8, max_prompt=40, max_response=24),
      loss=dict(surrogate="reverse_kl"), optimizer=dict(learning_rate=1e-3),
      eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
      checkpoint=dict(every=2, best_metric="eval/mean@2"))
  for section, values in changes.items():
    if isinstance(values, dict):
      settings[section] = {**settings.get(section, {}), **values}
    else:
      settings[section] = values
  return configs.on_policy(**settings)


# Rollouts and evaluations of one shape, and few tokens: most of the time goes to compiling.
SMALL = dict(rollout=dict(prompts=8, group_size=2, max_response=16, decode_chunk=8),
             eval=dict(prompts=8, samples=2, batch=8))


def run(config, workdir):
  configs.validate(config)
  with main.locked(workdir):
    main.remember(config, workdir)
    main.pick(config.pipeline).run(config, workdir)


def weights(workdir):
  return safetensors.load_file(f"{workdir}/export/model.safetensors")


def lines(workdir):
  """What was measured, without what belongs to the process that ran: times, compilations."""
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  return [{name: value for name, value in json.loads(line).items()
           if not name.startswith(("time/", "compile/"))} for line in text.splitlines()]


def losses(workdir):
  return {line["step"]: line["loss/total"] for line in lines(workdir) if "loss/total" in line}


def steps_saved(workdir):
  return sorted(int(n) for n in os.listdir(f"{workdir}/checkpoints") if n.isdigit())


class ResumeTest(absltest.TestCase):

  # Checkpoints fall between lines of metrics: what a line sums up is resumed too.
  SETTINGS = dict(total_steps=24, log_every=3, **SMALL)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.unbroken = cls.enterClassContext(tempfile.TemporaryDirectory())
    run(tiny(**cls.SETTINGS), cls.unbroken)

  def command(self, workdir):
    code = ("import sys; sys.path[:0] = ['.', 'tests/pipelines']; import opd_test; "
            f"opd_test.run(opd_test.tiny(**{self.SETTINGS}), {workdir!r})")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)

  def wait_for_step(self, workdir, step, process):
    for _ in range(6000):
      if any(s >= step for s in (losses(workdir) if os.path.exists(
          f"{workdir}/metrics.jsonl") else ())):
        return
      self.assertIsNone(process.poll(), "the run ended early")
      time.sleep(0.01)
    self.fail("no progress")

  def assert_as_unbroken(self, workdir):
    self.assertEqual(lines(workdir), lines(self.unbroken))
    ours, theirs = weights(workdir), weights(self.unbroken)
    self.assertEqual(ours.keys(), theirs.keys())
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name], name)

  def test_killed_and_resumed_equals_unbroken_bit_for_bit(self):
    broken = self.create_tempdir().full_path
    for stop, step in ((signal.SIGKILL, 5), (signal.SIGTERM, 11)):
      process = self.command(broken)
      self.wait_for_step(broken, step, process)
      process.send_signal(stop)
      error = process.communicate()[1]
      self.assertEqual(process.returncode, -9 if stop == signal.SIGKILL else 0, error)
      self.assertFalse(os.path.exists(f"{broken}/export"))  # it was broken off
    run(tiny(**self.SETTINGS), broken)
    self.assert_as_unbroken(broken)

  def test_a_rollout_that_was_broken_off_is_drawn_again(self):
    broken = self.create_tempdir().full_path
    asked = []

    def within_the_tenth():  # after its first chunk of steps
      if os.path.exists(f"{broken}/metrics.jsonl") and len(losses(broken)) == 3:
        asked.append(None)
      return len(asked) > 1

    with mock.patch.object(preemption, "guard", lambda: contextlib.nullcontext(within_the_tenth)):
      run(tiny(**self.SETTINGS), broken)
    self.assertGreater(len(asked), 1)
    self.assertEqual(steps_saved(broken)[-1], 9)
    self.assertFalse(os.path.exists(f"{broken}/export"))
    run(tiny(**self.SETTINGS), broken)
    self.assert_as_unbroken(broken)

  def test_fewer_steps_are_refused_and_as_many_as_are_done_finish(self):
    workdir = self.create_tempdir().full_path
    run(tiny(total_steps=2), workdir)
    with self.assertRaisesRegex(ValueError, "total_steps is 1, but .* holds 2 updates"):
      run(tiny(total_steps=1), workdir)
    before = lines(workdir)
    os.remove(f"{workdir}/eval/step_000002.json")  # as if a longer run had been cut off here
    run(tiny(total_steps=2), workdir)
    self.assertEqual(lines(workdir), [*before, before[-1]])


class ClockTest(absltest.TestCase):

  def test_a_step_is_not_charged_for_the_one_before(self):
    class StillComputing:
      def block_until_ready(self):
        time.sleep(0.2)
    clock = on_policy.Clock(True, StillComputing())
    clock.lap("rollout")
    self.assertLess(clock.metrics(8)["time/step_s"], 0.1)
    began = time.perf_counter()
    on_policy.Clock(False, StillComputing())  # a step that is not logged does not wait
    self.assertLess(time.perf_counter() - began, 0.1)


# Adam divides a gradient by its size, and a rounding error may turn the sign of a tiny one. With
# eps far above every gradient the update is in proportion to it, and errors stay small.
PLAIN = dict(total_steps=2, optimizer=dict(learning_rate=1.0, eps=10.0), **SMALL)
SHAPES = {"8x1": dict(data=8), "4x2": dict(data=4, model=2), "2x4": dict(data=2, model=4),
          "2x2x2": dict(replica=2, data=2, model=2)}

MESHES = """
import sys; sys.path[:0] = ['.', 'tests/pipelines']
import opd_test
for name, mesh in opd_test.SHAPES.items():
  opd_test.run(opd_test.tiny(mesh=mesh, **opd_test.PLAIN), f"{sys.argv[1]}/{name}")
"""


class MeshTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    run(tiny(**PLAIN), f"{cls.folder}/alone")
    child = subprocess.run([sys.executable, "-c", MESHES, cls.folder], cwd=ROOT, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {
                               "JAX_NUM_CPU_DEVICES": "8"})
    if child.returncode:
      raise AssertionError(child.stderr)

  @parameterized.parameters(*SHAPES)
  def test_one_device_equals_eight_on_every_mesh(self, mesh):
    alone, many = f"{self.folder}/alone", f"{self.folder}/{mesh}"
    for ours, theirs in zip(lines(many), lines(alone), strict=True):
      self.assertEqual(ours.keys(), theirs.keys())
      for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    start = safetensors.load_file(ROOT / "opd_jax/tiny/student/model.safetensors")
    ours = weights(many)
    for name, value in weights(alone).items():
      moved = np.linalg.norm(value - start[name])
      self.assertGreater(moved, 1e-3, name)
      self.assertLess(np.linalg.norm(ours[name] - value), 2e-4 * moved, name)


def ragged(vocab_size):
  """A rollout of random tokens, of rows of every length, off-policy by up to a nat."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, vocab_size, (8, 16), np.int32)
  mask = np.arange(12) < np.array([12, 1, 3, 5, 12, 7, 2, 9])[:, None]
  return Batch(tokens[:, :4], np.ones((8, 4), bool), tokens[:, 4:], mask, mask,
               rng.uniform(-9.0, -7.0, mask.shape).astype(np.float32))


class SurrogateTest(parameterized.TestCase):

  @parameterized.parameters("score_function", "clipped", "forward_kl", "reverse_kl", "jsd")
  def test_every_surrogate_runs_and_says_its_formula(self, surrogate):
    workdir = self.create_tempdir().full_path
    run(tiny(loss=dict(surrogate=surrogate), total_steps=2), workdir)
    last = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text()
            .splitlines() if "loss/total" in line][-1]
    for function, count in dict(score=1, reverse_kl_in_parts=1, train_step=1).items():
      self.assertEqual(last[f"compile/{function}"], count, function)
    # Once to train and once to evaluate; not at all if a run before this one has done so.
    self.assertLessEqual(last.get("compile/decode", 0), 2)

  @parameterized.parameters(
      ("forward_kl", "teacher", "bucket"), ("reverse_kl", "student", "bucket"),
      ("jsd", "student", "renormalize"))
  def test_every_divergence_runs_on_the_most_likely_tokens(self, surrogate, top_of, tail):
    config = tiny(loss=dict(surrogate=surrogate, top_k=8, top_of=top_of, tail=tail), total_steps=2)
    run(config, self.create_tempdir().full_path)

  def test_all_tokens_as_the_most_likely_ones_are_the_whole_vocabulary(self):
    results = []
    for top_k in (0, 320):
      workdir = self.create_tempdir().full_path
      run(tiny(loss=dict(top_k=top_k), total_steps=1), workdir)
      results.append(losses(workdir)[1])
    self.assertAlmostEqual(*results, delta=1e-3)

  def test_micro_batches_change_nothing(self):
    results = []
    for micro in (1, 2, 4):
      workdir = self.create_tempdir().full_path
      run(tiny(loss=dict(micro_batches=micro), total_steps=2), workdir)
      results.append(list(losses(workdir).values()))
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-3)

  @parameterized.parameters(("score_function", "sequence_sum"), ("reverse_kl", "sequence_mean"))
  def test_no_metric_changes_with_the_number_of_micro_batches(self, surrogate, aggregate):
    config = tiny(loss=dict(surrogate=surrogate, aggregate=aggregate))
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      student = policies.load(config.student, config.model, keys.root(0), mesh)
      method = opd.build(config, student, mesh)
      optimizer = train_state.make_optimizer(config.optimizer, 1)
      state = train_state.create(student.params, optimizer, False, mesh)
      batch = method.score(state, ragged(student.tokenizer.vocab_size))
      # Some tokens the teacher bans, and they teach nothing.
      banned = batch.mask & (batch.response % 5 == 0)
      batch = batch.replace(
          learn=batch.learn & ~banned,
          teacher_logprobs=jnp.where(banned, -jnp.inf, batch.teacher_logprobs))
      found = []
      for micro in (1, 2, 4):
        step = jax.jit(train_state.make_train_step(
            method.loss, method.describe, optimizer, masked.COUNTS[aggregate], micro, 0.0))
        found.append(step(state, batch, method.constants(state))[1])
    self.assertGreater(found[0]["teacher/dropped_tokens"], 4)
    self.assertGreater(found[0]["importance/max"], 1.5)
    for other in found[1:]:
      self.assertEqual(other.keys(), found[0].keys())
      for name, value in found[0].items():
        np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


class BadInputTest(parameterized.TestCase):

  def assert_refused(self, pattern, config):
    with self.assertRaisesRegex(ValueError, pattern):
      run(config, self.create_tempdir().full_path)

  @parameterized.parameters(dict(temperature=0.7), dict(top_k=20), dict(top_p=0.95))
  def test_sampling_that_biases_the_kl(self, **sampling):
    self.assert_refused("biased.*allow_biased_sampling", tiny(rollout=sampling))
    configs.validate(tiny(rollout=dict(allow_biased_sampling=True, **sampling)))

  def test_lengths_beyond_the_model(self):
    self.assert_refused("student allows 512", tiny(rollout=dict(max_response=500)))

  def test_a_batch_that_cannot_be_divided(self):
    self.assert_refused("= 32 rows cannot be spread.*multiple of 5", tiny(
        loss=dict(micro_batches=5)))
    with self.assertRaisesRegex(ValueError, "data=3 x model=1 is not the number of devices"):
      run(tiny(mesh=dict(data=3)), self.create_tempdir().full_path)

  def test_names_that_do_not_exist(self):
    self.assert_refused("one of opd", tiny(loss=dict(signal="opdd")))
    self.assert_refused("score_function, clipped, forward_kl", tiny(loss=dict(surrogate="kl")))
    self.assert_refused("'student' or 'teacher'", tiny(loss=dict(top_k=4, top_of="both")))
    self.assert_refused("'bucket' or 'renormalize'", tiny(loss=dict(top_k=4, tail="cut")))
    self.assert_refused("unknown model source 'tiny:stud'.*student", tiny(
        student=dict(source="tiny:stud")))
    self.assert_refused("unknown model source 'student'", tiny(student=dict(source="student")))
    self.assert_refused("exact_match", tiny(verifier=dict(name="exact")))
    self.assert_refused("writers", tiny(writers=("json",)))

  def test_a_top_k_without_tokens_or_effect(self):
    self.assert_refused("top_k is 321.*320 tokens", tiny(loss=dict(top_k=321)))
    self.assert_refused("top_k is 4, which has no effect", tiny(loss=dict(
        surrogate="score_function", top_k=4)))

  def test_teacher_of_another_tokenizer(self):
    folder = self.create_tempdir().full_path
    tokenizers.byte_tokenizer().save(folder)
    self.assert_refused("tokenizers differ.*'The quick brown fox",
                        tiny(teacher=dict(tokenizer=folder)))

  def test_a_pickle(self):
    folder = self.create_tempdir().full_path
    (ROOT / "opd_jax/tiny/student/config.json").read_text()
    pathlib.Path(folder, "config.json").write_text(
        (ROOT / "opd_jax/tiny/student/config.json").read_text())
    pathlib.Path(folder, "pytorch_model.bin").write_bytes(b"")
    self.assert_refused("safetensors", tiny(student=dict(source=f"hf:{folder}")))

  def test_a_missing_folder(self):
    self.assert_refused("/no/such", tiny(student=dict(source="hf:/no/such")))

  def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(self):
    workdir = self.create_tempdir().full_path
    settings = dict(optimizer=dict(learning_rate=1e30, clip_norm=1e30), log_every=2,
                    checkpoint=dict(every=1, keep_last=9))
    with self.assertRaisesRegex(FloatingPointError, "bad_batch_step_") as caught:
      run(tiny(**settings), workdir)
    bad = int(re.search(r"update (\d+)", str(caught.exception))[1])
    self.assertIn(f"bad_batch_step_{bad:06d}.npz", os.listdir(workdir))
    self.assertEqual(steps_saved(workdir), list(range(1, bad)))
    with self.assertRaisesRegex(FloatingPointError, f"update {bad}"):  # the last update of all
      run(tiny(total_steps=bad, **settings), workdir)
    self.assertEqual(steps_saved(workdir), list(range(1, bad)))

  def test_a_workdir_of_another_config_or_in_use(self):
    workdir = self.create_tempdir().full_path
    run(tiny(total_steps=2), workdir)
    with self.assertRaisesRegex(ValueError, "optimizer.learning_rate: 0.001 there, 0.002 now"):
      run(tiny(total_steps=2, optimizer=dict(learning_rate=2e-3)), workdir)
    with main.locked(workdir):
      with self.assertRaisesRegex(ValueError, f"in use by process {os.getpid()}"):
        run(tiny(total_steps=2), workdir)


if __name__ == "__main__":
  absltest.main()
