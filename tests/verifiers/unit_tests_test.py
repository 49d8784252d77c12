"""Code is right if it computes the right values, and nothing else that it does is."""

import dataclasses
import gzip
import json
import math
import os
import pathlib
import socket
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from opd_jax import verifiers
from opd_jax.data.builders import programs
from opd_jax.verifiers import calls, sandbox, unit_tests
from tests.verifiers import sandbox_test

SECOND = sandbox.Limits(cpu_s=1, memory_bytes=1 << 28, output_bytes=1 << 16)


def function(*cases, name="f", **changes):
  """An answer from pairs of arguments and output."""
  return json.dumps(dict(
      entry_point=name, before="", atol=0, compare="equal",
      inputs=[repr(list(arguments)) for arguments, _ in cases],
      outputs=[repr(output) for _, output in cases]) | changes)


def program(*cases):
  return json.dumps(dict(stdins=[x for x, _ in cases], stdouts=[y for _, y in cases]))


DOUBLE = function(((2,), 4), ((5,), 10))
ECHO = program(("3\n", "6\n"), ("4\n", "8\n"))

# Code, and what the verdict says. None of it may return True from f().
HOSTILE = dict(
    fork_bomb=("import os\nwhile True:\n  os.fork()", "PermissionError"),
    stubborn_fork_bomb=("import os\nwhile True:\n  try:\n    os.fork()\n  except OSError: pass",
                        "longer than"),
    fork_by_number=("import ctypes\nf = lambda: all(ctypes.CDLL(None).syscall(n) >= 0 "
                    "for n in (57, 58, 435))", "returned False"),
    thread_bomb=("import threading, time\ndef f():\n  for _ in range(10000):\n    "
                 "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
                 "  return True", "can't start new thread|MemoryError"),
    endless_print=("while True: print('x' * 1000)", "longer than"),
    kill_everyone=("import os\ndef f():\n  os.kill(-1, 9)\n  return True", "ProcessLookupError"),
    kill_parents=("import os\ndef f():\n  os.kill(os.getppid(), 9)\n  os.kill(1, 15)\n"
                  "  return os.getppid() != 1", "returned False"),
    kill_any=("import os\ndef f():\n  for pid in range(2, 70000):\n    try:\n"
              "      if pid != os.getpid(): os.kill(pid, 9); return True\n"
              "    except OSError: pass", "returned None"),
    stop_itself=("import os, signal\ndef f():\n  os.kill(os.getpid(), signal.SIGSTOP)",
                 "longer than"),
    read_work=("import os\nf = lambda: os.path.exists('/work') or os.path.exists('/proc/self')",
               "returned False"),
    read_home=("f = lambda: bool(open({home!r}).read())", "FileNotFoundError"),
    read_environment=("import os\nf = lambda: 'OPD_SECRET' in os.environ", "returned False"),
    open_socket=("import socket\ndef f():\n  socket.create_connection(('127.0.0.1', {port}))\n"
                 "  return True", "PermissionError|gaierror|OSError"),
    open_socket_by_number=("import ctypes\nf = lambda: max(ctypes.CDLL(None).socket(a, 1, 0) "
                           "for a in (1, 2, 10, 16, 38, 40)) >= 0", "returned False"),
    own_namespace=("import ctypes\nf = lambda: ctypes.CDLL(None).unshare(1 << 28) == 0",
                   "returned False"),
    ten_gigabytes=("def f():\n  return len(bytearray(10 << 30)) > 0", "MemoryError"),
    full_disk=("def f():\n  for i in range(99):\n    open(f'/tmp/{{i}}', 'wb').write(bytes(60000))"
               "\n  return True", "OSError"),
    big_file=("def f():\n  open('/tmp/x', 'wb').write(bytes(1 << 20))\n  return True", "OSError"),
    write_elsewhere=("def f():\n  open('/usr/lib/x', 'w')\n  return True", "OSError|Permission"),
    endless_sleep=("import time\ndef f():\n  time.sleep(1e9)", "longer than"),
    endless_import=("while True: pass", "longer than"),
    daemon=("import os, time\ndef f():\n  if os.fork() == 0:\n    os.setsid()\n"
            "    if os.fork() == 0: time.sleep(1e6)\n  return True", "PermissionError"),
    subprocess=("import subprocess, sys\ndef f():\n  subprocess.Popen([sys.executable, '-c', ''])\n"
                "  return True", "PermissionError|FileNotFoundError"),
    exec_another=("import os, sys\ndef f():\n  os.execv(sys.executable, ['x'])", "Error"),
    exit_first=("exit(0)", "SystemExit"),
    exit_in_call=("import sys\ndef f(): sys.exit(0)", "SystemExit"),
    exit_at_once=("import os\nos._exit(0)", "before it returned"),
    crash=("import ctypes\ndef f(): ctypes.string_at(0)", "SIGSEGV"),
    forged_lines=("import os\nfor fd in range(64):\n  try: os.write(fd, b'{{\"value\": 2}}\\n' * 9)"
                  "\n  except OSError: pass\nos._exit(0)", "returned 2, which is wrong"),
    forged_report=("import os, json\nfor fd in range(64):\n  try: os.write(fd, json.dumps("
                   "[0, 'passed', '']).encode() + b'\\n')\n  except OSError: pass\nos._exit(0)",
                   "without a result"),
    garbage=("import os\nos.write(3, b'\\xff[[[{{' * 99)\nos._exit(0)", "without a result"),
    deep_garbage=("import os\nos.write(3, b'{{\"value\": ' + b'[' * 60000 + b'\\n')\nos._exit(0)",
                  "without a result"),
    always_equal=("class A:\n  __eq__ = lambda *_: True\n  __repr__ = lambda _: 'True'\n"
                  "f = lambda: A()", "wrong"),
    patched=("import builtins, json, sys\nmain = sys.modules['__main__']\n"
             "main.encode = lambda value: {{'bool': 1}}\njson.dumps = lambda *_: 'passed'\n"
             "builtins.AssertionError = Exception\nf = lambda: 0", "without a result"),
    deep_recursion=("import sys\nsys.setrecursionlimit(10**9)\ndef f(x=0): return f(x + 1)",
                    "MemoryError|SIGSEGV|SIGABRT|Recursion|longer than"),
    deep_value=("def f():\n  x = []\n  for _ in range(10**5): x = [x]\n  return x",
                "RecursionError|SIGSEGV"),
    huge_errors=("import sys\nwhile True: sys.stderr.write('x' * 10000)",
                 "File too large|more than"),
    huge_value=("f = lambda: 'x' * 10**7", "wrong|without a result|more than"),
    long_number=("f = lambda: 10**5000", "type int that is too long to write, which is wrong"),
    memory_in_files=("import os\nf = lambda: bool(os.memfd_create('x'))", "PermissionError"),
    no_utf8=("f = lambda: chr(0xD83D)", "returned"),
)

RIGHT = {"f = lambda x: 2 * x", "```python\ndef f(x):\n  return x + x\n```",
         "class Solution:\n  def f(self, x: int) -> List[int]:\n    return x * 2",
         "Try\n```python\ndef f(x): return 1\n```\nno:\n```python\ndef f(x): return x << 1\n```\n"
         "It prints\n```\n4\n```", "def f(x):\n  print('debug')\n  return pow(x, 1, 100) * 2"}


class HostileTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    sandbox_test.isolated(self)
    self.addCleanup(lambda: self.assertEmpty(sandbox_test.jails()))

  @parameterized.named_parameters((name, name, *pair) for name, pair in HOSTILE.items())
  def test_earns_nothing(self, name, code, reason):
    secret = self.create_tempfile(content="x").full_path
    with socket.create_server(("127.0.0.1", 0)) as server:
      code = code.format(home=secret, port=server.getsockname()[1])
      self.enterContext(mock.patch.dict(os.environ, {"OPD_SECRET": "x"}))
      waits = name in ("endless_sleep", "stop_itself")
      limits = dataclasses.replace(SECOND, wall_s=1.0) if waits else SECOND
      verdict = unit_tests.verify(code, function(((), True)), limits)
    self.assertEqual(verdict.reward, 0.0)
    self.assertRegex(verdict.feedback, reason)
    self.assertLess(len(verdict.feedback), 500)
    self.assertNotIn("\n", verdict.feedback)

  @parameterized.parameters("fork_bomb", "endless_print", "exit_at_once", "huge_errors",
                            "endless_sleep", "kill_everyone", "crash")
  def test_earns_nothing_as_a_program_either(self, name):
    code = HOSTILE[name][0] + ("\nf()" if "f()" in HOSTILE[name][0] else "")
    verdict = unit_tests.verify(code, ECHO, dataclasses.replace(SECOND, wall_s=4.0))
    self.assertEqual(verdict.reward, 0.0)
    self.assertStartsWith(verdict.feedback, "Test 1 of 2 failed: for the input '3\\n' the program ")

  def test_the_others_are_verified_all_the_same(self):
    home = self.enterContext(tempfile.NamedTemporaryFile(dir=pathlib.Path.home()))
    home.write(b"x")
    home.flush()
    server = self.enterContext(socket.create_server(("127.0.0.1", 0)))
    hostile = [HOSTILE[name] for name in (
        "fork_bomb", "endless_print", "kill_everyone", "read_home", "open_socket", "ten_gigabytes",
        "endless_sleep", "exit_at_once")]
    texts = [code.format(home=home.name, port=server.getsockname()[1]) for code, _ in hostile]
    with verifiers.make("unit_tests", workers=2, timeout_s=1.0) as verify:
      workers = [w.process.pid for w in verify._workers]
      verdicts = verify([*texts, "f = lambda x: 2 * x"], [function(((), True))] * 8 + [DOUBLE])
      self.assertEqual([v.reward for v in verdicts], [0.0] * 8 + [1.0])
      for (_, reason), verdict in zip(hostile, verdicts):
        self.assertRegex(verdict.feedback, reason)
      self.assertEqual([w.process.pid for w in verify._workers], workers)  # nobody was replaced


class UnitTestsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    sandbox_test.isolated(self)

  @parameterized.parameters(*sorted(RIGHT))
  def test_right_functions_pass(self, text):
    verdict = unit_tests.verify(text, DOUBLE)
    self.assertEqual((verdict.reward, verdict.feedback), (1.0, "The code passes all tests."))

  @parameterized.parameters(
      ("f = lambda x: 4", "Test 2 of 2 failed: f(5) returned 4, which is wrong."),
      ("f = lambda x: x / (x - 5)", "Test 1 of 2 failed: f(2) returned -0.6666666666666666, which"),
      ("f = lambda x: 2 * x / (x != 5)",
       "Test 2 of 2 failed: f(5) stopped with ZeroDivisionError: division by zero."),
      ("def g(x): return 2 * x", "The code does not define f."),
      ("```python\ndef f(x) return x\n```", "The code cannot be compiled: expected ':' in line 1."),
      ("", "The response holds no code."), ("```python\n```", "The response holds no code."),
      ("f = 3", "Test 1 of 2 failed: f(2) stopped with TypeError: 'int' object is not callable."),
      ("\x00", "The code cannot be compiled"), ("f = " + "(" * 999, "The code cannot be compiled"),
      ("f = lambda x: 2 * x\n\ud83d", "The code cannot be compiled"),
  )
  def test_what_is_wrong_is_said(self, text, feedback):
    verdict = unit_tests.verify(text, DOUBLE)
    self.assertEqual(verdict.reward, 0.0)
    self.assertStartsWith(verdict.feedback, feedback)

  def test_programs_are_compared_by_lines_and_numbers(self):
    right = ("print(2 * int(input()))", "print(f'{2 * int(input())}.0 \\n\\n')",
             "import sys\nfor line in sys.stdin: print(' ', int(line) * 2)")
    wrong = ("print(6)", "print(2 * int(input()), 1)", "print(1)", "", "input()\nprint('six')")
    self.assertEqual([unit_tests.verify(x, ECHO).reward for x in right], [1.0] * 3)
    self.assertEqual([unit_tests.verify(x, ECHO).reward for x in wrong], [0.0] * 5)
    self.assertEqual(unit_tests.verify("print(6)", ECHO).feedback,
                     r"Test 2 of 2 failed: for the input '4\n' the program printed '6\n', which is "
                     "wrong.")

  @parameterized.parameters("", "1", "[]", "{}", "null", '{"entry_point": "f"}', '{"stdins": []}',
                            '{"stdins": [1], "stdouts": ["1"]}')
  def test_unreadable_tests_are_nobodys_success(self, answer):
    self.assertEqual(unit_tests.verify("f = print", answer).feedback,
                     "The tests of this question cannot be read.")

  @parameterized.parameters(
      (1, 1.0, True), (1.0 + 1e-9, 1.0, True), (1.01, 1.0, False), ([1.0, 2], [1.0, 2], True),
      ([(0.1 + 0.2,)], [(0.3,)], True), ((1, 2), [1, 2], False), ([1, 2], (1, 2), False),
      ({1, 2}, {2, 1}, True), ({"a": 1}, {"a": 1}, True), (math.nan, math.nan, True),
      (math.inf, math.inf, True), (-math.inf, math.inf, False), ("1", 1, False), (None, 0, False),
      (10**30, 10**30 + 1, False), ([1], [1, 2], False), (b"a", b"a", True), (1j, 1j, True),
  )
  def test_values_survive_the_sandbox_and_are_compared_as_values(self, found, want, right):
    answer = function(((), None), solution=f"def f(): return {want!r}", before="from math import *")
    answer = json.dumps({k: v for k, v in json.loads(answer).items() if k != "outputs"})
    text = f"def f(): return {found!r}"
    self.assertEqual(unit_tests.verify(text, answer).reward, float(right))

  def test_the_test_that_took_too_long_is_named(self):
    code = "import time\nf = lambda x: 2 * x if x == 2 else time.sleep(1e5)"
    limits = dataclasses.replace(SECOND, wall_s=5.0)
    self.assertEqual(unit_tests.verify(code, DOUBLE, limits).feedback,
                     "Test 2 of 2 failed: f(5) took longer than 5 s.")

  def test_an_input_that_is_too_much_for_the_right_solution_is_no_test(self):
    answer = json.loads(function(((2,), 0), ((1 << 30,), 0), ((3,), 0)))
    del answer["outputs"]
    answer = json.dumps(dict(answer, solution="f = lambda n: len(bytes(n))"))
    with self.assertLogs(level="WARNING") as logs:
      verdict = unit_tests.verify("f = lambda n: n", answer, SECOND)
    self.assertEqual(verdict.reward, 1.0)
    self.assertIn("stopped with MemoryError: at test 2 of 3, which ends the tests", logs.output[0])
    self.assertEqual(unit_tests.verify("f = lambda n: 1", answer, SECOND).feedback,
                     "Test 1 of 1 failed: f(2) returned 1, which is wrong.")

  def test_values_come_back_as_they_went(self):
    for value in (None, True, 1, -(1 << 80), 0.1, "é\ud83d", [1, [2]], (1, (2,)), {1},
                  frozenset({1}), {1: "a", (1, 2): [3]}, b"\x00", 1 + 2j, math.inf, {}, [], ()):
      back = calls.decode(json.loads(json.dumps(calls.encode(value))))
      self.assertEqual((back, type(back)), (value, type(value)))

  def test_numbers_that_are_none_are_wrong(self):
    for printed in ("nan", "sNaN", "-sNaN1", "1e999999999", "x"):
      verdict = unit_tests.verify(f"print({printed!r})", program(("", "1")), SECOND)
      self.assertEqual(verdict.reward, 0.0)
      self.assertIn("which is wrong", verdict.feedback)
    self.assertEqual(unit_tests.verify("print('1.0')", program(("", "1")), SECOND).reward, 1.0)

  def test_a_question_without_a_right_solution_teaches_nothing(self):
    answer = json.loads(function(((2,), 0), solution="def f(x): raise OSError"))
    del answer["outputs"]
    with self.assertLogs(level="WARNING") as logs:
      verdict = unit_tests.verify("f = lambda n: n", json.dumps(answer), SECOND)
    self.assertEqual(verdict.reward, 0.0)
    self.assertIn("The tests of this question cannot be run: the right solution of f stopped with",
                  verdict.feedback)
    self.assertIn("cannot be asked", logs.output[0])

  def test_other_ways_to_compare(self):
    for compare, out, want, right in (
        ("set", [2, 1, 1], [1, 2], True), ("set", [1], [1, 2], False), ("set", 1, [1], False),
        ("truth", "x", True, True), ("truth", None, False, True), ("truth", 0, True, False)):
      answer = function(((), want), compare=compare)
      self.assertEqual(unit_tests.verify(f"f = lambda: {out!r}", answer).reward, float(right))
    answer = function((([-6, 11, -6, 1],), 1.0), compare="zero")
    for zero, right in ((1, True), (2.0, True), (3, True), (4, False), ("1", False)):
      self.assertEqual(unit_tests.verify(f"f = lambda xs: {zero!r}", answer).reward, float(right))


@absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
class RealExercisesTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    sandbox_test.isolated(self)

  def rows(self, name, stride):
    """Every so many records, with the rows made of them."""
    path = pathlib.Path(os.environ["OPD_JAX_DATA"], name)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
      records = [json.loads(line) for line in lines]
    made = list(programs.splits(test=str(path))["test"]())
    self.assertLen(made, len(records))
    return list(zip(records, made))[::stride]

  def passes(self, record, source):
    """Whether the data set's own assertions pass, run in this process: the data is trusted."""
    space = {}
    try:
      exec(source, space)
      if "test" in record:
        exec(record["test"], space)
        space["check"](space[record["entry_point"]])
      else:
        exec(record["assertion"], space)
      return True
    except Exception:
      return False

  def check(self, name, stride):
    verdicts = 0
    for record, row in self.rows(name, stride):
      solution = json.loads(row["answer"])["solution"]
      wrong = f"{solution}\n\ndef {record['entry_point']}(*_): return None"
      for source, right in ((solution, True), (wrong, False)):
        self.assertEqual(self.passes(record, source), right, record["task_id"])
        verdict = unit_tests.verify(f"```python\n{source}\n```", row["answer"])
        self.assertEqual(verdict.reward, float(right), (record["task_id"], verdict.feedback))
        verdicts += 1
    return verdicts

  def test_humaneval_plus_agrees_with_its_own_assertions(self):
    self.assertGreaterEqual(self.check("humaneval_plus/test.jsonl.gz", stride=14), 24)

  def test_mbpp_plus_agrees_with_its_own_assertions(self):
    self.assertGreaterEqual(self.check("mbpp_plus/half.jsonl.gz", stride=16), 24)


if __name__ == "__main__":
  absltest.main()
