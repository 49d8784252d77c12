"""Contestants that take turns: what else the machine does falls on all of them.

Some are processes of their own (peers/), which wait meanwhile; the time of a turn is taken here for
all.
"""

from collections.abc import Callable, Mapping
import importlib.metadata
import time

import jax
import numpy as np

REPEATS = 5
PAUSE = 0.5  # seconds, for the threads of one library to stop waiting before another's turn

Contestant = tuple[str, str]  # who, and in which dtype


def versions(*packages: str) -> str:
  """The machine's device, and the versions of jax and of those packages that are installed."""
  found = {name: importlib.metadata.version(name) for name in ("jax", *packages)
           if any(importlib.metadata.distributions(name=name))}
  return ", ".join([f"{jax.devices()[0].device_kind} x {jax.device_count()}",
                    *(f"{name} {version}" for name, version in found.items())])


def rates(runs: Mapping[Contestant, Callable[[], int]]) -> dict[Contestant, list[float]]:
  """Tokens a second of each of `REPEATS` turns; the turn before them, which compiles, is not taken.

  Args:
    runs: what each does at its turn, returning how many tokens it has made.
  """
  found: dict[Contestant, list[float]] = {key: [] for key in runs}
  for turn in range(REPEATS + 1):
    first = turn % len(runs)
    for key in [*list(runs)[first:], *list(runs)[:first]]:
      time.sleep(PAUSE)
      start = time.perf_counter()
      tokens = runs[key]()
      if turn:
        found[key].append(tokens / (time.perf_counter() - start))
  return found


def header(what: str) -> str:
  return (f"\n| {what} | contestant | dtype | tokens/s | spread | ratio |\n"
          "|---|---|---|---|---|---|")


def lines(what: str, found: Mapping[Contestant, list[float]], peers: set[str]) -> str:
  """A line of the table for each contestant; ratios are to the fastest of the `peers`."""
  medians = {key: float(np.median(rates)) for key, rates in found.items()}
  base = max([rate for (who, _), rate in medians.items() if who in peers] or medians.values())
  return "\n".join(
      f"| {what} | {who} | {dtype} | {medians[who, dtype]:.4g} | {min(rates):.4g} to "
      f"{max(rates):.4g} | {medians[who, dtype] / base:.2f} |"
      for (who, dtype), rates in found.items())
