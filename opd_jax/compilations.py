"""What the compiler is asked for, and how often it compiled each function."""

import collections
from collections.abc import Iterator
import contextlib
import os
from typing import Any

import jax

# JAX reports it once a compilation, also of one found in the cache on disk.
EVENT = "/jax/core/compile/backend_compile_duration"

# libtpu may multiply the parts of a gathered matrix one by one, as they arrive. What a long row
# makes of them is then read and written in HBM once a part, as often as there are chips: over twice
# the bytes of an update of 18,432 tokens among 16 chips (docs/compile_report.md). So never.
LIBTPU = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def for_tpus() -> None:
  """Tells libtpu, before JAX loads it; what the user tells it comes later, and wins."""
  os.environ["LIBTPU_INIT_ARGS"] = f"{LIBTPU} {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip()


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
  """Yields a live count of this process's compilations by name of the function.

  With static shapes it should be once or a handful of times.
  """
  counts = collections.Counter()

  def listen(event: str, duration: float, fun_name: str = "", **_: Any) -> None:
    if event == EVENT:
      counts[fun_name.removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
