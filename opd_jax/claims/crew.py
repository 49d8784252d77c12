"""Processes side by side, each running one pipeline after another on its own share of the cores.

Tiny models gain nothing from a second core, two runs beside each other do. Seeds are processes and
not one vmapped compile: the engine decides on the host which rows have ended and what comes next,
and that loop is a run's own. Not a ProcessPoolExecutor: a process that dies, out of memory say,
would take the whole pool with it.
"""

from collections.abc import Iterator, Sequence
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import Any

import jax
import ml_collections

from opd_jax import pipelines
from opd_jax.claims import curves, measured

LOG, BEGUN = "log.txt", "begun.json"


class Worker:
  """One process; the first that it says is what it computes on.

  Args:
    cores: that it may use; none: all.
  """

  def __init__(self, cores: Sequence[int]):
    self.pipe, theirs = multiprocessing.Pipe()
    # Fresh, as a fork of a process with JAX's threads can hang; and pinned before it is born, as
    # XLA counts the cores once. It has our environment, and with it malloc's tunables.
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, jax.config.jax_compilation_cache_dir), daemon=True)
    with pinned(cores):
      process.start()
    theirs.close()
    self._process = process

  def give(self, config: ml_collections.ConfigDict, workdir: str, rests_on: str) -> None:
    """Asks for a run; `pipe` becomes readable when it is done."""
    self.pipe.send((config.to_dict(), workdir, rests_on))

  def take(self) -> dict[str, Any]:
    """What the run has measured. Raises: RuntimeError saying why there is nothing."""
    try:
      result, error = self.pipe.recv()
    except (EOFError, ConnectionError) as gone:
      self._process.join()
      raise RuntimeError(f"its process died (exit code {self._process.exitcode})") from gone
    if error:
      raise RuntimeError(error)
    return result

  def kill(self) -> None:
    self._process.kill()
    self._process.join()
    self.pipe.close()

  @property
  def alive(self) -> bool:
    return self._process.is_alive()


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
  """Within it, processes started by this thread have these cores only."""
  if not cores or not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def shares(workers: int) -> list[list[int]]:
  """The cores of this process, dealt out; one worker has them all, and so has each of too many."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if workers == 1 or workers > len(cores):
    return [[]] * workers
  return [cores[i::workers] for i in range(workers)]


def ready(workers: Sequence[Worker], timeout_s: float) -> list[Worker]:
  """Those who have something to say; waits for one, but no longer than the timeout."""
  pipes = connection.wait([worker.pipe for worker in workers], timeout_s)
  return [worker for worker in workers if worker.pipe in pipes]


def serve(pipe: connection.Connection, cache: str | None) -> None:
  """Life of a worker: says what it computes on, then runs what comes, until the pipe closes."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  jax.config.update("jax_compilation_cache_dir", cache)
  # A run compiles what the one before it compiled, most of it in less than the usual second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  pipe.send((machine(), ""))
  with contextlib.suppress(EOFError, ConnectionError):
    while True:
      config, *where = pipe.recv()
      try:
        answer = run(ml_collections.ConfigDict(config), *where), ""
      except Exception as error:  # whatever a pipeline can raise; the others go on
        answer = {}, f"{type(error).__name__}: {error}"
      pipe.send(answer)


def run(config: ml_collections.ConfigDict, workdir: str, rests_on: str) -> dict[str, Any]:
  """Runs a pipeline, its output in `workdir/log.txt`, and measures it.

  What a sitting that was killed has left of the same run is gone on with, if its pipeline can;
  "wall_s" is then of the last part.

  Args:
    rests_on: all that the numbers depend on. What another left in the workdir, or a run that has
      come to its end or failed, is removed.
  """
  begun = pathlib.Path(workdir, BEGUN)
  if not begun.is_file() or begun.read_text() != rests_on:
    shutil.rmtree(workdir, ignore_errors=True)
    begun.parent.mkdir(parents=True)
    begun.write_text(rests_on)
  with logged(pathlib.Path(workdir, LOG)):
    start = time.perf_counter()
    try:
      pipelines.pick(config.pipeline).run(config, workdir)
      found = measured.of(config, workdir) | {"curves": curves.of(workdir)}
    except FloatingPointError as error:  # that a setting does not hold is a result
      traceback.print_exc()
      found = measured.diverged(config, workdir, str(error))
    except Exception:
      begun.unlink()
      raise
    begun.unlink()
    return found | {"wall_s": round(time.perf_counter() - start, 1)}


@contextlib.contextmanager
def logged(path: pathlib.Path) -> Iterator[None]:
  """All that this process prints goes to a file: no live bar draws over that of another."""
  before = os.dup(1), os.dup(2)
  with path.open("a") as file:
    for descriptor in (1, 2):
      os.dup2(file.fileno(), descriptor)
    try:
      yield
    except Exception:
      traceback.print_exc()
      raise
    finally:
      for stream, descriptor, old in zip((sys.stdout, sys.stderr), (1, 2), before):
        stream.flush()
        os.dup2(old, descriptor)
        os.close(old)


def machine() -> dict[str, Any]:
  """What this process computes on, and with."""
  info = pathlib.Path("/proc/cpuinfo")
  names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
           if line.startswith("model name")] if info.is_file() else []
  return {"device": jax.devices()[0].device_kind, "jax": jax.__version__,
          "cpu": names[0] if names else platform.processor() or platform.machine()}


def _leave_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)  # it was killed: nobody waits for the result
