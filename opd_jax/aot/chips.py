"""The chips that a program can be compiled for, and what they can do at best."""

import re
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
  """Peak figures of one chip. None: not known, or no such thing."""

  memory: float | None    # bytes that a program may use
  flops: float | None     # bfloat16 products, FLOP/s
  hbm: float | None       # bytes/s from and to HBM
  links: float | None     # bytes/s sent to other chips, all links together


# Sources: "System architecture" of each chip in Google Cloud's TPU documentation, of the pages
# cloud.google.com/tpu/docs/v5e, /v5p and /v6e (as crawled: v5e 197 TFLOPs, 819 GB/s, 1600 Gbit/s;
# v6e 918, 1600, 3200; v5p 459, 2765, 4800), except for memory: that is what libtpu 0.0.42 says it
# has when a program needs more, less than the 16, 32 and 95 GB there, as the runtime keeps some.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 1600e9 / 8),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 4800e9 / 8),
    "v6e": Chip(31.25 * GIB, 918e12, 1600e9, 3200e9 / 8),
    "cpu": Chip(None, None, None, None),
}


def devices(topology: str) -> tuple[list[Any], Chip]:
  """The devices of a pod that need not be there, and what kind of chip they are.

  Args:
    topology: "KIND:SHAPE", such as "v5e:4x4" or "v5p:4x4x8", or "cpu:N", N of this machine's
      devices, which XLA_FLAGS=--xla_force_host_platform_device_count=N makes of its one.
  Raises: ValueError for a kind or a shape that does not exist, or if libtpu is missing.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  if not found or found[1] not in CHIPS:
    raise ValueError(f"topology is {topology!r}; wanted KIND:SHAPE, such as v5e:4x4, v5p:4x4x8 or "
                     f"cpu:8, with one of the kinds {', '.join(CHIPS)}")
  kind, shape = found.groups()
  if kind == "cpu":
    here = jax.devices("cpu")
    if not shape.isdigit() or int(shape) > len(here):
      raise ValueError(f"topology is {topology!r}, but this process has {len(here)} CPU devices; "
                       f"set XLA_FLAGS=--xla_force_host_platform_device_count={shape}")
    return here[:int(shape)], CHIPS[kind]
  from jax.experimental import topologies  # imports much
  try:
    named = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # which kind depends on what is missing
    reason = str(error).strip().splitlines()[0]
    raise ValueError(f"there is no topology {topology!r} here: {reason}. It wants libtpu (pip "
                     "install --constraint constraints.txt '.[tpu]') and a shape that exists, as "
                     "in v5e:4x4, v5e:8x16, v5p:2x2x4, v5p:4x4x8") from None
  return list(named.devices), CHIPS[kind]
