"""Where arrays live: one mesh, one table from logical dimensions to its axes.

Three mesh axes: `replica` and `data` split the batch; `data` alone, FSDP-style, the parameters, of
which every replica has a copy; `model` is tensor parallelism. A dimension laid out differently as
weight and as activation has two names (`embed`, `act_embed`), so that no tensor asks for one mesh
axis twice.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("replica", "data"),
    "length": None,
    "act_embed": None,
    "embed": "data",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "expert": "model",
    "vocab": "model",
    "layers": None,
}

HOST = "pinned_host"  # what JAX calls the memory of a host from which its devices copy


def make_mesh(data: int = -1, model: int = 1, devices: Any = None, replica: int = 1) -> Mesh:
  """A `replica` x `data` x `model` mesh over all devices.

  Args:
    data, model, replica: sizes of the three axes; at most one may be -1, "whatever is left". More
      copies of the parameters (`replica`) take more memory, and fewer devices gather each.
    devices: the devices to use; all of them by default.
  Raises: ValueError if the sizes do not multiply to the number of devices, or the pod's wires do
    not go with them.
  """
  devices = jax.devices() if devices is None else devices
  asked = dict(replica=replica, data=data, model=model)
  named = " x ".join(f"{axis}={size}" for axis, size in asked.items())
  given = math.prod(size for size in asked.values() if size != -1)
  sizes = {axis: len(devices) // given if size == -1 and given > 0 else size
           for axis, size in asked.items()}
  if (math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1
      or [*asked.values()].count(-1) > 1):
    raise ValueError(
        f"mesh: {named} is not the number of devices, {len(devices)}. Set mesh.replica, mesh.data "
        "and mesh.model so that they multiply to it (-1 for one of them means 'the rest').")
  try:  # axis types are explicit because JAX's default has changed between versions
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3,
                         devices=devices)
  except NotImplementedError as error:  # JAX says which axis, and how the pod is wired
    raise ValueError(f"mesh: {named} cannot be laid on these {len(devices)} devices: {error}"
                     ) from error


def axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of one rule, or of one dimension's layout."""
  return (rule,) if isinstance(rule, str) else rule or ()


def ways(name: str, mesh: Any) -> int:
  """Into how many parts a mesh cuts a dimension of that name, if they divide it."""
  return math.prod(mesh.shape[axis] for axis in axes(RULES[name]))


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
  """Layout of one array: `RULES`, except that a dimension its axes do not divide replicates.

  All axes of its rule together: rows that `data` divides, but `replica` x `data` does not, are on
  every device.
  """
  return PartitionSpec(*(
      RULES[name] if name and size % ways(name, mesh) == 0 else None
      for name, size in zip(names, shape)
  ))


def platform() -> str:
  """What computes: "cpu", "gpu" or "tpu", that of the current mesh or, without one, of JAX."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Fixes the layout of an activation under the current mesh; identity without one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def shards(name: str, size: int) -> int:
  """Into how many parts the current mesh cuts a dimension of that name; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return ways(name, mesh) if not mesh.empty and size % ways(name, mesh) == 0 else 1


def gather_rows(x: jax.Array, *names: str | None) -> jax.Array:
  """All rows of an activation of the batch on every device, from one mesh axis after the other.

  At once, libtpu adds zeros up where each of many devices has few rows, and sends twice as much.

  Args:
    names: logical dimensions of x but its first, `batch`.
  """
  count = len(axes(RULES["batch"])) if shards("batch", x.shape[0]) > 1 else 0
  rest = spec(names, x.shape[1:], jax.sharding.get_abstract_mesh()) if count else ()
  for left in reversed(range(count)):
    rows = RULES["batch"][:left] or None
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *rest))
  return x


def on_shards(function: Any, *names: str | None, check: bool = True) -> Any:
  """`function` on every device's own part of its arrays, for what XLA would gather them for.

  Args:
    function: of arrays of the same layout, into arrays (or a list of them) of that layout too;
      a dimension of size 1 that `names` cuts belongs to all devices.
    names: logical dimensions of all of them.
    check: whether JAX is to prove which results are the same on all devices; not of kernels.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function

  def call(*arrays):
    cut = spec(names, jnp.broadcast_shapes(*(x.shape[:-1] + (1,) for x in arrays)), mesh)
    own = lambda x: PartitionSpec(*(axis if x.shape[i] > 1 else None for i, axis in enumerate(cut)))
    return jax.shard_map(function, in_specs=tuple(map(own, arrays)), out_specs=cut,
                         check_vma=check)(*arrays)
  return call


def of_params(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree whose leaves carry logical names (from `jax.eval_shape(model.init)`)."""
  def one(leaf):
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
  return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def of_batch(mesh: Mesh) -> NamedSharding:
  """Sharding of any array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, where: NamedSharding) -> Any:
  """Arrays laid out on the mesh; numpy arrays are the same, and whole, in all processes."""
  if where.is_fully_addressable:
    return jax.device_put(tree, where)

  def one(x):
    if isinstance(x, jax.Array):
      return jax.device_put(x, where)
    # device_put would have the processes compare their copies.
    return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])
  return jax.tree.map(one, tree)


def fetch(x: Any) -> np.ndarray:
  """An array, whole, as numpy. If it is spread over processes, all must call this together."""
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def to_host(tree: Any) -> Any:
  """The same arrays, laid out the same, in the memory of the hosts of their devices.

  Raises: ValueError on a backend without such memory.
  """
  device = jax.local_devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST not in kinds:
    raise ValueError(f"arrays cannot wait in host memory here: {device.platform} has no memory "
                     f"{HOST!r}, only {', '.join(kinds)}; set teacher_memory='device'")
  return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), tree))


def to_device(tree: Any) -> Any:
  """The same arrays in their devices' memory; those that are there are returned as they are."""
  kind = jax.local_devices()[0].default_memory().kind
  layout = lambda x: (x.sharding.with_memory_kind(kind) if x.sharding.memory_kind == HOST
                      else x.sharding)
  return jax.device_put(tree, jax.tree.map(layout, tree))


def unboxed(boxed: Any) -> Any:
  """The same tree without its logical names."""
  return nn.meta.unbox(boxed)
