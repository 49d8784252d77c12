"""Huge pages for a process that computes on CPUs.

XLA's CPU backend asks malloc for its buffers anew at every call, and glibc hands buffers of that
size back to the kernel when they are freed: each step touches its gigabytes for the first time, in
pages of 4 KiB. With pages of 2 MiB a training step is up to twice as fast (tests/bench/README.md).
"""

import os
import sys

TUNABLE = "glibc.malloc.hugetlb=1"  # since glibc 2.35; others pass it over


def ensure() -> None:
  """Starts the process anew, with huge pages, unless GLIBC_TUNABLES is set: malloc reads it once."""
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = TUNABLE
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
