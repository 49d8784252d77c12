"""How a process that computes on CPUs holds its memory: in huge pages, and without giving it back.

XLA's CPU backend asks malloc for its buffers anew at every call, and glibc hands buffers of that
size back to the kernel when they are freed. Each step then touches its gigabytes for the first
time, in pages of 4 KiB; a virtual machine may even have returned them to its host meanwhile. What
that costs is in tests/bench/README.md: up to two fifths of a training step.
"""

import glob
import os
import sys

TUNABLES = ":".join((
    "glibc.malloc.hugetlb=1",                   # pages of 2 MiB, since glibc 2.35
    "glibc.malloc.mmap_max=0",                  # large buffers come from the heap too,
    "glibc.malloc.trim_threshold=%d" % 2**40,   # which never shrinks,
    "glibc.malloc.arena_max=1",                 # and is one: others cannot grow large
))


def wanted() -> str:
  """`TUNABLES`, or nothing where an accelerator computes."""
  platform = os.environ.get("JAX_PLATFORMS")
  devices = "/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*"
  elsewhere = platform != "cpu" if platform else any(map(glob.glob, devices))
  return "" if elsewhere else TUNABLES


def ensure() -> None:
  """Starts the process anew with what is `wanted`: malloc reads it then, and only then.

  A user's own GLIBC_TUNABLES stay.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and wanted():
    os.environ["GLIBC_TUNABLES"] = wanted()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  print(wanted())
