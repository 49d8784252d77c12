"""Several processes, one run: who they are, and what they tell each other.

All run the same program on the same numbers; each computes on its own devices. Work on text is
shared out: a process does its part, and all get all results. What a run leaves behind, the first
process writes, to a workdir that all see.

The launcher sets OPD_JAX_DISTRIBUTED, and nothing else starts several processes:

    (not set)            one process
    auto                 JAX asks its surroundings: TPU pods, GKE, Slurm, Open MPI
    HOST:PORT,COUNT,I    this is process I of COUNT, and process 0 listens at HOST:PORT
"""

from collections.abc import Callable, Sequence
import os
import pathlib
import pickle
import sys
from typing import Any, NoReturn
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np

VARIABLE = "OPD_JAX_DISTRIBUTED"

# A process that says nothing for so long is dead, and the others end: JAX's service sees to it.
HEARTBEAT_S = 30
# Bytes that the first process tells the others at a time: they pass through device memory.
PIECE = 2**24
# How long the first and the last process may be apart at the start (a pod's hosts boot one by one).
START_S = 600


def initialize() -> None:
  """Joins the other processes, if the environment names any. Before any computation.

  Raises: ValueError if the variable cannot be read, or the others do not come within `START_S`.
  """
  asked = os.environ.get(VARIABLE, "")
  if not asked:
    return
  # Its handler of SIGTERM would take the place of preemption.py's.
  jax.config.update("jax_enable_preemption_service", False)
  settings: dict[str, Any] = {}
  if asked != "auto":
    address, count, index = _parse(asked)
    settings = dict(coordinator_address=address, num_processes=count, process_id=index,
                    cluster_detection_method="deactivate")
  try:
    jax.distributed.initialize(initialization_timeout=START_S, shutdown_timeout_seconds=START_S,
                               heartbeat_timeout_seconds=HEARTBEAT_S, **settings)
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"{VARIABLE} is {asked!r}, but the processes did not find each other: "
                     f"{error}") from error


def _parse(asked: str) -> tuple[str, int, int]:
  try:
    address, count, index = asked.split(",")
    host, port = address.rsplit(":", 1)
    found = f"{host}:{int(port)}", int(count), int(index)
    if host and 0 <= found[2] < found[1]:
      return found
  except ValueError:
    pass
  raise ValueError(f"{VARIABLE} is {asked!r}; it must be 'auto', or HOST:PORT,COUNT,I with I from "
                   "0 to COUNT - 1, for example 10.0.0.2:8476,4,0")


def count() -> int:
  """How many processes there are."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Which of them this is, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def who() -> str:
  """What a message begins with, where several may say something."""
  return f"process {index()} of {count()}: " if count() > 1 else ""


def is_first() -> bool:
  """Whether this is the process that writes files and talks to the user."""
  return index() == 0


def share(items: Sequence[Any], who: int | None = None) -> Sequence[Any]:
  """The part of `items` that a process (`who`; this one by default) works on.

  Parts are slices, nearly equal and in the order of the processes.
  """
  who, total = index() if who is None else who, count()
  return items[len(items) * who // total:len(items) * (who + 1) // total]


def each(function: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]) -> list[Any]:
  """function(items), every process working on its `share`. All must call this together.

  Args:
    function: from items to as many results, which can be pickled; of each item alone.
    items: the same in all processes.
  Returns: the results of all, in the order of `items`.
  Raises: in all processes, what it raised in one of them.
  """
  if count() == 1:
    return list(function(items))
  parts = _agreed(*_tried(lambda: list(function(share(items)))))
  return [result for part in parts for result in part]


def of_first(function: Callable[[], Any]) -> Any:
  """function() of the first process, for what all must know alike: what a file holds.

  All must call this together. Raises: in all processes, what it raised.
  """
  if count() == 1:
    return function()
  value, error = _told(_tried(function) if is_first() else None)
  if error is not None:
    raise error
  return value


def _tried(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
  try:
    return function(), None
  except (ValueError, OSError) as error:  # what a user can get wrong; a process with another ends
    return None, error


def _agreed(value: Any, error: Exception | None) -> list[Any]:
  """The values of all processes. Raises: in all of them, the first error that one has."""
  found = gather((value, error))
  for _, error in found:
    if error is not None:
      raise error
  return [value for value, _ in found]


def _told(value: Any) -> Any:
  """What the first process calls this with."""
  data = np.frombuffer(pickle.dumps(value) if is_first() else b"", np.uint8)
  pieces, rest = multihost_utils.broadcast_one_to_all(
      np.array(divmod(len(data), PIECE), np.int32)).tolist()
  found = []
  for start in range(0, pieces * PIECE + rest, PIECE):
    left = pieces * PIECE + rest - start
    room = np.zeros(PIECE if left >= PIECE else 1 << (left - 1).bit_length(), np.uint8)
    here = data[start:start + PIECE]
    room[:len(here)] = here
    found.append(multihost_utils.broadcast_one_to_all(room)[:left].tobytes())
  return pickle.loads(b"".join(found))


def gather(value: Any) -> list[Any]:
  """What each process calls this with, in their order. All must call this together.

  For little: all of it lies on every device at once.
  """
  if count() == 1:
    return [value]
  # Between the processes of one run a pickle is safe, and rows and verdicts are not all JSON.
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
  room = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)  # few shapes to compile
  room[:len(data)] = data
  found = multihost_utils.process_allgather(room)
  return [pickle.loads(part[:length].tobytes()) for part, length in zip(found, lengths)]


def anyone(flag: bool) -> bool:
  """Whether it is true in any process, so that all go the same way. All must call this together."""
  if count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_alike(what: str, value: str) -> None:
  """Refuses to go on if processes were started for different things. Raises: ValueError."""
  found = gather(value)
  if differ := [i for i, x in enumerate(found) if x != found[0]]:
    raise ValueError(f"the {what} of process {differ[0]} is not that of process 0; start all "
                     "processes with the same command")


def check_shared(workdir: str) -> None:
  """Refuses a workdir that is not the same folder for all. Raises: ValueError naming who lacks it.

  Checkpoints are written by all processes, everything else by the first and read by all.
  """
  if count() == 1:
    return
  mark = pathlib.Path(workdir, f".seen-by-all-{of_first(lambda: uuid.uuid4().hex)}")
  of_first(lambda: mark.touch())
  blind = [i for i, sees in enumerate(gather(mark.exists())) if not sees]
  of_first(lambda: mark.unlink())
  if blind:
    raise ValueError(f"process {blind[0]} of {count()} does not see what process 0 writes to "
                     f"{workdir}; choose a --workdir on a file system that all hosts mount")


def leave(code: int) -> NoReturn:
  """Ends this process after an error: at once if there are others, which then end too.

  An ordinary exit would wait for the others, and these wait for this one in the midst of a step.
  """
  if count() == 1:
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
