"""The other end of `peers.start`. Standard library only: every environment runs it.

Import it before anything else: from then on stdout is for the answers, and what libraries print
goes to stderr. By hand, in an environment that peers.sh has made:

    (cat load.json; echo go; echo go) | /tmp/opd_jax_peers/trl/bin/python trl_distill.py
"""

from collections.abc import Callable
import json
import os
import sys
from typing import Any

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def take_turns(build: Callable[[dict[str, Any]], Callable[[], int]]) -> None:
  """Reads a load, answers `ready`, then each line `go` with the tokens of one turn.

  Args:
    build: of what does a turn and returns its tokens, from the load; one turn warms it up.
  """
  turn = build(json.loads(sys.stdin.readline()))
  turn()
  print("ready", file=answers)
  for _ in sys.stdin:
    print(turn(), file=answers)
