"""Worker processes with a hard time limit for each text.

A worker that does not answer in time is killed, with a verdict of 0 for its text, and
replaced; the run goes on. Workers are fresh interpreters: a fork of a process with JAX's
threads can hang, and multiprocessing's spawn would import the run's main module, and so
JAX, into every one of them.
"""

from collections.abc import Callable, Sequence
import multiprocessing
from multiprocessing import connection
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

from opd_jax.verifiers.verdict import NoVerdict, Verdict

# A fresh worker imports its libraries first; that is not the text's fault.
START_S = 120.0

# Address space that a text may make a worker use, beyond which it fails: 9**9**9 must not
# take the machine down with it. The verifiers' libraries need a tenth of it.
MEMORY_BYTES = 4 << 30

# What checks a text is tried so often, with these pauses behind each time, before the run ends.
AGAIN_S = (1.0, 5.0, 0.0)


def serve(descriptor: int) -> None:
  """Life of a worker: a verifier and its time limit, then texts, until the pipe closes."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  # Preemption and Ctrl-C may reach every process: only the run decides when workers go.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # If the run is killed meanwhile, nobody else stops a worker that is stuck in a text.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  pipe = connection.Connection(descriptor)
  try:
    verify, timeout_s = pipe.recv()
    verify("#### 1", "1")  # imports everything that the first text would otherwise wait for
    pipe.send(None)
    while True:
      text, answer = pipe.recv()
      signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
      verdict = checked(verify, text, answer)
      signal.setitimer(signal.ITIMER_REAL, 0)
      pipe.send(verdict)
  except (EOFError, OSError):
    return


def checked(verify: Callable[[str, str], Verdict], text: str, answer: str) -> Verdict | NoVerdict:
  """The verdict; after several attempts without, why there is none."""
  for wait_s in AGAIN_S:
    try:
      return verify(text, answer)
    except NoVerdict as error:  # a machine that is full for a moment
      failure = error
      time.sleep(wait_s)
  return failure


class _Worker:
  """One process, its pipe, and the text it is busy with."""

  def __init__(self, verify: Callable[[str, str], Verdict], timeout_s: float):
    self.pipe, theirs = multiprocessing.Pipe()
    code = f"from opd_jax.verifiers.pool import serve; serve({theirs.fileno()})"
    # A worker computes nothing large: its memory goes back to the kernel.
    inherited = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    self.process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path)})
    theirs.close()
    self.pipe.send((verify, timeout_s))
    self.task: int | None = None
    self.ready = False
    self.deadline = time.monotonic() + START_S

  def give(self, task: int, text: str, answer: str, timeout_s: float) -> None:
    """Raises: OSError if the process is gone."""
    self.pipe.send((text, answer))
    self.task, self.deadline = task, time.monotonic() + timeout_s

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()
    self.pipe.close()


class Pool:
  """Callable: texts and answers -> verdicts, in order. A context manager.

  Args:
    verify: importable by name, since workers find it by importing its module.
    workers: processes, >= 1.
    timeout_s: hard limit for one text, seconds, > 0.
  Raises: ValueError if these are out of range. A call raises NoVerdict where what checks texts
    fails again and again: to give 0 to all of them would teach that nothing is right.
  """

  def __init__(self, verify: Callable[[str, str], Verdict], workers: int, timeout_s: float):
    if workers < 1 or timeout_s <= 0:
      raise ValueError(f"verifier.workers is {workers} and verifier.timeout_s is {timeout_s}; "
                       "this verifier needs at least one process and a limit above 0 seconds")
    self._verify, self._timeout_s = verify, timeout_s
    self._workers = [_Worker(verify, timeout_s) for _ in range(workers)]

  def __call__(self, texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    tasks = list(zip(texts, answers, strict=True))
    verdicts: list[Verdict | None] = [None] * len(tasks)
    waiting = list(range(len(tasks)))[::-1]
    for i, worker in enumerate(self._workers):
      if worker.task is not None:  # an earlier call was interrupted
        self._restart(i)
    while waiting or any(worker.task is not None for worker in self._workers):
      self._give(waiting, tasks)
      busy = [w for w in self._workers if w.task is not None or not w.ready]
      patience = max(min(w.deadline for w in busy) - time.monotonic(), 0.0)
      answered = connection.wait([w.pipe for w in busy], patience)
      for i, worker in enumerate(self._workers):
        if worker.pipe in answered:
          self._take(i, worker, verdicts)
        elif worker in busy and time.monotonic() > worker.deadline:
          self._replace(i, worker, verdicts, f"took longer than {self._timeout_s:g} s")
    return verdicts

  def _give(self, waiting: list[int], tasks: list[tuple[str, str]]) -> None:
    for i, worker in enumerate(self._workers):
      if waiting and worker.ready and worker.task is None:
        try:
          worker.give(waiting[-1], *tasks[waiting[-1]], self._timeout_s)
          waiting.pop()
        except OSError:  # it was killed while idle, which is not the text's fault
          self._restart(i)

  def _take(self, i: int, worker: _Worker, verdicts: list[Verdict | None]) -> None:
    try:
      verdict = worker.pipe.recv()
    except (EOFError, OSError):
      self._replace(i, worker, verdicts, "ended the process that checked it")
      return
    if isinstance(verdict, NoVerdict):
      self.__exit__()
      raise NoVerdict(f"a response could not be checked, which is no fault of its text: {verdict}")
    if worker.ready:
      verdicts[worker.task], worker.task = verdict, None
    worker.ready = True

  def _replace(self, i: int, worker: _Worker, verdicts: list[Verdict | None],
               reason: str) -> None:
    if not worker.ready:
      self.__exit__()
      raise RuntimeError("a verifier process did not start; run the verifier by hand to see why")
    verdicts[worker.task] = Verdict(0.0, f"Checking the response {reason}.")
    self._restart(i)

  def _restart(self, i: int) -> None:
    self._workers[i].kill()
    self._workers[i] = _Worker(self._verify, self._timeout_s)

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *error: Any) -> None:
    for worker in self._workers:
      worker.kill()
