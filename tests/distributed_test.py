"""Several processes are one run: the same losses, ends and checkpoints as one process has.

Processes on loopback, four fake CPU devices each.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax import distributed, keys, main, pipelines, sharding
from opd_jax.data import loader
from opd_jax.models import hf, source
from opd_jax.pipelines import opcd, stages

ROOT = pathlib.Path(__file__).parents[1]
LONGEST_S = 900  # a step of a test on a busy machine; who waits longer waits for ever
# Adam divides a gradient by its size; with eps far above every gradient errors stay small.
SETTINGS = (
    "rollout.prompts=8", "rollout.max_response=16", "eval.prompts=8", "eval.batch=8",
    "eval.samples=1", "eval.ks=1", "optimizer.schedule=constant", "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1.0", "optimizer.eps=10.0", "checkpoint.every=1",
    "checkpoint.best_metric=eval/mean@1", "evaluate_teachers=False", "writers=jsonl")

CRITIQUES = (
    "total_steps=1", "questions=4", "rollout.max_response=16", "critique.max_response=96",
    "triples=8", "updates=1", "filter=none", "eval.prompts=8", "eval.batch=8", "eval.samples=1",
    "eval.ks=1", "optimizer.eps=10.0", "optimizer.learning_rate=1.0", "optimizer.weight_decay=0.0",
    "checkpoint.best_metric=eval/mean@1", "writers=jsonl")


def free_port():
  with contextlib.closing(socket.socket()) as here:
    here.bind(("127.0.0.1", 0))
    return here.getsockname()[1]


def start(command, processes, devices):
  """Starts Python processes that know each other; one that is alone is told nothing."""
  port, started = free_port(), []
  for i in range(processes):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                        "JAX_NUM_CPU_DEVICES": str(devices)}
    if processes > 1:
      env[distributed.VARIABLE] = f"127.0.0.1:{port},{processes},{i}"
    started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
  return started


def run(workdir, steps, processes, devices, *changes):
  """A short OPD run of the tiny models."""
  return start(["-m", "opd_jax.main", "--config=configs/opd.py:smoke", f"--workdir={workdir}",
                *(f"--config.{x}" for x in (*SETTINGS, f"total_steps={steps}", *changes))],
               processes, devices)


def lines(workdir):
  """What was measured, without what belongs to the process that ran: times, compilations."""
  path = pathlib.Path(workdir, "metrics.jsonl")
  found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
           ] if path.is_file() else []
  return [{name: value for name, value in line.items()
           if not name.startswith(("time/", "compile/"))} for line in found]


def done(workdir):
  return max((line["step"] for line in lines(workdir) if "loss/total" in line), default=0)


class RunTest(parameterized.TestCase):

  def finish(self, started, code=0):
    said = [process.communicate(timeout=LONGEST_S)[0] for process in started]
    for process, text in zip(started, said):
      self.assertEqual(process.returncode, code, text)
    return said

  def wait_for(self, step, workdir, started):
    end = time.monotonic() + LONGEST_S
    while done(workdir) < step:
      self.assertLess(time.monotonic(), end, "nobody comes any further")
      for process in started:
        self.assertIsNone(process.poll(), process.returncode and process.communicate()[0])
      time.sleep(0.1)

  def assert_same(self, ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
      self.assertEqual(one.keys(), other.keys())
      for name, value in other.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

  def assert_exported_as_saved(self, workdir):
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    saved = source.load(f"workdir:{workdir}", keys.root(0), mesh).params
    jax.tree.map(np.testing.assert_array_equal, saved, hf.import_hf(f"{workdir}/export"))

  def test_two_processes_equal_one_through_kills_and_other_meshes(self):
    alone, many = (self.create_tempdir().full_path for _ in range(2))
    started = run(many, 90, processes=2, devices=4)
    self.wait_for(2, many, started)
    started[1].send_signal(signal.SIGTERM)  # of one: both stop, and save
    said = self.finish(started)
    self.assertIn("SIGTERM: saved after", said[0])
    self.assertNotIn("SIGTERM: saved after", said[1])  # the first speaks for all

    # One is killed, the last or the first, which also keeps the list of the others; or its machine
    # freezes, and no connection breaks.
    died = "another task died|this process cannot go on"
    for killed, how, told in ((1, signal.SIGKILL, died),
                              (0, signal.SIGKILL, f"coordination service|leader|{died}"),
                              (1, signal.SIGSTOP, died)):
      before = done(many)
      saved = max(int(path.name) for path in pathlib.Path(many, "checkpoints").iterdir()
                  if path.name.isdigit())  # the last one may have died while it saved
      started = run(many, 90, processes=2, devices=4)
      self.wait_for(before + 2, many, started)
      since = time.monotonic()
      started[killed].send_signal(how)
      other = started[1 - killed]
      said = other.communicate(timeout=LONGEST_S)[0]
      self.assertLess(time.monotonic() - since, 60.0)
      self.assertNotIn(other.returncode, (0, None))
      self.assertRegex(said, told)
      if other is started[0]:
        self.assertRegex(said, f"resuming after {saved} steps")
      started[killed].kill()
      started[killed].communicate()

    # On from its last checkpoint: in as many processes, each with a copy of the weights, in one on
    # the same mesh as before, and on one device.
    last = done(many)
    for steps, processes, devices, replica in (
        (last + 1, 2, 4, 2), (last + 2, 1, 8, 1), (last + 3, 1, 1, 1)):
      said = self.finish(run(many, steps, processes, devices, f"mesh.replica={replica}"))
      self.assertRegex(said[0], "resuming after [1-9]")
      if processes > 1:
        self.assert_exported_as_saved(many)
    self.finish(run(alone, last + 3, processes=1, devices=8))
    learned = lambda workdir: [line for line in lines(workdir) if "loss/total" in line]
    self.assertEqual([line["step"] for line in learned(many)], [*range(1, last + 4)])
    self.assert_same(learned(many), learned(alone))
    self.assert_same(lines(many)[:1] + lines(many)[-1:], lines(alone)[:1] + lines(alone)[-1:])

  def test_two_processes_of_opcd_make_and_learn_the_same_triples(self):
    alone, many = (self.create_tempdir().full_path for _ in range(2))
    train = lambda workdir, *how: start(
        ["-m", "opd_jax.main", "--config=configs/opcd.py:smoke", f"--workdir={workdir}",
         *(f"--config.{x}" for x in CRITIQUES)], *how)
    started, made = train(many, 2, 2), opcd.folder(many, 0) / "answers.jsonl"
    while not (made.is_file() and made.stat().st_size):
      for process in started:
        self.assertIsNone(process.poll(), process.returncode and process.communicate()[0])
      time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    self.assertIn("SIGTERM: stopped", self.finish(started)[0])
    answers = made.read_text()
    self.finish(train(many, 2, 2))
    self.assertStartsWith(made.read_text(), answers)
    self.finish(train(alone, 1, 4))
    ours, theirs = (opcd.read(workdir, 0) for workdir in (many, alone))
    self.assertLen(ours, 8)
    self.assertEqual(ours, theirs)
    self.assertTrue(any(triple["kept"] for triple in ours))
    self.assert_same(lines(many)[-1:], lines(alone)[-1:])

  @parameterized.parameters(("strong_samples", "rows.jsonl"), ("sft", "teacher_answers.jsonl"))
  def test_two_processes_make_the_same_rows_and_learn_the_same_of_them(self, name, file):
    alone, many = (self.create_tempdir().full_path for _ in range(2))
    for workdir, processes, devices in ((many, 2, 1), (alone, 1, 2)):
      self.finish(start(["-m", "opd_jax.main", f"--config=configs/{name}.py:smoke",
                         f"--workdir={workdir}", "--config.writers=jsonl"], processes, devices))
    ours, theirs = (stages.read(pathlib.Path(workdir, file)) for workdir in (many, alone))
    for one, other in zip(ours, theirs, strict=True):
      for group in (one, other):
        group["group"] = json.loads(group.get("group", "[]"))
      groups = one.pop("group"), other.pop("group")
      self.assertEqual(one, other)
      for x, y in zip(*groups, strict=True):
        self.assertEqual(x.pop("response"), y.pop("response"))
        self.assertEqual(x.keys(), y.keys())
        np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-4, atol=1e-4)
    self.assert_same(lines(many), lines(alone))


TALK = """
import sys
import numpy as np
from opd_jax import distributed, main
from opd_jax.data import loader
distributed.initialize()
me = distributed.index()

def refused(function):
  try:
    function()
  except (ValueError, OSError) as error:
    return f"{type(error).__name__}: {error}"

def half(items):
  if 7 in items:
    raise ValueError("no seven")
  return [x / 2 for x in items]

def mine():
  raise OSError("disk full")

rows = loader.Batches([dict(n=i) for i in range(11)], 4, seed=3, fits=lambda row: row["n"] != 5,
                      transform=lambda row: {**row, "by": me})
seen = [next(rows) for _ in range(6)]
print(dict(
    count=distributed.count(), first=distributed.is_first(), part=list(distributed.share("abcde")),
    each=distributed.each(half, range(5)), few=distributed.each(half, [1]),
    wrong=refused(lambda: distributed.each(half, range(8))),
    gather=distributed.gather("x" * (me * 1000)), of_first=distributed.of_first(lambda: me),
    much=distributed.of_first(lambda: np.arange(5_000_000) % 251 * (1 - me)).sum().item(),
    of_first_wrong=refused(lambda: distributed.of_first(mine)),
    anyone=[distributed.anyone(me == 1), distributed.anyone(False)],
    alike=refused(lambda: distributed.check_alike("config", "a" if me else "b")),
    shared=refused(lambda: distributed.check_shared(sys.argv[1])),
    blind=refused(lambda: distributed.check_shared(sys.argv[1 + me])),
    alone=refused(lambda: main.pick("claims")), opd=refused(lambda: main.pick("opd")),
    rows=[row["n"] for batch in seen for row in batch], state=rows.state(),
    by=sorted({row["by"] for row in seen[0]})))
"""


class TalkTest(absltest.TestCase):

  def test_what_processes_tell_each_other(self):
    here, elsewhere = (self.create_tempdir().full_path for _ in range(2))
    said = []
    for process in start(["-c", TALK, here, elsewhere], 2, 1):
      text = process.communicate()[0]
      self.assertEqual(process.returncode, 0, text)
      said.append(eval(text.strip().splitlines()[-1]))
    differ = dict(first=(True, False), part=(["a", "b"], ["c", "d", "e"]))
    for i, found in enumerate(said):
      for name, values in differ.items():
        self.assertEqual(found.pop(name), values[i])
      self.assertIn("process 1 of 2 does not see what process 0 writes", found.pop("blind"))
    self.assertEqual(*said)
    found = said[0]
    self.assertEqual(found["count"], 2)
    self.assertEqual(found["each"], [0.0, 0.5, 1.0, 1.5, 2.0])
    self.assertEqual(found["few"], [0.5])
    self.assertEqual(found["wrong"], "ValueError: no seven")
    self.assertEqual(found["gather"], ["", "x" * 1000])
    self.assertEqual(found["of_first"], 0)
    self.assertEqual(found["much"], (np.arange(5_000_000) % 251).sum())  # 40 MB, in three pieces
    self.assertEqual(found["of_first_wrong"], "OSError: disk full")
    self.assertEqual(found["anyone"], [True, False])
    self.assertIn("config of process 1 is not that of process 0", found["alike"])
    self.assertIsNone(found["shared"])
    self.assertIn("pipeline 'claims' runs in one process, and here are 2", found["alone"])
    self.assertIsNone(found["opd"])
    # The rows are those of one process, in its order, and both have worked on them.
    alone = loader.Batches([dict(n=i) for i in range(11)], 4, seed=3,
                           fits=lambda row: row["n"] != 5, transform=lambda row: row)
    self.assertEqual(found["rows"], [row["n"] for _ in range(6) for row in next(alone)])
    self.assertEqual(found["state"], alone.state())
    self.assertEqual(found["by"], [0, 1])
    self.assertEmpty(os.listdir(here))


class EnvironmentTest(parameterized.TestCase):

  @parameterized.parameters("yes", "host,2,0", "host:x,2,0", "host:1,2,2", "host:1,2", ":1,2,0")
  def test_a_variable_that_cannot_be_read_says_what_it_may_be(self, value):
    with mock.patch.dict(os.environ, {distributed.VARIABLE: value}):
      with self.assertRaisesRegex(ValueError, f"'{value}'; it must be 'auto', or HOST:PORT"):
        distributed.initialize()

  def test_alone_nothing_is_shared_out(self):
    self.assertEqual((distributed.count(), distributed.index(), distributed.who()), (1, 0, ""))
    self.assertEqual(distributed.each(lambda items: [2 * x for x in items], range(3)), [0, 2, 4])

  @parameterized.parameters(*pipelines.PIPELINES)
  def test_every_pipeline_runs_in_several_processes_or_says_that_it_does_not(self, name):
    with mock.patch.object(distributed, "count", lambda: 2):
      if name in pipelines.SEVERAL:
        main.pick(name)
      else:
        with self.assertRaisesRegex(ValueError, f"'{name}' runs in one process, and here are 2"):
          main.pick(name)


if __name__ == "__main__":
  absltest.main()
