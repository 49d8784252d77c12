"""An update is the same however the batch is cut, and is refused when it would do harm."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as configs
from opd_jax import sharding, train_state
from opd_jax.losses import masked
from opd_jax.rollouts.batch import Batch

MESH = sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def optimizer_config(**changes):
  return configs.offline(optimizer=changes).optimizer


def make_batch(learn):
  rows, width = learn.shape
  tokens = np.random.default_rng(0).integers(0, 9, (rows, width))
  return Batch(prompt=tokens[:, :1], prompt_mask=np.ones((rows, 1), bool), response=tokens,
               mask=np.ones_like(learn), learn=learn)


def make_loss(aggregate):
  def loss(params, batch, constants):
    logprobs = jax.nn.log_softmax(params["w"])[batch.response] + constants
    return masked.AGGREGATES[aggregate](-logprobs, batch.learn), {"logprobs": logprobs}
  return loss


def describe(batch, columns):
  first = jnp.arange(batch.learn.shape[1]) == 0
  return {"mean": masked.token_mean(columns["logprobs"], batch.learn),
          "mean/first": masked.token_mean(columns["logprobs"], batch.learn & first),
          "max": jnp.max(columns["logprobs"]), "unlearned": jnp.sum(~batch.learn),
          "row": columns["logprobs"][5, 3]}


def fresh(optimizer, ema=False):
  params = {"w": jnp.linspace(-1.0, 1.0, 9), "norm": {"scale": jnp.ones((2, 3))}}
  return train_state.create(params, optimizer, ema, MESH)


class TrainStepTest(parameterized.TestCase):

  @parameterized.product(aggregate=tuple(masked.AGGREGATES), micro_batches=(2, 4))
  def test_micro_batches_change_nothing(self, aggregate, micro_batches):
    learn = np.arange(6) < np.array([6, 1, 3, 0, 2, 5, 4, 6])[:, None]  # ragged, one row empty
    optimizer = train_state.make_optimizer(optimizer_config(learning_rate=0.1), 10)
    results = []
    for count in (1, micro_batches):
      step = train_state.make_train_step(make_loss(aggregate), describe, optimizer,
                                         masked.COUNTS[aggregate], count, 0.0)
      results.append(jax.jit(step)(fresh(optimizer), make_batch(learn), 0.0))
    (state, metrics), (state_m, metrics_m) = results
    np.testing.assert_allclose(state.params["w"], state_m.params["w"], atol=1e-6)
    self.assertLen(metrics, 8)
    for name in metrics:
      np.testing.assert_allclose(metrics[name], metrics_m[name], rtol=1e-5, err_msg=name)

  @parameterized.parameters("nothing to learn", "nan")
  def test_a_harmful_update_changes_nothing_but_the_step(self, why):
    learn = np.full((2, 4), why == "nan")
    optimizer = train_state.make_optimizer(
        optimizer_config(learning_rate=0.1, weight_decay=0.5), 10)
    step = train_state.make_train_step(make_loss("token_mean"), describe, optimizer,
                                       masked.tokens, 1, 0.05)
    before = fresh(optimizer, ema=True)
    after, metrics = jax.jit(step)(before, make_batch(learn), np.nan if why == "nan" else 0.0)
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=1), after.replace(step=1))
    self.assertEqual(int(after.step), 1)
    self.assertEqual(float(metrics["update/skipped"]), 1.0)
    if why == "nan":
      folder = self.create_tempdir().full_path
      with self.assertRaisesRegex(FloatingPointError, "bad_batch_step_000007.npz"):
        train_state.check_finite(metrics, make_batch(learn), folder, 7)
      np.testing.assert_array_equal(np.load(f"{folder}/bad_batch_step_000007.npz")["learn"], learn)
      with self.assertRaises(FloatingPointError):  # of guarded data nothing but ids may be left
        train_state.check_finite(metrics, make_batch(learn), folder, 8, ["one", "two"])
      left = np.load(f"{folder}/bad_batch_step_000008.npz")
      self.assertEqual((list(left), list(left["ids"])), (["ids"], ["one", "two"]))

  def test_ema_moves_five_percent_towards_the_new_parameters(self):
    optimizer = train_state.make_optimizer(optimizer_config(learning_rate=0.1), 10)
    before = fresh(optimizer, ema=True)
    after = train_state.apply_gradients(before, jax.tree.map(jnp.ones_like, before.params),
                                        optimizer, jnp.array(True), 0.05)
    np.testing.assert_allclose(
        after.ema["w"], 0.95 * before.ema["w"] + 0.05 * after.params["w"], rtol=1e-6)

  def test_norms_do_not_decay_and_matrices_do(self):
    optimizer = train_state.make_optimizer(
        optimizer_config(learning_rate=0.1, weight_decay=0.5), 10)
    state = fresh(optimizer)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    after = train_state.apply_gradients(state, zero, optimizer, jnp.array(True), 0.0)
    np.testing.assert_array_equal(after.params["norm"]["scale"], state.params["norm"]["scale"])
    np.testing.assert_allclose(after.params["w"], 0.95 * state.params["w"], rtol=1e-5)

  def test_schedules_warm_up_and_come_down(self):
    for name, end in (("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)):
      rate = train_state.make_schedule(
          optimizer_config(learning_rate=1.0, schedule=name, warmup_steps=10), 110)
      np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(110)], [0, 0.5, 1.0, end],
                                 atol=1e-6)
    with self.assertRaisesRegex(ValueError, "constant"):
      train_state.make_schedule(optimizer_config(schedule="square"), 10)


class MeshTest(absltest.TestCase):

  def test_impossible_sizes_are_explained(self):
    for sizes in (dict(data=3), dict(replica=2), dict(data=0), dict(data=-2, model=-1),
                  dict(data=0, model=-1), dict(data=-1, model=-1)):
      want = " x ".join(f"{axis}={size}" for axis, size in (
          dict(replica=1, data=-1, model=1) | sizes).items())
      with self.assertRaisesRegex(ValueError, f"mesh: {want} is not the number of devices, 1"):
        sharding.make_mesh(**sizes, devices=jax.devices()[:1])

  def test_a_dimension_that_its_axis_does_not_divide_replicates(self):
    mesh = jax.sharding.AbstractMesh((2, 2, 4), ("replica", "data", "model"))
    spec = lambda *names: tuple(sharding.spec(names, (6, 8, 2, 32), mesh))
    self.assertEqual(spec("layers", "embed", "kv_heads", "head_dim"), (None, "data", None, None))
    self.assertEqual(spec("batch", "batch"), (None, ("replica", "data")))  # 6 rows on 2 x 2, and 8


if __name__ == "__main__":
  absltest.main()
