"""How often each function was compiled: with static shapes, once or a handful of times."""

import collections
from collections.abc import Iterator
import contextlib
from typing import Any

import jax

# JAX reports it once a compilation, also of one found in the cache on disk.
EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
  """Yields a live count of this process's compilations by name of the function."""
  counts = collections.Counter()

  def listen(event: str, duration: float, fun_name: str = "", **_: Any) -> None:
    if event == EVENT:
      counts[fun_name.removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
