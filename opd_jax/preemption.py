"""SIGTERM asks a run to stop: it breaks off its rollout or finishes its update, saves, exits 0."""

from collections.abc import Callable, Iterator
import contextlib
import signal


@contextlib.contextmanager
def guard() -> Iterator[Callable[[], bool]]:
  """Yields `stop_requested()`; the previous handler returns at the end."""
  asked = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
  try:
    yield lambda: bool(asked)
  finally:
    signal.signal(signal.SIGTERM, before)
