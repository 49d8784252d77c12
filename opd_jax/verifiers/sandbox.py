"""Runs Python programs that nobody has read, where they can do no harm.

A program gets a process of its own in fresh namespaces (see jail.py): no network, no file of
the user, no environment, no other process in sight; it cannot start one, and when its time is
up the kernel ends everything in there. What it leaves behind is an exit status and some text.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

from opd_jax.verifiers.verdict import NoVerdict

JAIL = pathlib.Path(__file__).with_name("jail.py")
# A bare interpreter: no site-packages. Hash values of text are the same in every run, or a
# program that prints a set would be right today and wrong tomorrow.
COMMAND = (os.path.realpath(sys.executable), "-sSP", str(JAIL))
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
# Time to set up and clear away, beyond the program's own; a machine may be busy.
SLACK_S = 60.0


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one run.

  cpu_s is processor time, for each input: unlike the clock's, it does not depend on what else
  the machine does. wall_s is the clock's, against programs that wait: for the first input, and
  cpu_s more for each other one, so that what keeps all of those limits is not ended by this.
  memory_bytes is address space. output_bytes is what may be written to standard output, for all
  inputs, and the size of any file. tasks counts threads, and the jail's own three processes.
  """

  cpu_s: int = 10
  wall_s: float = 60.0
  memory_bytes: int = 1 << 30
  output_bytes: int = 16 << 20
  tasks: int = 32


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a program ended: why it failed, in words ("" if it did not), and what it wrote."""

  failure: str
  stdout: str


def run(source: str, stdins: Sequence[str], limits: Limits, isolated: bool = True) -> list[Ended]:
  """Runs a program once for each standard input, up to and including the first failure.

  Args:
    source: Python, run as the main module.
    stdins: what each run reads.
    isolated: False only where `missing` says that there is no isolation and the user accepts
      that: then limits, an empty environment and what filter of system calls can be had remain.
  Returns: one result for each run that was made.
  Raises: NoVerdict if the sandbox itself failed, whatever the program is.
  """
  wall_s = limits.wall_s + (len(stdins) - 1) * limits.cpu_s
  job = dict(dataclasses.asdict(limits), wall_s=wall_s, source=source, stdins=list(stdins),
             isolated=isolated)
  try:
    jail = subprocess.run([*COMMAND, str(os.getpid())], input=json.dumps(job).encode(),
                          capture_output=True, env=ENVIRONMENT, cwd="/", start_new_session=True,
                          timeout=wall_s + SLACK_S, check=False)
  except subprocess.TimeoutExpired as error:
    raise NoVerdict("the sandbox did not keep its time limit") from error
  except OSError as error:  # no process can be started, or no memory is left
    raise NoVerdict(f"the sandbox could not be started: {error}") from error
  try:
    report = json.loads(jail.stdout)
  except ValueError as error:
    raise NoVerdict(f"the sandbox failed: {jail.stderr.decode(errors='replace')[-500:]}"
                    ) from error
  if "missing" in report:
    raise NoVerdict(f"the sandbox needs what this machine refuses: {report['missing']}")
  results, left = [], limits.output_bytes
  for status, stdout, stderr in report["ended"]:
    left -= len(stdout)
    results.append(Ended(_failure(status, stderr, left, wall_s, limits), stdout))
  return results


def _failure(status: int | None, stderr: str, left: int, wall_s: float, limits: Limits) -> str:
  if status is None:
    return f"took longer than {wall_s:g} s"
  if left < 0 or (status == 1 and "OSError: [Errno 27]" in stderr):  # EFBIG
    return f"wrote more than {limits.output_bytes} bytes"
  if status == -signal.SIGXCPU:
    return f"took longer than {limits.cpu_s} s of processor time"
  if status < 0:
    names = {-x.value: x.name for x in signal.Signals}
    return f"was ended by signal {names.get(status, -status)}"
  last = stderr.strip().rpartition("\n")[2][:200]
  if status == 1 and last:
    return f"stopped with {last}"
  return f"exited with status {status}" if status else ""


# Tries everything that must not work, and prints what does.
TRIAL = """
import os, socket, sys, threading
def works(attempt):
  try:
    return attempt() is not False
  except BaseException:
    return False
def threads():
  gate = threading.Event()
  try:
    for _ in range(64):
      threading.Thread(target=gate.wait, daemon=True).start()
  finally:
    gate.set()
attempts = {
  "other processes are visible": lambda: os.getppid() != 1 or os.getpid() > 99,
  "the home folder is readable": lambda: os.listdir(HOME) and not sys.prefix.startswith(HOME),
  "files can be written": lambda: open("/written", "w"),
  "the network is reachable": lambda: socket.socket(),
  "memory is not limited": lambda: bytearray(1 << 40),
  "processes can be started": lambda: os.fork() or os._exit(0),
  "threads are not limited": threads,
}
print("; ".join(name for name, attempt in attempts.items() if works(attempt)))
"""


@functools.cache
def missing() -> str:
  """What this machine lacks for isolation, in words; "" if nothing. Found out by trying."""
  source = f"HOME = {os.path.expanduser('~')!r}\n{TRIAL}"
  try:
    [ended] = run(source, [""], Limits(memory_bytes=1 << 28))
  except NoVerdict as error:
    return str(error)
  return ended.failure or ended.stdout.strip()


def is_isolated(allow_unsafe_code: bool) -> bool:
  """Whether programs will be isolated: always where it is possible.

  Raises: ValueError where it is not, and the user does not allow to go on without.
  """
  if not missing():
    return True
  if not allow_unsafe_code:
    raise ValueError(
        f"this verifier runs code that a model wrote, and here it cannot be isolated: {missing()}. "
        "Run elsewhere (as root or where users may create namespaces), or, on a machine that may "
        "be lost, set verifier.allow_unsafe_code=True")
  logging.warning("code that a model wrote will run without isolation: %s", missing())
  return False
