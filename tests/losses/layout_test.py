"""Loss and gradient do not depend on micro-batches, row order, padding or devices.

All losses run in one real train step, each on a head of its own, so that its update is its
gradient and nobody else's.
"""

import functools
import json
import os
import subprocess
import sys

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from opd_jax import config as configs
from opd_jax import sharding, train_state
from opd_jax.losses import fused, masked, policy_gradient, preference, signals, supervised, weights
from opd_jax.pipelines import opd
from opd_jax.rollouts import batch as batches

B, T, D, V, K = 8, 5, 4, 16, 6
LENGTHS = np.array([5, 1, 3, 0, 4, 2, 5, 1])  # the token means of any two halves differ


def make_batch() -> batches.Batch:
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mask = np.arange(T) < LENGTHS[:, None]
  return batches.Batch(
      prompt=np.zeros((B, 1), np.int32), prompt_mask=np.ones((B, 1), bool),
      response=rng.integers(0, V, (B, T)), mask=mask, learn=mask,
      sampler_logprobs=normal(B, T) - 2, teacher_logprobs=normal(B, T) - 2,
      reference_logprobs=normal(B, T) - 2, reward=rng.uniform(0.5, 2.0, B).astype(np.float32),
      teacher_hidden=normal(B, T, D), teacher_id=np.array([0, 1, 1, 0, 1, 1, 1, 0], np.int32))


def make_heads() -> tuple[dict, np.ndarray]:
  rng = np.random.default_rng(1)
  head = rng.normal(size=(D, V)).astype(np.float32)
  return {name: head for name in LOSSES}, rng.normal(size=(D, V)).astype(np.float32)


def logprobs(head, batch):
  scores = jax.nn.log_softmax(batch.teacher_hidden @ head)
  return jnp.take_along_axis(scores, batch.response[..., None], axis=-1)[..., 0]


def score_function(head, batch, teacher, aggregate):
  now = logprobs(head, batch)
  signal = signals.g_opd(now, batch.teacher_logprobs, batch.reference_logprobs)
  weight = (weights.iw_opd(now, batch.teacher_logprobs, batch.learn)
            * weights.truncated_importance(now, batch.sampler_logprobs, 5.0))
  return policy_gradient.score_function_loss(now, signal, batch.learn, weight, aggregate)[0]


def clipped(head, batch, teacher, aggregate):
  now = logprobs(head, batch)
  return policy_gradient.clipped_surrogate_loss(
      now, batch.sampler_logprobs, signals.opd(now, batch.teacher_logprobs), batch.learn,
      dual=3.0, aggregate=aggregate)[0]


def over_vocabulary(kind, **settings):
  def loss(head, batch, teacher, aggregate):
    return fused.fused_divergence(batch.teacher_hidden, head, batch.teacher_hidden, teacher,
                                  batch.learn, kind, aggregate=aggregate, tile=(3, 5),
                                  **settings)[0]
  return loss


def said_before(head, batch, teacher, aggregate):
  ids, logprobs = fused.fused_topk(batch.teacher_hidden, teacher, K, tile=(3, 5))
  return fused.fused_given_divergence(batch.teacher_hidden, head, ids, logprobs, batch.learn, "jsd",
                                      aggregate=aggregate, tile=(3, 5))[0]


def two_teachers(head, batch, teacher, aggregate):
  names = {function: name for name, function in masked.AGGREGATES.items()}
  config = configs.on_policy(loss=dict(surrogate="jsd", aggregate=names[aggregate])).loss
  return opd.divergence(batch.teacher_hidden, head, batch, (teacher, teacher[:, ::-1]),
                        jnp.ones(batch.mask.shape), config)[0]


def sft(head, batch, teacher, aggregate):
  now, _ = fused.fused_logprobs(batch.teacher_hidden, head, batch.response, tile=(3, 5))
  return supervised.sft(now, batch.learn, aggregate)[0]


def weighted_sft(head, batch, teacher, aggregate):  # its mean is over responses, as sequence_sum's
  one = lambda x: x[:, None]
  return supervised.weighted_sft(one(logprobs(head, batch)), one(batch.learn), one(batch.reward))[0]


def dpo(head, batch, teacher, aggregate):  # one pair a row; its mean is over pairs
  total = lambda x: masked.row_sum(x, batch.learn)
  return preference.dpo(total(logprobs(head, batch)), total(batch.sampler_logprobs),
                        total(batch.teacher_logprobs), total(batch.reference_logprobs),
                        mask=jnp.any(batch.learn, axis=1))[0]


LOSSES = {
    "score_function": score_function, "clipped": clipped, "sft": sft,
    "forward_kl": over_vocabulary("forward_kl"), "reverse_kl": over_vocabulary("reverse_kl"),
    "jsd": over_vocabulary("jsd"), "topk": over_vocabulary("jsd", top_k=K),
    "said_before": said_before, "two_teachers": two_teachers,
    "weighted_sft": weighted_sft, "dpo": dpo,
}


def of_aggregate(aggregate: str) -> list[str]:
  """The losses whose mean is the aggregation's; those of whole responses know no other count."""
  over_responses = masked.COUNTS[aggregate] is masked.responses
  return [name for name in LOSSES if over_responses or name not in ("weighted_sft", "dpo")]


@functools.cache
def train_step(aggregate: str, micro_batches: int):
  """Plain descent on the sum of all losses, compiled.

  Each has a scale of 1, whose gradient is the loss itself as the step puts it together.
  """
  def loss_fn(params, batch, teacher):
    heads, scales = params
    mean = masked.AGGREGATES[aggregate]
    return sum(scales[name] * LOSSES[name](heads[name], batch, teacher, mean)
               for name in of_aggregate(aggregate)), {}
  return jax.jit(train_state.make_train_step(
      loss_fn, lambda batch, columns: {}, optax.sgd(1.0), masked.COUNTS[aggregate], micro_batches,
      ema_rate=0.0))


def update(aggregate: str, batch: batches.Batch, micro_batches: int = 1,
           place=lambda *x: x) -> dict:
  """One step -> name: (loss, gradient) of every loss."""
  batch, heads, teacher = place(batch, *make_heads())
  params = heads, {name: jnp.ones(()) for name in LOSSES}
  state = train_state.TrainState(
      jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params), ema=None)
  state, _ = train_step(aggregate, micro_batches)(state, batch, teacher)
  gradients, values = jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params)
  return {name: (values[name], gradients[name]) for name in of_aggregate(aggregate)}


def error(got: dict, want: dict) -> float:
  """Largest difference of any loss or gradient, relative as in METHODS."""
  gap = lambda a, b: np.max(np.abs(a - b) / (1 + np.abs(b)))
  return float(max(gap(g, w) for name in want for g, w in zip(got[name], want[name])))


def rows(batch: batches.Batch, order) -> batches.Batch:
  return jax.tree.map(lambda x: x[order], batch)


def pad(batch: batches.Batch, columns: int, empty: int) -> batches.Batch:
  """More columns of T and more rows, which hold what an accident might leave there."""
  accident = {np.dtype(bool): False, np.dtype(np.float32): np.nan}
  def one(path, x):
    filler = accident.get(x.dtype, 0)
    if path[0].name == "teacher_hidden":  # the models', where padding is finite
      filler = 1e3
    wider = [(0, empty)] + [(0, columns)] * (x.ndim > 1 and x.shape[1] == T)
    return np.pad(x, wider + [(0, 0)] * (x.ndim - len(wider)), constant_values=filler)
  return jax.tree.map_with_path(one, batch)


def on_devices() -> None:
  """Prints the error of every mesh of eight devices against one; run in a child process."""
  batch, result = make_batch(), {}
  for aggregate in masked.AGGREGATES:
    alone = update(aggregate, batch)
    for data, model in ((8, 1), (4, 2)):
      mesh = sharding.make_mesh(data, model)
      put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
      place = lambda batch, heads, teacher: (
          put(batch, "data"), put(heads, None, "model"), put(teacher, None, "model"))
      micro = 8 // data  # every micro-batch still has a row for each device
      with jax.set_mesh(mesh):
        result[f"{aggregate} {data}x{model}"] = error(update(aggregate, batch, micro, place), alone)
  print(json.dumps(result))


class LayoutTest(parameterized.TestCase):

  @parameterized.product(aggregate=tuple(masked.AGGREGATES), count=(2, 4))
  def test_micro_batches_change_nothing(self, aggregate, count):
    got = update(aggregate, make_batch(), count)
    self.assertLess(error(got, update(aggregate, make_batch())), 2e-6)

  @parameterized.product(aggregate=tuple(masked.AGGREGATES), count=(1, 4))
  def test_row_order_changes_nothing(self, aggregate, count):
    order = np.random.default_rng(2).permutation(B)
    got = update(aggregate, rows(make_batch(), order), count)
    self.assertLess(error(got, update(aggregate, make_batch())), 2e-6)

  @parameterized.product(aggregate=tuple(masked.AGGREGATES))
  def test_padding_changes_nothing(self, aggregate):
    got = update(aggregate, pad(make_batch(), columns=3, empty=8), micro_batches=4)
    self.assertLess(error(got, update(aggregate, make_batch())), 2e-6)

  def test_a_mean_of_micro_batch_means_would_have_been_seen(self):
    batch = make_batch()
    halves = [update("token_mean", rows(batch, slice(i, None, 2))) for i in (0, 1)]
    mean = {name: tuple((a + b) / 2 for a, b in zip(*(half[name] for half in halves)))
            for name in halves[0]}
    self.assertGreater(error(mean, update("token_mean", batch)), 1e-2)

  def test_every_loss_teaches_something(self):
    for name, (_, gradient) in update("sequence_sum", make_batch()).items():
      self.assertGreater(np.max(np.abs(gradient)), 1e-2, name)


class DevicesTest(parameterized.TestCase):

  def test_eight_devices_equal_one(self):
    env = os.environ | {"JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "8"}
    script = f"import runpy; runpy.run_path({__file__!r})['on_devices']()"
    child = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    self.assertEqual(child.returncode, 0, child.stderr)
    errors = json.loads(child.stdout)
    self.assertLen(errors, 6)
    for case, off in errors.items():
      self.assertLess(off, 2e-6, case)


if __name__ == "__main__":
  absltest.main()
