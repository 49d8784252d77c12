"""A process that holds its memory is the same process, and does hold it."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest

from opd_jax import host_memory

SCRIPT = """
import os, sys
from opd_jax import host_memory
host_memory.ensure()
kilobytes = lambda what: next(line.split()[1] for line in open("/proc/self/smaps_rollup")
                              if line.startswith(what))
block = b"x" * (256 << 20)
huge = kilobytes("AnonHugePages")
del block
print(os.getppid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"], huge, kilobytes("Anonymous"))
"""


def run(**more: str) -> list[str]:
  env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", SCRIPT, "a b", "--c"], env=env | more, check=True,
                        capture_output=True, text=True)
  return done.stdout.rsplit(maxsplit=3)


class HostMemoryTest(absltest.TestCase):

  def test_same_process_same_arguments_memory_in_huge_pages_and_kept(self):
    same, tunables, huge, kept = run()
    self.assertEqual(same, f"{os.getpid()} ['a b', '--c']")
    self.assertEqual(tunables, host_memory.TUNABLES)
    # Where the kernel has them at all:
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if switch.is_file() and "[never]" not in switch.read_text():
      self.assertGreater(int(huge), 200 << 10)
    self.assertGreater(int(kept), 200 << 10)

  def test_an_accelerators_host_gives_memory_back(self):
    code = "from opd_jax import host_memory; print(repr(host_memory.wanted()))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "tpu"},
                          check=True, capture_output=True, text=True)
    self.assertEqual(done.stdout, "''\n")

  def test_a_users_own_setting_stays(self):
    self.assertEqual(run(GLIBC_TUNABLES="glibc.malloc.check=0")[1], "glibc.malloc.check=0")


if __name__ == "__main__":
  absltest.main()
