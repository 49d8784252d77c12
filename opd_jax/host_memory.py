"""How a process that computes on CPUs holds its memory: in huge pages, and without giving it back.

XLA's CPU backend asks malloc for its buffers anew at every call, and glibc hands buffers of that
size back to the kernel when they are freed. Each step then touches its gigabytes for the first
time, in pages of 4 KiB; a virtual machine may even have returned them to its host meanwhile. What
that costs is in tests/bench/README.md: up to half of a training step.
"""

import os
import sys

TUNABLES = ":".join((
    "glibc.malloc.hugetlb=1",                   # pages of 2 MiB, since glibc 2.35
    "glibc.malloc.mmap_max=0",                  # large buffers come from the heap too,
    "glibc.malloc.trim_threshold=%d" % 2**40,   # which never shrinks,
    "glibc.malloc.arena_max=1",                 # and is one: others cannot grow large
))


def ensure() -> None:
  """Starts the process anew with `TUNABLES`, unless it has some: malloc reads them only then."""
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  print(TUNABLES)
