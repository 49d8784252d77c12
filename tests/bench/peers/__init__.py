"""Contestants that need an environment of their own, which tests/bench/peers.sh makes.

Each is a program run by that environment's python, in a process that waits on a pipe while others
have their turn.
"""

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ENVIRONMENTS = pathlib.Path(os.environ.get("TMPDIR") or "/tmp", "opd_jax_peers")
PROGRAMS = {"tunix": "tunix_sampler.py", "trl": "trl_distill.py"}


def is_there(peer: str) -> bool:
  """Whether the environment has been made; says on stderr how to make it if not."""
  there = (ENVIRONMENTS / peer / "installed").exists()
  if not there:
    print(f"{peer} is left out; to have it: bash tests/bench/peers.sh {peer}", file=sys.stderr)
  return there


def start(peer: str, load: dict[str, Any]) -> Callable[[], int]:
  """Starts a peer and waits until it has built and compiled everything.

  It ends when its input does: when what this returns is dropped, or with this process.

  Args:
    load: what its program, see there, asks for; sent as JSON.
  Returns: a contestant for `turns.rates`: one turn, and the tokens that it has made.
  Raises: RuntimeError if the peer ends; what it had to say is on stderr.
  """
  program = pathlib.Path(__file__).with_name(PROGRAMS[peer])
  process = subprocess.Popen([ENVIRONMENTS / peer / "bin/python", program], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(line: str) -> str:
    print(line, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
      raise RuntimeError(f"{program} ended with exit status {process.wait()}")
    return answer
  ask(json.dumps(load))
  return lambda: int(ask("go"))
