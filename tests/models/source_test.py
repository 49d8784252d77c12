"""What a config's `source` may name."""

import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import checkpoint
from opd_jax import config as experiments
from opd_jax import keys
from opd_jax import sharding
from opd_jax.models import configs
from opd_jax.models import hf
from opd_jax.models import source


class SourceTest(parameterized.TestCase):

  def load(self, name, seed=0, **kwargs):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return source.load(name, keys.root(seed), mesh, **kwargs)

  def test_random_weights_of_a_named_config_follow_the_key(self):
    loaded = self.load("random:tiny_weak")
    self.assertEqual(loaded.config, configs.NAMED["tiny_weak"])
    self.assertEmpty(loaded.tokenizer_folder)
    again, other = self.load("random:tiny_weak"), self.load("random:tiny_weak", seed=1)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    self.assertFalse(np.array_equal(other.params["embedding"], loaded.params["embedding"]))

  def test_a_folder_brings_the_weights_it_was_exported_with(self):
    loaded = self.load("random:tiny_weak")
    with tempfile.TemporaryDirectory() as room:
      folder = os.path.join(room, "weak")
      hf.export_hf(loaded.params, loaded.config, folder)
      with mock.patch.object(source, "TINY", pathlib.Path(room)):
        for name in (f"hf:{folder}", "tiny:weak"):
          got = self.load(name)
          self.assertEqual((got.config, got.tokenizer_folder), (loaded.config, folder))
          jax.tree.map(np.testing.assert_array_equal, got.params, loaded.params)
        with self.assertRaisesRegex(ValueError, "'tiny:strong'; tiny: takes one of weak"):
          self.load("tiny:strong")

  def test_a_workdir_gives_its_newest_or_its_best_checkpoint(self):
    loaded, room = self.load("random:tiny_weak"), self.create_tempdir().full_path
    hf.export_hf(loaded.params, loaded.config, f"{room}/model")
    config = experiments.on_policy(checkpoint=dict(best_metric="eval/reverse_kl", best_mode="min"))
    pathlib.Path(room, "config.json").write_text(config.to_json())
    with checkpoint.Checkpoints(room, config.checkpoint) as saved:
      for step, gap in ((1, 0.1), (2, 0.3)):
        params = jax.tree.map(lambda x: x * step, loaded.params)
        saved.save(step, {"params": params}, {}, {"eval/reverse_kl": gap})
    for name, factor in ((f"workdir:{room}", 2), (f"workdir:{room}@best", 1)):
      got = self.load(name)
      self.assertEqual((got.config, got.tokenizer_folder), (loaded.config, f"{room}/model"))
      self.assertEqual(source.outline(name), got._replace(params=None))
      np.testing.assert_array_equal(got.params["embedding"], loaded.params["embedding"] * factor)

  def test_a_fingerprint_follows_what_is_in_the_files(self):
    loaded, room = self.load("random:tiny_weak"), self.create_tempdir().full_path
    of = lambda name, seed=0: source.fingerprint(name, keys.root(seed))
    found = {of("random:tiny_weak"), of("random:tiny_weak", 1), of("random:tiny_student")}
    config = experiments.on_policy().checkpoint
    for params in (loaded.params, jax.tree.map(jnp.negative, loaded.params)):
      shutil.rmtree(f"{room}/a/checkpoints", ignore_errors=True)
      hf.export_hf(params, loaded.config, f"{room}/a/model")
      with checkpoint.Checkpoints(f"{room}/a", config) as saved:
        saved.save(1, {"params": params}, {}, {})
      shutil.copytree(f"{room}/a", f"{room}/b", dirs_exist_ok=True)
      for kind, folder in (("workdir", ""), ("hf", "/model")):
        self.assertEqual(of(f"{kind}:{room}/a{folder}"), of(f"{kind}:{room}/b{folder}"))
        found.add(of(f"{kind}:{room}/a{folder}"))
      shutil.rmtree(f"{room}/b")
    self.assertLen(found, 3 + 2 * 2)

  def test_layers_are_dropped_on_request(self):
    loaded = self.load("random:tiny_teacher", drop_layers_every=2)
    whole = configs.NAMED["tiny_teacher"].num_layers
    kept = whole - whole // 2
    self.assertEqual(loaded.config.num_layers, kept)
    self.assertEqual(loaded.params["blocks"]["mlp"]["up"].shape[0], kept)

  @parameterized.parameters(
      ("random:gpt5", "random: takes one of tiny_teacher"),
      ("hf:/no/such/folder", "/no/such/folder: no config.json"),
      ("Qwen/Qwen3-8B", "unknown model source 'Qwen/Qwen3-8B'; wanted tiny:NAME, hf:FOLDER"),
      ("", "unknown model source ''; wanted"))
  def test_anything_else_is_refused_with_what_would_do(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      self.load(name)


if __name__ == "__main__":
  absltest.main()
