"""SIGTERM asks a run to stop: it breaks off its rollout or finishes its update, saves, exits 0.

Of several processes one that is asked stops all of them, at the same place.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal

from opd_jax import distributed


@contextlib.contextmanager
def guard() -> Iterator[Callable[[], bool]]:
  """Yields `stop_requested()`, which all processes must call together.

  The previous handler returns at the end.
  """
  asked, agreed = [], []
  before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

  def stop_requested() -> bool:
    if not agreed and distributed.anyone(bool(asked)):
      agreed.append(True)
    return bool(agreed)

  try:
    yield stop_requested
  finally:
    signal.signal(signal.SIGTERM, before)
