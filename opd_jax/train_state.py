"""TrainState: parameters, optimizer state, EMA and step, and how one update changes them."""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np
import optax

from opd_jax import distributed, sharding
from opd_jax.rollouts import batch as batches


class TrainState(struct.PyTreeNode):
  step: Array             # i32[], updates tried
  params: Any
  opt_state: Any
  ema: Any                # like params; None unless ema.rate > 0


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up to its peak, then constant, cosine or linear to 0.

  Raises: ValueError for an unknown schedule name.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(total_steps - warmup, 1)
  after = {
      "constant": lambda: optax.constant_schedule(peak),
      "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
      "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
  }
  if config.schedule not in after:
    raise ValueError(f"optimizer.schedule is {config.schedule!r}; it must be one of {list(after)}")
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, warmup), after[config.schedule]()], [warmup])


def make_optimizer(config: ml_collections.ConfigDict,
                   total_steps: int) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping; norms and biases (rank 1 per layer) do not decay."""
  def decays(params):
    matrix = lambda path, x: not any(
        str(getattr(k, "key", k)).endswith(("scale", "bias")) for k in path)
    return jax.tree.map_with_path(matrix, params)
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(make_schedule(config, total_steps), b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=decays),
  )


def create(params: Any, optimizer: optax.GradientTransformation, ema: bool,
           mesh: Mesh) -> TrainState:
  """A fresh state around `params`, every leaf laid out on the mesh.

  Optimizer moments and EMA lie where their parameters lie; scalars are replicated.
  """
  copy = jax.tree.map(jnp.copy, params) if ema else None
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), copy)
  on_mesh = lambda x: (x.sharding if isinstance(x.sharding, NamedSharding)
                       else sharding.replicated(mesh))
  return jax.device_put(state, jax.tree.map(on_mesh, state))


def shapes(params: Any, optimizer: optax.GradientTransformation, ema: bool,
           mesh: Mesh) -> TrainState:
  """What `create` gives, from shapes with shardings and as shapes with shardings."""
  layouts = {path: x.sharding for path, x in jax.tree.leaves_with_path(params)}

  def laid(path, x):
    ends = (path[i:] for i in range(len(path)))  # a moment's path ends as its parameter's
    layout = next((layouts[end] for end in ends if end in layouts), sharding.replicated(mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

  moments = jax.tree.map_with_path(laid, jax.eval_shape(optimizer.init, params))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  return TrainState(step, params, moments, params if ema else None)


def apply_gradients(state: TrainState, gradients: Any, optimizer: optax.GradientTransformation,
                    learn: Array, ema_rate: float) -> TrainState:
  """One optimizer step, and EMA <- (1 - rate) EMA + rate params after it.

  Args:
    learn: bool[]; when false (nothing to learn from, or a non-finite loss or gradient)
      everything but the step counter stays as it was, weight decay and moments included.
    ema_rate: share of the new parameters.
  """
  def update(state):
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, ema_rate)
    return state.replace(params=params, opt_state=opt_state, ema=ema)

  # A branch, not a choice between old and new values: those would have to lie side by side.
  state = jax.lax.cond(learn, update, lambda state: state, state)
  return state.replace(step=state.step + 1)


def make_train_step(loss_fn: Callable[[Any, Any, Any], tuple[Array, dict[str, Array]]],
                    describe: Callable[[Any, dict[str, Array]], dict[str, Array]],
                    optimizer: optax.GradientTransformation, count: Callable[[Array], Array],
                    micro_batches: int, ema_rate: float) -> Callable[..., Any]:
  """One update on a batch, in equal micro-batches that together give the whole batch's loss.

  A loss is a sum over a count (of tokens, or of responses). Each micro-batch's loss enters
  with its share of that count. Metrics have denominators of their own, or none (a maximum):
  they are computed once, from the columns of the whole batch. So the number of
  micro-batches changes memory and nothing else.

  Args:
    loss_fn: (params, batch, constants) -> (mean over the batch's own count, columns);
      constants are arrays that every micro-batch needs whole, such as a teacher's head;
      columns are the [B, ...] arrays that `describe` wants.
    describe: (batch, columns) -> metrics, scalars.
    optimizer: from `make_optimizer`.
    count: mask [B, T] -> the loss's denominator, f32[].
    micro_batches: how many; divides B.
    ema_rate: see `apply_gradients`.
  Returns: (state, batch, constants) -> (state, metrics), to be jitted by `jit_train_step`.
  """
  def gradients(params, batch, constants):
    (loss, columns), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, constants)
    return (loss, grads), columns

  def accumulated(params, batch, constants):
    total = jnp.maximum(count(batch.learn), 1.0)

    def body(carry, micro):
      share = count(micro.learn) / total
      new, columns = gradients(params, micro, constants)
      return jax.tree.map(lambda old, x: old + share * x, carry, new), columns

    micros = batches.split(batch, micro_batches)
    shapes, _ = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], micros), constants)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, columns = jax.lax.scan(body, zero, micros)
    return sums, batches.join(columns)

  def train_step(state, batch, constants):
    compute = gradients if micro_batches == 1 else accumulated
    (loss, grads), columns = compute(state.params, batch, constants)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    learn = finite & (count(batch.learn) > 0)
    state = apply_gradients(state, grads, optimizer, learn, ema_rate)
    return state, {"loss/total": loss, **describe(batch, columns), "update/gradient_norm": norm,
                   "update/skipped": 1.0 - learn.astype(jnp.float32)}

  return train_step


def jit_train_step(train_step: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
  """Compiles a train step that donates the state and gives it back in the same layout.

  Left to itself the compiler may choose another layout for the new state, and the second
  step would compile again.
  """
  layout = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(layout, None))


def check_finite(metrics: dict[str, Array], batch: Any, workdir: str, step: int,
                 ids: Sequence[str] | None = None) -> None:
  """Stops a run whose loss or gradient is not finite, and leaves the batch for inspection.

  The update itself was refused inside `train_step`, so the parameters are still good.

  Args:
    metrics, batch: of the update; arrays.
    workdir, step: where the batch is left, and under which number.
    ids: of the batch's rows, if nothing else may be left of them: guarded data.
  Raises: FloatingPointError naming the step and the file with the batch.
  """
  loss, norm = float(metrics["loss/total"]), float(metrics["update/gradient_norm"])
  if np.isfinite(loss) and np.isfinite(norm):
    return
  path = pathlib.Path(workdir) / f"bad_batch_step_{step:06d}.npz"
  left = {"ids": np.asarray(ids)} if ids is not None else {
      jax.tree_util.keystr(name).strip("."): sharding.fetch(value)
      for name, value in jax.tree.leaves_with_path(batch)}
  distributed.of_first(lambda: np.savez(path, **left))  # all wait: who leaves ends the others
  raise FloatingPointError(
      f"update {step}: the loss is {loss} and the gradient norm {norm}. The update was not made; "
      f"the last checkpoint is good, and the batch is in {path}. Lower optimizer.learning_rate or "
      "look at the batch.")
