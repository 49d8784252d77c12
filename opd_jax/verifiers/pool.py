"""Worker processes with a hard time limit for each text.

A worker that does not answer in time is killed, with a verdict of 0 for its text, and
replaced; the run goes on. Workers are spawned, not forked (a fork of a process with JAX's
threads can hang), and import nothing but the verifier.
"""

from collections.abc import Callable, Sequence
import multiprocessing
from multiprocessing import connection
import time
from typing import Any

from opd_jax.verifiers.verdict import Verdict

# A fresh worker imports its libraries first; that is not the text's fault.
START_S = 120.0


def _serve(verify: Callable[[str, str], Verdict], pipe: connection.Connection) -> None:
  verify("#### 1", "1")  # imports everything that the first text would otherwise wait for
  pipe.send(None)
  while True:
    try:
      pipe.send(verify(*pipe.recv()))
    except (EOFError, KeyboardInterrupt):
      return


class _Worker:
  """One process, its pipe, and the text it is busy with."""

  def __init__(self, context: Any, verify: Callable[[str, str], Verdict]):
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=_serve, args=(verify, theirs), daemon=True)
    self.process.start()
    theirs.close()
    self.task: int | None = None
    self.ready = False
    self.deadline = time.monotonic() + START_S

  def give(self, task: int, text: str, answer: str, timeout_s: float) -> None:
    self.task, self.deadline = task, time.monotonic() + timeout_s
    self.pipe.send((text, answer))

  def kill(self) -> None:
    self.process.kill()
    self.process.join()
    self.pipe.close()


class Pool:
  """Callable: texts and answers -> verdicts, in order. A context manager."""

  def __init__(self, verify: Callable[[str, str], Verdict], workers: int, timeout_s: float):
    self._context = multiprocessing.get_context("spawn")
    self._verify, self._timeout_s = verify, timeout_s
    self._workers = [_Worker(self._context, verify) for _ in range(workers)]

  def __call__(self, texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    tasks = list(zip(texts, answers, strict=True))
    verdicts: list[Verdict | None] = [None] * len(tasks)
    waiting = list(range(len(tasks)))[::-1]
    while waiting or any(worker.task is not None for worker in self._workers):
      for worker in self._workers:
        if waiting and worker.ready and worker.task is None:
          task = waiting.pop()
          worker.give(task, *tasks[task], self._timeout_s)
      busy = [w for w in self._workers if w.task is not None or not w.ready]
      patience = max(min(w.deadline for w in busy) - time.monotonic(), 0.0)
      answered = connection.wait([w.pipe for w in busy], patience)
      for i, worker in enumerate(self._workers):
        if worker.pipe in answered:
          self._take(i, worker, verdicts)
        elif worker in busy and time.monotonic() > worker.deadline:
          self._replace(i, worker, verdicts, f"took longer than {self._timeout_s:g} s")
    return verdicts

  def _take(self, i: int, worker: _Worker, verdicts: list[Verdict | None]) -> None:
    try:
      verdict = worker.pipe.recv()
    except (EOFError, OSError):
      self._replace(i, worker, verdicts, "ended the process that checked it")
      return
    if worker.ready:
      verdicts[worker.task], worker.task = verdict, None
    worker.ready = True

  def _replace(self, i: int, worker: _Worker, verdicts: list[Verdict | None],
               reason: str) -> None:
    if not worker.ready:
      self.__exit__()
      raise RuntimeError("a verifier process did not start; run the verifier by hand to see why")
    verdicts[worker.task] = Verdict(0.0, f"Checking the response {reason}.")
    worker.kill()
    self._workers[i] = _Worker(self._context, self._verify)

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *error: Any) -> None:
    for worker in self._workers:
      worker.kill()
