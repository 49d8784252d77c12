"""Compiles functions from shapes and keeps what the compiler says of each.

A function's arguments are shapes with shardings, and what it gives is the same again: as laid out
by the compiler, ready to be an argument of the next, as in the run.
"""

import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from opd_jax import progress, sharding
from opd_jax.aot import hlo
from opd_jax.aot.chips import Chip


class Row(NamedTuple):
  """One compiled function. Bytes and FLOPs are those of one chip and one call."""

  name: str
  times: float              # calls a step
  held: dict[str, float]    # bytes of what lies there during the call, by name
  inputs: float             # bytes of other arguments
  arguments: float          # bytes of all arguments that it uses, held or not, as the compiler says
  temporaries: float        # bytes that exist only while it runs
  outputs: float            # bytes of results that do not take the place of an argument
  costs: hlo.Costs | None   # None: it does not fit, and so was not compiled to the end
  compile_s: float
  problem: str              # "": it was compiled

  @property
  def total(self) -> float:
    """Bytes at its peak."""
    return sum(self.held.values()) + self.inputs + self.temporaries + self.outputs


class DoesNotFit(Exception):
  """A function needs more memory than a chip has; what depends on its results cannot follow."""


class Report:
  """Functions of a run, in the order in which a step calls them."""

  def __init__(self, mesh: Mesh, chip: Chip):
    self.mesh, self.chip = mesh, chip
    self.rows: list[Row] = []
    self.held: dict[str, Any] = {}  # name -> trees that lie on the devices

  def add(self, name: str, function: Any, *args: Any, times: float = 1.0, turns: float = 1.0,
          **static: Any) -> Any:
    """Compiles a jitted function.

    Args:
      name: in the report.
      function: made by jax.jit.
      args, static: of the call: shapes with shardings; numpy arrays and numbers as in the run.
      times: calls a step.
      turns: of a loop whose end only the data know.
    Returns: what it gives, as shapes with shardings.
    Raises: DoesNotFit if the compiler refuses it for its memory.
    """
    progress.note(f"compiling {name}")
    lying = {id(leaf) for tree in self.held.values() for leaf in jax.tree.leaves(tree)}
    held = {what: on_chip(tree) for what, tree in self.held.items()}
    inputs = on_chip([leaf for leaf in jax.tree.leaves((args, static)) if id(leaf) not in lying])
    start = time.perf_counter()
    lowered = function.trace(*args, **static).lower()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      spent = time.perf_counter() - start
      # What the compiler says it needs is with the arguments, held or not.
      needed = max(wanted(str(error)) - on_chip([*args, static]), 0.0)
      self.rows.append(Row(name, times, held, inputs, 0.0, needed, 0.0, None, spent,
                           str(error).splitlines()[0]))
      raise DoesNotFit(name) from None
    memory = compiled.memory_analysis()
    self.rows.append(Row(
        name, times, held, inputs, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        hlo.costs(compiled.as_text(), turns), time.perf_counter() - start, ""))
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        lowered.out_info, jax.tree.unflatten(jax.tree.structure(lowered.out_info),
                                             jax.tree.leaves(compiled.output_shardings)))

  def seconds(self, row: Row) -> dict[str, float]:
    """How long a call takes at the least: for products, for HBM, for the links between chips."""
    chip, costs = self.chip, row.costs
    if costs is None or chip.flops is None:
      return {}
    return {"compute": costs.flops / chip.flops, "HBM": costs.hbm / chip.hbm,
            "links": costs.sent / chip.links}

  def fits(self, row: Row) -> bool:
    return not row.problem and (self.chip.memory is None or row.total <= self.chip.memory)


def shape(mesh: Mesh, dims: tuple[int, ...], dtype: Any, *names: str | None) -> Any:
  """An array of that shape, its first dimensions laid out by their logical names."""
  return jax.ShapeDtypeStruct(dims, np.dtype(dtype),
                              sharding=NamedSharding(mesh, sharding.spec(names, dims, mesh)))


def on_chip(tree: Any) -> float:
  """Bytes of a tree on one chip; what is on no mesh lies whole on each."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    if not hasattr(leaf, "shape"):
      continue
    layout = getattr(leaf, "sharding", None)
    dims = layout.shard_shape(leaf.shape) if isinstance(layout, NamedSharding) else leaf.shape
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    total += float(np.prod(dims, dtype=np.float64)) * size
  return total


def wanted(message: str) -> float:
  """The bytes that the compiler says it would have needed."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT])|\(([\d.]+)([KMGT])\)", message)
  if not found:
    return float("inf")
  number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
  return float(number) * 1024 ** (1 + "KMGT".index(unit))
