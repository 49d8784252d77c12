"""What one call of a compiled program costs a chip, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Here the text is
walked from its entry with the number of times that each computation runs.

Counted are products (dots and convolutions), bytes that pass between HBM and the cores, and bytes
that a chip sends to others. Elementwise operations are not: they hide behind the bytes.
"""

from collections.abc import Iterator
import functools
import math
import re
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
        "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}

# Of operand bytes: what a chip sends of them in the best known algorithm among n chips.
SENT = {
    "all-gather": lambda n: n - 1.0,
    "reduce-scatter": lambda n: (n - 1.0) / n,
    "all-reduce": lambda n: 2.0 * (n - 1.0) / n,
    "all-to-all": lambda n: (n - 1.0) / n,
    "ragged-all-to-all": lambda n: (n - 1.0) / n,
    "collective-permute": lambda n: 1.0,
}

# Products that JAX's attention kernel for TPUs makes of a pair of blocks: of scores and values;
# for the gradients it makes the scores anew, then theirs, and those of queries, or keys and values.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota",
        "partition-id", "replica-id", "add-dependency", "opt-barrier"}

COPIES = {"copy", "copy-start", "copy-done", "bitcast"}

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Shape(NamedTuple):
  dtype: str
  dims: tuple[int, ...]
  near: bool  # in the cores' own memory (VMEM, flags), not in HBM

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8


class Op(NamedTuple):
  """One instruction."""

  name: str
  code: str
  shapes: tuple[Shape, ...]    # of the result; several for a tuple
  operands: tuple[str, ...]
  text: str                    # everything behind the operands, and constants' values
  root: bool


class Collective(NamedTuple):
  kind: str
  sent: float    # bytes that a chip sends
  among: int     # chips
  where: str     # the operation of the model that it belongs to


class Costs(NamedTuple):
  """Of one call on one chip."""

  flops: float
  hbm: float                                        # bytes read and written
  collectives: tuple[tuple[Collective, float], ...]  # with how often each runs
  loops: tuple[tuple[str, float | None], ...]       # with how often each turns; None: not known

  @property
  def sent(self) -> float:
    return sum(each.sent * times for each, times in self.collectives)


def costs(text: str, turns: float = 1.0) -> Costs:
  """Walks the program.

  Args:
    text: `compiled.as_text()`.
    turns: how often an outermost loop is taken to turn if its text does not say; one within
      another is taken to turn once.
  """
  partitions = int(_after(text.split("\n", 1)[0], "num_partitions=") or 1)
  walk = _Walk(_computations(text), turns, partitions)
  walk.computation(walk.entry, 1.0, ())
  return Costs(walk.flops, walk.hbm, tuple(walk.collectives), tuple(walk.loops))


def _after(text: str, label: str) -> str:
  found = re.search(re.escape(label) + r"([\w.\-%]+)", text)
  return found[1].lstrip("%") if found else ""


def _balanced(text: str) -> int:
  """Where the parenthesis that opens `text` closes."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth == 0:
      return i
  raise ValueError(f"HLO that cannot be read: {text[:80]!r} never closes its parenthesis")


def _op(line: str) -> Op | None:
  found = _LINE.match(line)
  if not found:
    return None
  root, name, rest = found.groups()
  kind = _balanced(rest) + 1 if rest.startswith("(") else rest.index(" ")
  shapes = tuple(Shape(dtype, tuple(int(d) for d in dims.split(",") if d),
                       bool(re.search(r"S\([1-9]", layout or "")))
                 for dtype, dims, layout in _SHAPE.findall(rest[:kind]))
  code, _, behind = rest[kind:].strip().partition("(")
  end = _balanced("(" + behind)
  inside = behind[:end - 1]
  operands = () if code == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
  return Op(name, code, shapes, operands,
            inside if code in ("constant", "parameter") else behind[end:], bool(root))


def _computations(text: str) -> dict[str, dict[str, Op]]:
  """Computation -> its instructions by name; the entry is also under ""."""
  found: dict[str, dict[str, Op]] = {}
  here: dict[str, Op] = {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      here = found[header[2]] = {}
      if header[1]:
        found[""] = here
    elif op := _op(line):
      here[op.name] = op
  return found


class _Walk:
  """Adds up what the computations cost, each as often as it runs."""

  def __init__(self, computations: dict[str, dict[str, Op]], turns: float, partitions: int):
    self._all, self._turns, self._partitions = computations, turns, partitions
    self.entry = computations[""]
    self.flops, self.hbm = 0.0, 0.0
    self.collectives: list[tuple[Collective, float]] = []
    self.loops: list[tuple[str, float | None]] = []
    self._seen: set[str] = set()  # collectives that go on beside several other operations

  def computation(self, ops: dict[str, Op], times: float, inside: tuple[tuple[str, float], ...],
                  fused: bool = False) -> None:
    """Adds what runs in a computation.

    Args:
      times: how often it runs.
      inside: the loops around it, the outermost first: names and turns.
      fused: whether its values never reach memory.
    """
    for op in ops.values():
      kind = op.code.removesuffix("-start")
      if op.code == "while":
        turns = self._trips(ops, op)
        label = _name(op)
        self.loops.append((label, turns))
        if turns is None:
          turns = 1.0 if inside else self._turns
        self.computation(self._all[_after(op.text, "body=")], times * turns,
                         (*inside, (label, turns)))
      elif op.code == "conditional":
        self._branch(op, times, inside)
      elif kind in SENT:
        self._collective(ops, op, kind, times, inside)
      elif op.code in ("dot", "convolution"):
        self.flops += times * _product(op, [ops[name].shapes[0] for name in op.operands[:2]])
      elif op.code in ("call", "async-start", "fusion"):
        called = self._all[_after(op.text, "calls=") or _after(op.text, "to_apply=")]
        self.computation(called, times, inside, fused or op.code == "fusion")
      elif op.code == "custom-call" and (said := _estimate(op, "flops")) is not None:
        self.flops += times * said
      elif op.code == "custom-call" and (kind := _splash(op)):
        self.flops += times * _attention(kind, [ops[name].shapes[0] for name in op.operands])[0]
      elif op.code == "custom-call" and "matmul" in op.text:
        self.flops += times * _matmul(op, [ops[name].shapes[0] for name in op.operands[:2]])
      if not fused:
        self.hbm += times * self._bytes(ops, op)

  def _trips(self, ops: dict[str, Op], loop: Op) -> float | None:
    """How often a loop turns, if it counts to a constant."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
      return float(known[1])
    condition = self._all[_after(loop.text, "condition=")]
    root = next(op for op in condition.values() if op.root)
    if root.code != "compare" or "direction=LT" not in root.text or len(root.operands) != 2:
      return None
    counter, bound = (condition[name] for name in root.operands)
    if bound.code != "constant" or counter.code != "get-tuple-element":
      return None
    place = int(_after(counter.text, "index="))
    body = self._all[_after(loop.text, "body=")]
    out = next(op for op in body.values() if op.root)
    step = self._constant(body, body[out.operands[place]].operands) if out.code == "tuple" else None
    start = ops.get(loop.operands[0])
    first = (self._constant(ops, [start.operands[place]])
             if start is not None and start.code == "tuple" else None)
    if not step or first is None:
      return None
    return max(math.ceil((float(bound.text) - first) / step), 0)

  @staticmethod
  def _constant(ops: dict[str, Op], names: Iterator[str]) -> float | None:
    """The first of them that is a constant, or a copy of one."""
    for op in map(ops.get, names):
      while op is not None and op.code in COPIES:
        op = ops.get(op.operands[0])
      if op is not None and op.code == "constant" and re.fullmatch(r"-?\d+", op.text):
        return float(op.text)
    return None

  def _branch(self, op: Op, times: float, inside: tuple) -> None:
    """Of a choice that is made when the program runs, the branch that computes most."""
    named = re.search(r"branch_computations=\{([^}]*)\}", op.text)
    names = (re.findall(r"%([\w.\-]+)", named[1]) if named else
             [_after(op.text, "true_computation="), _after(op.text, "false_computation=")])
    tried = []
    for name in names:
      walk = _Walk(self._all, self._turns, self._partitions)
      walk.computation(self._all[name], times, inside)
      tried.append(walk)
    best = max(tried, key=lambda walk: (walk.flops, walk.hbm))
    self.flops, self.hbm = self.flops + best.flops, self.hbm + best.hbm
    self.collectives += best.collectives
    self.loops += best.loops

  def _collective(self, ops: dict[str, Op], op: Op, kind: str, times: float,
                  inside: tuple[tuple[str, float], ...]) -> None:
    # A TPU may let a collective go on beside other operations, turns of a loop among them: its
    # text is then in each of these, under one channel, and its name is that of where it began.
    if re.search(r'async_collective_fusion_config":\{"flag_start":"(?!-1")', op.text) or (
        f"channel {_after(op.text, 'channel_id=')}" in self._seen):
      channel = f"channel {_after(op.text, 'channel_id=')}"
      if channel in self._seen:
        return
      self._seen.add(channel)
      for label, turns in inside:
        if label.endswith("/while") and not _name(op).startswith(label + "/"):
          times /= turns
    elif 'async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}' in op.text:
      self._seen.add(f"channel {_after(op.text, 'channel_id=')}")
    among = self._among(op.text)
    size = sum(shape.bytes for name in op.operands for shape in ops[name].shapes)
    self.collectives.append((Collective(kind, size * SENT[kind](among), among, _name(op)), times))

  def _among(self, text: str) -> int:
    """The number of chips of a group."""
    if "source_target_pairs" in text:
      return 2
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
      parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
      return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
      return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
      return len(listed[1].split(","))
    if (groups := text.partition("replica_groups=")[2]) and not groups.startswith("{}"):
      raise ValueError(f"HLO that cannot be read: which chips are {groups[:80]!r}?")
    return self._partitions

  def _bytes(self, ops: dict[str, Op], op: Op) -> float:
    """What an instruction moves to and from HBM."""
    far = lambda shapes: sum(shape.bytes for shape in shapes if not shape.near)
    read = lambda i: far(ops[op.operands[i]].shapes)
    if op.code in FREE or op.code in ("while", "conditional", "call", "async-start") or (
        op.code.endswith("-done") or op.code.endswith("-update")):
      return 0.0
    if op.code == "copy-start":  # its result is a tuple of both
      return far(op.shapes[:1]) + read(0)
    if op.code in ("dynamic-slice", "slice", "gather"):
      return 2.0 * far(op.shapes)
    if op.code == "slice-start":  # its result is a tuple of the whole and the piece
      whole, piece = op.shapes[:2]
      return (0.0 if whole.near else piece.bytes) + far([piece])
    if op.code in ("dynamic-update-slice", "scatter"):
      return 2.0 * far(ops[op.operands[-1 if op.code == "scatter" else 1]].shapes)
    if op.code == "custom-call" and (said := _estimate(op, "bytes_accessed")) is not None:
      return said
    again = 0.0
    if op.code == "custom-call" and (kind := _splash(op)):
      again = _attention(kind, [ops[name].shapes[0] for name in op.operands])[1]
    if op.code == "fusion":
      called = self._all[_after(op.text, "calls=")]
      return self._written(called, op) + sum(
          min(read(i), self._needed(called, i)[0]) for i in range(len(op.operands)))
    out, n = op.shapes, len(op.operands)
    if op.code.endswith("-start") and len(out) >= 2 * n:  # of operands and results
      out = out[n:2 * n]
    return again + far(out) + sum(map(read, range(n)))

  def _needed(self, ops: dict[str, Op], i: int) -> tuple[float, bool]:
    """How much a fusion reads of its operand i: pieces, if all it does is cut them out.

    Returns: the bytes, and whether its result is that operand, changed in places or not at all.
    """
    start = next((op for op in ops.values() if op.code == "parameter" and op.text == str(i)), None)
    if start is None:
      return 0.0, False
    total, same, queue = 0.0, start.root, [start.name]
    while queue:
      name = queue.pop()
      for op in ops.values():
        if name not in op.operands:
          continue
        passes = op.code == "bitcast" or (
            op.code == "dynamic-update-slice" and op.operands[0] == name)
        if op.code == "fusion":  # within this one: it may be that which cuts
          called = self._all[_after(op.text, "calls=")]
          for j in (j for j, operand in enumerate(op.operands) if operand == name):
            read, through = self._needed(called, j)
            total, passes = total + read, passes or through
        elif op.code in ("dynamic-slice", "slice", "gather") and op.operands[0] == name:
          total += sum(shape.bytes for shape in op.shapes)
        elif not passes and not (op.root and op.code == "tuple"):
          return math.inf, False
        if op.root:
          same = True
        elif passes:
          queue.append(op.name)
    return total, same

  def _written(self, ops: dict[str, Op], fusion: Op) -> float:
    """How much a fusion writes: of what it changes in place, the change."""
    root = next(op for op in ops.values() if op.root)
    parts = [ops[name] for name in root.operands] if root.code == "tuple" else [root]
    total = 0.0
    for part, shape in zip(parts, fusion.shapes):
      while part.code == "bitcast" and part.operands[0] in ops:
        part = ops[part.operands[0]]
      if part.code == "fusion" and len(part.shapes) == 1:
        total += self._written(self._all[_after(part.text, "calls=")], fusion._replace(
            shapes=(shape,)))
      elif not shape.near:
        total += (ops[part.operands[1]].shapes[0].bytes if part.code == "dynamic-update-slice"
                  else shape.bytes)
    return total


def _name(op: Op) -> str:
  """The operation of the model that an instruction came from."""
  found = re.search(r'op_name="([^"]*)"', op.text)
  return found[1] if found else op.name


def _estimate(op: Op, what: str) -> float | None:
  """What a kernel says of itself: a ragged_dot on TPUs, for one, which is no product to XLA."""
  found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"(\d+)"', op.text)
  return float(found[1]) if found else None


def _splash(op: Op) -> str:
  """Which of JAX's attention kernels for TPUs a custom call is, a key of SPLASH; "" if none."""
  found = re.match(r"splash_mha_(fwd|dq|dkv)_", op.name)
  return found[1] if found else ""


def _attention(kind: str, sides: list[Shape]) -> tuple[float, float]:
  """FLOPs of a causal attention kernel, and bytes that it reads again, after the first time.

  Pairs of blocks that the causal mask empties are skipped. Each block of one side (queries; of
  `dkv` keys) reads those of the other side's two arrays that it meets, for every head.

  Args:
    sides: the operands; which block comes next [1, n, n], ..., queries [..., heads, length, dim],
      keys and values of as many heads or fewer.
  """
  n, queries, keys, values = sides[0].dims[-1], *sides[2:5]
  flops = 2.0 * math.prod(queries.dims) * queries.dims[-2] * (n + 1) / (2 * n)
  once = 2 * queries.bytes if kind == "dkv" else keys.bytes + values.bytes
  return SPLASH[kind] * flops, queries.bytes * (n + 1) - once


def _product(op: Op, sides: list[Shape]) -> float:
  """FLOPs of a dot, or of a convolution as which a TPU computes a dot."""
  left, right = sides
  out = math.prod(op.shapes[0].dims)
  if op.code == "dot":
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)
    summed = [left.dims[int(i)] for i in axes[1].split(",") if i] if axes else []
    return 2.0 * out * math.prod(summed)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
  ins, kernel, outs = labels.groups()
  window = {key: values.split("x") for key, values in re.findall(
      r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.text) or ["", ""])[1])}
  spatial = sorted(c for c in outs if c.isdigit())
  positions = 1.0
  for i, c in enumerate(spatial):
    value = lambda key, default: window[key][i] if key in window else default
    low = int(value("pad", "0_0").split("_")[0])
    positions *= _valid(left.dims[ins.index(c)], right.dims[kernel.index(c)],
                        op.shapes[0].dims[outs.index(c)], int(value("stride", 1)), low,
                        int(value("lhs_dilate", 1)), int(value("rhs_dilate", 1)))
  others = op.shapes[0].dims[outs.index("b")] * op.shapes[0].dims[outs.index("f")]
  return 2.0 * positions * others * right.dims[kernel.index("i")]


@functools.cache
def _valid(size: int, kernel: int, out: int, stride: int, low: int, dilate: int,
           kernel_dilate: int) -> float:
  """Pairs of an output and a kernel position, in one dimension, that meet a real input."""
  at = (np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * kernel_dilate - low)
  return float(np.sum((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)))


def _matmul(op: Op, sides: list[Shape]) -> float:
  """FLOPs of a product that a library computes: both sides with the sum over one dimension."""
  left, right = sides
  batch = math.prod(op.shapes[0].dims[:-2]) if len(right.dims) > 2 else 1
  out = math.prod(op.shapes[0].dims)
  return 2.0 * math.sqrt(math.prod(left.dims) * math.prod(right.dims) * out / batch)
