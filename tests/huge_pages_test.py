"""A process with huge pages is the same process, and does have them."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest

from opd_jax import huge_pages

SCRIPT = """
import os, sys
from opd_jax import huge_pages
huge_pages.ensure()
block = b"x" * (256 << 20)
size = next(line.split()[1] for line in open("/proc/self/smaps_rollup") if "AnonHuge" in line)
print(os.getppid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"], size)
"""


def run(**more: str) -> list[str]:
  env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  done = subprocess.run([sys.executable, "-c", SCRIPT, "a b", "--c"], env=env | more, check=True,
                        capture_output=True, text=True)
  return done.stdout.rsplit(maxsplit=2)


class HugePagesTest(absltest.TestCase):

  def test_same_process_same_arguments_huge_pages(self):
    same, tunable, kilobytes = run()
    self.assertEqual(same, f"{os.getpid()} ['a b', '--c']")
    self.assertEqual(tunable, huge_pages.TUNABLE)
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if switch.is_file() and "[never]" not in switch.read_text():
      self.assertGreater(int(kilobytes), 100 << 10)

  def test_a_users_own_setting_stays(self):
    self.assertEqual(run(GLIBC_TUNABLES="glibc.malloc.check=0")[1], "glibc.malloc.check=0")


if __name__ == "__main__":
  absltest.main()
