"""Programs in the sandbox reach nothing, keep their limits, and leave no process behind."""

import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest, parameterized
import psutil

from opd_jax.verifiers import jail, sandbox

QUICK = sandbox.Limits(cpu_s=2, memory_bytes=1 << 28, output_bytes=1 << 16)

# Starts a run that would last for ever.
RUN = """
from opd_jax.verifiers import sandbox
sandbox.run("import time; time.sleep(1e6)", [""], sandbox.Limits(wall_s=1e5))
"""
REPORT = "from opd_jax.verifiers import sandbox; print(repr(sandbox.missing()))"


def jails() -> list[int]:
  """Processes of sandboxes that this process, or one that is no more, has started.

  Whoever their parents are: they are forks of one interpreter, whose command ends with the pid of
  its starter. Other tests may have theirs meanwhile.
  """
  def ours(starter: int) -> bool:
    try:
      family = [starter, *(x.pid for x in psutil.Process(starter).parents())]
    except psutil.NoSuchProcess:
      return True
    return os.getpid() in family

  commands = {x.pid: x.info["cmdline"] or [] for x in psutil.process_iter(["cmdline"])}
  return [pid for pid, command in commands.items()
          if str(sandbox.JAIL) in command and ours(int(command[-1]))]


def isolated(test_case) -> None:
  """Nothing hostile is to run where it could do harm."""
  if sandbox.missing():
    test_case.skipTest(f"no isolation here: {sandbox.missing()}")


class SandboxTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    isolated(self)
    self.addCleanup(lambda: self.assertEmpty(jails()))

  def only(self, source, stdin="", limits=QUICK):
    [ended] = sandbox.run(source, [stdin], limits)
    return ended

  @parameterized.parameters(
      ("print(input()[::-1])", "abc\n", "cba\n"),
      ("import sys; print(sys.stdin.read())", "é", "é\n"),
      ("if __name__ == '__main__': print(2)", "", "2\n"), ("print(1); exit()", "", "1\n"),
      ("import atexit; atexit.register(lambda: print(3))", "", "3\n"),
      ("import threading; threading.Thread(target=lambda: print(4)).start()", "", "4\n"),
      ("import sys; sys.stdout.write('5')", "", "5"), ("print(open(0).read())", "6", "6\n"),
      ("open('x', 'w').write('7'); print(open('x').read())", "", "7\n"),
      ("from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\nprint(A(1))", "",
       "A(x=1)\n"),
      ("import numpy", "", None), ("import jax", "", None), ("import opd_jax", "", None),
  )
  def test_a_program_runs_as_python_runs_it_with_the_standard_library_alone(self, source, stdin,
                                                                            stdout):
    ended = self.only(source, stdin)
    if stdout is None:
      self.assertIn("ModuleNotFoundError", ended.failure)
    else:
      self.assertEqual((ended.failure, ended.stdout), ("", stdout))

  @parameterized.parameters(
      ("1 / 0", "stopped with ZeroDivisionError: division by zero"),
      ("import sys; sys.exit(3)", "exited with status 3"),
      ("import os; os.abort()", "was ended by signal SIGABRT"),
      ("print('x' * 70000)", "wrote more than 65536 bytes"),
      ("bytearray(1 << 29)", "stopped with MemoryError"),
      ("x = 1 +", "stopped with SyntaxError: invalid syntax"),
  )
  def test_failures_are_named(self, source, failure):
    self.assertEqual(self.only(source).failure, failure)

  def test_runs_share_one_time_limit_and_end_at_the_first_failure(self):
    source = "import time; x = float(input()); time.sleep(x); print(1 / x)"
    results = sandbox.run(source, ["0.1", "0.2", "1e5", "0.1"], sandbox.Limits(wall_s=1.0, cpu_s=1))
    # The first input's second, and one for each other.
    self.assertEqual([r.failure for r in results], ["", "", "took longer than 4 s"])
    results = sandbox.run(source, ["0.1", "0", "0.1"], sandbox.Limits())
    self.assertEqual([r.stdout for r in results], ["10.0\n", ""])
    self.assertIn("ZeroDivisionError", results[1].failure)

  def test_nothing_of_the_parent_is_there(self):
    secret = pathlib.Path(self.create_tempdir().full_path, "secret")
    secret.write_text("x")
    source = f"""
import os, sys
print(sorted(os.environ), os.listdir('/tmp'), os.path.exists({str(secret)!r}), os.getcwd())
for folder in ('/proc', '/sys', '/work', '/etc/passwd', '/home', '/mnt', {os.getcwd()!r}):
  print(os.path.exists(folder))
"""
    with mock.patch.dict(os.environ, {"OPD_SECRET": "x"}):
      first, *others = self.only(source).stdout.splitlines()
    self.assertRegex(first, r"^\['LC_CTYPE', 'PYTHONHASHSEED'\] \[\] False /tmp$")
    self.assertEqual(set(others), {"False"})

  def test_sets_of_text_have_one_order(self):
    source = "print(*{str(i) for i in range(20)})"
    self.assertEqual(self.only(source), self.only(source))

  def test_it_dies_with_whoever_asked(self):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", RUN], env=environment)
    self.addCleanup(run.kill)
    end = time.monotonic() + 120.0
    while len(jails()) < 3 and time.monotonic() < end:
      time.sleep(0.05)
    self.assertLen(jails(), 3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    while jails() and time.monotonic() < end:
      time.sleep(0.05)
    self.assertEmpty(jails())

  def test_users_without_rights_are_isolated_too(self):
    # As in a container: this user is root no more, and keeps only what any user may do.
    self.assertEqual(self.elsewhere("unshare", "--user", "--map-user=1000", "--map-group=1000"),
                     "''")

  def test_a_machine_that_refuses_namespaces_is_found_out(self):
    refuse = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    found = self.elsewhere("unshare", "--user", "--map-root-user", "sh", "-c", refuse, "sh")
    self.assertRegex(found, "needs what this machine refuses: a user namespace: .Errno 28")

  def elsewhere(self, *prefix):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*prefix, sys.executable, "-c", REPORT], env=environment, check=True,
                          capture_output=True, text=True)
    return done.stdout.strip()


class WithoutIsolationTest(absltest.TestCase):

  def test_another_machine_is_an_error_that_unsafe_code_may_pass(self):  # see jail.become
    with mock.patch.object(platform, "machine", lambda: "riscv64"):
      with self.assertRaisesRegex(OSError, "system calls are unknown on riscv64"):
        jail.refuse_system_calls()

  def test_it_is_refused_unless_allowed(self):
    with mock.patch.object(sandbox, "missing", lambda: "no such namespaces"):
      with self.assertRaisesRegex(ValueError, "cannot be isolated: no such namespaces. Run else"):
        sandbox.is_isolated(allow_unsafe_code=False)
      with self.assertLogs(level="WARNING"):
        self.assertFalse(sandbox.is_isolated(allow_unsafe_code=True))

  def test_limits_and_an_empty_environment_remain(self):
    def failure(source, wall_s=600.0):
      limits = sandbox.Limits(cpu_s=1, wall_s=wall_s, memory_bytes=1 << 28)
      return sandbox.run(source, [""], limits, isolated=False)[0].failure
    self.assertEqual(failure("import os; assert 'HOME' not in os.environ"), "")
    self.assertEqual(failure("while True: pass"), "took longer than 1 s of processor time")
    self.assertEqual(failure("import time; time.sleep(1e5)", 1.0), "took longer than 1 s")
    self.assertEqual(failure("bytearray(1 << 29)"), "stopped with MemoryError")
    self.assertEmpty(jails())


if __name__ == "__main__":
  absltest.main()
