"""Checkpoints are whole, keep what they promise, and survive donation."""

import json
import os
import pathlib
import resource
import subprocess
import sys

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import checkpoint, sharding, train_state
from opd_jax import config as configs

MESH = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
OPTIMIZER = train_state.make_optimizer(configs.offline().optimizer, 10)


def state_at(value, ema=True):
  params = {"a": {"scale": jnp.full((2, 3), value)}, "w": jnp.arange(4.0) + value}
  return train_state.create(params, OPTIMIZER, ema, MESH)


class CheckpointTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = self.create_tempdir().full_path

  def open(self, **changes):
    return checkpoint.Checkpoints(self.workdir, configs.offline(checkpoint=changes).checkpoint)

  def test_the_whole_state_comes_back_with_its_data_position(self):
    for ema in (True, False):
      state = state_at(3.0, ema).replace(step=jnp.array(7 + ema, jnp.int32))
      with self.open() as saved:
        saved.save(7 + ema, state, {"rows": {"next": 12}, "dropped": 1}, {"eval/mean@8": 0.5})
      with self.open() as saved:
        step, found, data = saved.restore(state_at(0.0, ema), 10)
      self.assertEqual((step, data), (7 + ema, {"rows": {"next": 12}, "dropped": 1}))
      jax.tree.map(np.testing.assert_array_equal, state, found)
      self.workdir = self.create_tempdir().full_path

  def test_a_state_donated_right_after_saving_is_saved_as_it_was(self):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = state_at(3.0)
    with self.open() as saved:
      saved.save(1, state, {}, {})
      change(state)
    with self.open() as saved:
      _, found, _ = saved.restore(state_at(0.0), 10)
    jax.tree.map(np.testing.assert_array_equal, state_at(3.0), found)

  def kept(self):
    return sorted(int(n) for n in os.listdir(f"{self.workdir}/checkpoints") if n.isdigit())

  @parameterized.parameters(("max", 2), ("min", 3))
  def test_the_last_and_the_best_are_kept_and_the_best_is_found(self, mode, best):
    settings = dict(keep_last=2, keep_best=1, best_metric="eval/reverse_kl", best_mode=mode)
    scores = {1: 0.4, 2: 0.9, 3: 0.2, 4: np.nan, 5: None, 6: 0.3, 7: 0.5}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):  # the best of an earlier process counts
      with self.open(**settings) as saved:
        for step in steps:
          found = {} if scores[step] is None else {"eval/reverse_kl": scores[step]}
          saved.save(step, state_at(float(step)), {}, found)
    self.assertEqual(self.kept(), [best, 6, 7])
    params = state_at(0.0).params
    with self.assertRaisesRegex(ValueError, "no config.json"):
      checkpoint.restore_params(self.workdir, params, best=True)
    config = configs.on_policy(checkpoint=settings)
    pathlib.Path(self.workdir, "config.json").write_text(config.to_json())
    found = checkpoint.restore_params(self.workdir, params, best=True)
    jax.tree.map(np.testing.assert_array_equal, state_at(float(best)).params, found)

  def test_without_an_evaluated_checkpoint_none_is_the_best(self):
    with self.open() as saved:
      saved.save(1, state_at(1.0), {}, {})
    pathlib.Path(self.workdir, "config.json").write_text(json.dumps(
        {"checkpoint": configs.offline().checkpoint.to_dict()}))
    with self.assertRaisesRegex(ValueError, "has a finite eval/mean@8.*leave out @best"):
      checkpoint.restore_params(self.workdir, state_at(0.0).params, best=True)

  def test_fewer_steps_than_are_done_are_refused_with_both_numbers(self):
    with self.open() as saved:
      saved.save(6, state_at(1.0), {}, {})
    with self.open() as saved:
      with self.assertRaisesRegex(ValueError, "total_steps is 3, but .* holds 6 updates"):
        saved.restore(state_at(0.0), 3)
      self.assertEqual(saved.restore(state_at(0.0), 6)[0], 6)

  def test_a_half_written_checkpoint_is_not_seen(self):
    with self.open() as saved:
      saved.save(1, state_at(1.0), {}, {})
    os.makedirs(f"{self.workdir}/checkpoints/2.orbax-checkpoint-tmp/state")
    with self.open() as saved:
      self.assertEqual(saved.restore(state_at(0.0), 10)[0], 1)

  def test_a_full_disk_is_said_clearly_and_the_last_whole_checkpoint_stays(self):
    done = subprocess.run([sys.executable, __file__, self.workdir], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])})
    self.assertRegex(done.stdout, "could not be written.*step 1 is whole.*reason", done.stderr)
    with self.open() as saved:
      step, found, _ = saved.restore(state_at(0.0), 10)
    self.assertEqual(step, 1)
    jax.tree.map(np.testing.assert_array_equal, state_at(1.0), found)

  def test_no_checkpoint_is_none(self):
    with self.open() as saved:
      self.assertIsNone(saved.restore(state_at(0.0), 10))

  def test_parameters_alone_can_be_read(self):
    with self.open() as saved:
      saved.save(3, state_at(3.0), {}, {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                        state_at(0.0).params)
    found = checkpoint.restore_params(self.workdir, like)
    jax.tree.map(np.testing.assert_array_equal, state_at(3.0).params, found)
    with self.assertRaisesRegex(ValueError, "no checkpoint in"):
      checkpoint.restore_params(self.create_tempdir().full_path, like)


def fill_the_disk(workdir):
  """Saves a checkpoint, then another when no file may grow beyond 100 bytes."""
  config = configs.offline().checkpoint
  with checkpoint.Checkpoints(workdir, config) as saved:
    saved.save(1, state_at(1.0), {}, {})
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
  try:
    with checkpoint.Checkpoints(workdir, config) as saved:
      saved.save(2, state_at(2.0), {}, {})
  except OSError as error:
    print(error)


if __name__ == "__main__":
  if len(sys.argv) > 1:  # in a process of its own: the limit would hit the test runner too
    fill_the_disk(sys.argv[1])
  else:
    absltest.main()
