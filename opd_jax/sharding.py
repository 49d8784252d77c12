"""Where arrays live: one mesh, one table from logical dimensions to its axes.

Two mesh axes: `data` splits the batch and, FSDP-style, the parameters; `model` is
tensor parallelism. A dimension laid out differently as weight and as activation has
two names (`embed`, `act_embed`), so that no tensor asks for one mesh axis twice.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

RULES: dict[str, str | None] = {
    "batch": "data",
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


def make_mesh(data: int = -1, model: int = 1, devices: Any = None) -> Mesh:
  """A `data` x `model` mesh over all devices.

  Args:
    data, model: sizes of the two axes; at most one may be -1, "whatever is left".
    devices: the devices to use; all of them by default.
  Raises: ValueError if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data == -1:
    data = count // model if model > 0 else 0
  elif model == -1:
    model = count // data if data > 0 else 0
  if data * model != count:
    raise ValueError(
        f"mesh: data={data} x model={model} is not the number of devices, {count}. Set mesh.data "
        "and mesh.model so that they multiply to it (-1 for one of them means 'the rest')."
    )
  # Axis types are explicit because JAX's default has changed between versions.
  return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
  """Layout of one array: `RULES`, except that a dimension its axis does not divide replicates."""
  axes = [RULES[name] if name else None for name in names]
  return PartitionSpec(*(
      axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)
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
  axis = RULES[name]
  return mesh.shape[axis] if not mesh.empty and size % mesh.shape[axis] == 0 else 1


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
  return NamedSharding(mesh, PartitionSpec("data"))


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
