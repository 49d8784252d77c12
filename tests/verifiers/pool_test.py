"""A verifier's processes cannot hold up a run, fail it or outlive it, and know no JAX."""

import importlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.verifiers import pool
from opd_jax.verifiers.verdict import NoVerdict

STUCK = ("9**9**9**9", "\\boxed{10^{10^{10}}}", "#### ((((10!)!)!)!)")

# A run as users start it: its main module imports JAX. A search that needs 2**99 steps and no
# memory stands in for a text that would keep sympy busy for ever.
RUN = """
import re
import jax
from opd_jax import verifiers
from opd_jax.verifiers import pool
if __name__ == "__main__":
  with verifiers.make("math_answer", 1, 1.0) as ours, pool.Pool(re.fullmatch, 1, 2.0) as stuck:
    ours(["#### 1"], ["1"])
    stuck(["1"], ["2"])
    print(ours._workers[0].process.pid, stuck._workers[0].process.pid, flush=True)
    stuck(["(a+)+"], ["a" * 99 + "!"])
"""

# Allocates as many bytes as the text says, and succeeds if it may.
GREEDY = """
from opd_jax.verifiers.verdict import Verdict

def verify(text, answer):
  return Verdict(float(text == "#### 1" or len(bytes(int(text))) > 0), "")
"""


def is_running(pid: int) -> bool:
  """Whether the process exists and is no zombie."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


# Cannot check anything until the file of that name is there.
FULL = """
import pathlib
from opd_jax.verifiers.verdict import NoVerdict, Verdict

def verify(text, answer):
  if text == "#### 1" or pathlib.Path(text).exists():
    return Verdict(1.0, "")
  pathlib.Path(answer or text + "x").touch()
  raise NoVerdict("no process can be started")
"""


class MakeTest(parameterized.TestCase):

  def test_unknown_names_meet_the_known_ones(self):
    with self.assertRaisesRegex(ValueError, "'maths'; it must be one of exact_match, math_answer"):
      with verifiers.make("maths", 1, 1.0):
        pass

  @parameterized.parameters((0, 1.0), (1, 0.0))
  def test_impossible_pools_are_refused(self, workers, timeout_s):
    with self.assertRaisesRegex(ValueError, "at least one process and a limit above 0"):
      with verifiers.make("math_answer", workers, timeout_s):
        pass

  def test_exact_match_needs_no_processes(self):
    with verifiers.make("exact_match", workers=0, timeout_s=0.0) as verify:
      self.assertEqual([v.reward for v in verify(["#### 1", "#### 2"], ["1", "1"])], [1.0, 0.0])
      with self.assertRaises(ValueError):
        verify(["#### 1"], [])


class PoolTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.verify = cls.enterClassContext(verifiers.make("math_answer", workers=2, timeout_s=2.0))

  def setUp(self):
    super().setUp()
    while not all(worker.ready for worker in self.verify._workers):
      self.verify(["#### 4"], ["4"])
      time.sleep(0.05)

  def test_verdicts_come_in_the_order_of_the_texts(self):
    texts = [f"#### {i % 7}" for i in range(60)]
    got = [v.reward for v in self.verify(texts, [str(i % 5) for i in range(60)])]
    self.assertEqual(got, [float(i % 7 == i % 5) for i in range(60)])
    self.assertEqual(self.verify([], []), [])

  def test_a_stuck_text_costs_its_time_limit_and_only_itself(self):
    before = {w.process.pid for w in self.verify._workers}
    start = time.monotonic()
    verdicts = self.verify([*STUCK, "#### 3"], ["7"] * len(STUCK) + ["3"])
    self.assertEqual([v.reward for v in verdicts], [0.0] * len(STUCK) + [1.0])
    for verdict in verdicts[:-1]:
      self.assertEqual(verdict.feedback, "Checking the response took longer than 2 s.")
    self.assertLess(time.monotonic() - start, 45.0)
    self.assertFalse(any(map(is_running, before)))  # killed, not abandoned
    self.assertEqual(self.verify(["#### 4"], ["4"])[0].reward, 1.0)

  def test_a_worker_killed_while_idle_is_replaced(self):
    for worker in self.verify._workers:
      worker.process.kill()
      worker.process.wait()
    self.assertEqual([v.reward for v in self.verify(["#### 4"] * 3, ["4"] * 3)], [1.0] * 3)

  def test_preemption_signals_do_not_touch_the_workers(self):
    before = [w.process.pid for w in self.verify._workers]
    for pid in before:
      os.kill(pid, signal.SIGTERM)
      os.kill(pid, signal.SIGINT)
    self.assertEqual([v.reward for v in self.verify(["#### 4"] * 4, ["4"] * 4)], [1.0] * 4)
    self.assertTrue(all(map(is_running, before)))

  def test_a_workers_death_is_the_texts_verdict(self):
    killer = threading.Timer(0.5, self.verify._workers[0].process.kill)
    killer.start()
    verdicts = self.verify([STUCK[1]] * 2, ["7"] * 2)
    self.assertEqual([v.reward for v in verdicts], [0.0, 0.0])
    killer.join()
    self.assertIn("Checking the response ended the process that checked it.",
                  [v.feedback for v in verdicts])

  def test_a_text_that_wants_too_much_memory_costs_only_itself(self):
    folder = self.create_tempdir().full_path
    pathlib.Path(folder, "greedy.py").write_text(GREEDY)
    self.enterContext(mock.patch.object(sys, "path", [folder, *sys.path]))
    with pool.Pool(importlib.import_module("greedy").verify, workers=1, timeout_s=20.0) as verify:
      verdicts = verify([str(10 << 30), str(10 << 20)], ["", ""])
    self.assertEqual([v.reward for v in verdicts], [0.0, 1.0])
    self.assertEqual(verdicts[0].feedback, "Checking the response ended the process that checked "
                                           "it.")

  def test_what_cannot_be_checked_is_tried_again_and_then_ends_the_run(self):
    folder = self.create_tempdir().full_path
    pathlib.Path(folder, "full.py").write_text(FULL)
    self.enterContext(mock.patch.object(sys, "path", [folder, *sys.path]))
    with pool.Pool(importlib.import_module("full").verify, workers=1, timeout_s=20.0) as verify:
      later = f"{folder}/later"
      self.assertEqual(verify([later], [later])[0].reward, 1.0)  # found at the second attempt
      with self.assertRaisesRegex(NoVerdict, "no fault of its text: no process can be started"):
        verify([f"{folder}/never"], [""])
      self.assertFalse(any(is_running(worker.process.pid) for worker in verify._workers))

  def test_workers_of_a_real_run_have_no_jax_and_die_with_it(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "the_run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    # As a module, like `python -m opd_jax.main`: multiprocessing would import it again.
    run = subprocess.Popen([sys.executable, "-m", "the_run"], stdout=subprocess.PIPE, text=True,
                           env=environment)
    self.addCleanup(run.kill)
    ours, stuck = map(int, run.stdout.readline().split())
    self.assertIn("jaxlib", pathlib.Path(f"/proc/{run.pid}/maps").read_text())
    self.assertNotIn("jaxlib", pathlib.Path(f"/proc/{ours}/maps").read_text())
    time.sleep(0.5)  # the second worker is now busy, and nobody will read its answer
    run.kill()
    run.wait()
    run.stdout.close()
    end = time.monotonic() + 20.0
    while (is_running(ours) or is_running(stuck)) and time.monotonic() < end:
      time.sleep(0.1)
    self.assertEqual((is_running(ours), is_running(stuck)), (False, False))


if __name__ == "__main__":
  absltest.main()
