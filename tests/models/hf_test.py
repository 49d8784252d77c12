"""Folders come and go bit for bit, and broken ones say what is wrong with them."""

import dataclasses
import json
import os
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from opd_jax import keys
from opd_jax.models import build
from opd_jax.models import configs
from opd_jax.models import hf
from opd_jax.models import tensors

CONFIG = dataclasses.replace(configs.NAMED["tiny_weak"], vocab_size=48)


class FakeTokenizer:
  eos_ids = (2, 5)
  pad_id = 3

  def save(self, folder):
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
      f.write("{}")


class HfTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    room = tempfile.TemporaryDirectory()
    self.addCleanup(room.cleanup)
    self.folder = os.path.join(room.name, "model")
    self.params = build.init_params(CONFIG, keys.root(0))
    hf.export_hf(self.params, CONFIG, self.folder)

  def rewrite(self, change):
    """Rewrites the weights with the safetensors library itself."""
    path = os.path.join(self.folder, tensors.SINGLE)
    weights = load_file(path)
    change(weights)
    save_file(weights, path)

  def read_json(self, name):
    with open(os.path.join(self.folder, name)) as f:
      return json.load(f)

  def test_the_safetensors_library_reads_what_is_written(self):
    weights = load_file(os.path.join(self.folder, tensors.SINGLE))
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], self.params["embedding"])
    np.testing.assert_array_equal(weights["model.layers.1.mlp.up_proj.weight"],
                                  self.params["blocks"]["mlp"]["up"][1].T)

  def test_what_the_safetensors_library_writes_is_read(self):
    self.rewrite(lambda weights: None)
    jax.tree.map(np.testing.assert_array_equal, hf.import_hf(self.folder), self.params)

  def test_shards_and_their_index_come_back_bit_for_bit(self):
    hf.export_hf(self.params, CONFIG, self.folder, max_shard_bytes=40_000)
    files = os.listdir(self.folder)
    index = self.read_json(tensors.INDEX)
    self.assertNotIn(tensors.SINGLE, files)
    self.assertEqual(set(index["weight_map"].values()),
                     {name for name in files if name.endswith(".safetensors")})
    sizes = [os.path.getsize(os.path.join(self.folder, name))
             for name in set(index["weight_map"].values())]
    self.assertLess(max(sizes), 45_000)
    jax.tree.map(np.testing.assert_array_equal, hf.import_hf(self.folder), self.params)

  def test_bfloat16_survives_float32_masters(self):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
    hf.export_hf(half, CONFIG, self.folder)
    self.assertEqual(self.read_json("config.json")["torch_dtype"], "bfloat16")
    before = load_file(os.path.join(self.folder, tensors.SINGLE))
    self.assertEqual(before["model.norm.weight"].dtype, ml_dtypes.bfloat16)
    hf.export_hf(hf.import_hf(self.folder), CONFIG, self.folder, dtype=jnp.bfloat16)
    after = load_file(os.path.join(self.folder, tensors.SINGLE))
    for name, weight in before.items():
      np.testing.assert_array_equal(after[name], weight)
    half_again = hf.import_hf(self.folder, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, half_again, half)

  def test_tokenizer_and_its_ids_are_saved(self):
    hf.export_hf(self.params, CONFIG, self.folder, FakeTokenizer())
    self.assertIn("tokenizer.json", os.listdir(self.folder))
    for name in ("config.json", "generation_config.json"):
      raw = self.read_json(name)
      self.assertEqual((raw["eos_token_id"], raw["pad_token_id"]), ([2, 5], 3))

  def test_a_folder_that_is_no_model_is_not_replaced(self):
    other = os.path.join(os.path.dirname(self.folder), "thesis")
    os.mkdir(other)
    with open(os.path.join(other, "chapter1.txt"), "w") as f:
      f.write("years of work")
    with self.assertRaisesRegex(ValueError, "is no exported model"):
      hf.export_hf(self.params, CONFIG, other)
    self.assertEqual(os.listdir(other), ["chapter1.txt"])

  def test_names_without_the_model_prefix_and_old_buffers_are_read(self):
    def change(weights):
      for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)
      weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
      weights["lm_head.weight"] = weights["embed_tokens.weight"]  # tied, yet saved
    self.rewrite(change)
    jax.tree.map(np.testing.assert_array_equal, hf.import_hf(self.folder), self.params)

  def test_the_original_gpt2_files_are_read(self):
    config = dataclasses.replace(configs.NAMED["gpt2"], vocab_size=48, embed_dim=64, num_layers=2,
                                 num_heads=1, num_kv_heads=1, mlp_dim=128, max_positions=16)
    params = build.init_params(config, keys.root(0))
    hf.export_hf(params, config, self.folder)

    def change(weights):  # no prefix, and the causal mask of each layer
      for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
      for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)

    self.rewrite(change)
    jax.tree.map(np.testing.assert_array_equal, hf.import_hf(self.folder), params)

  @parameterized.parameters("pytorch_model.bin", "model.pt", "consolidated.00.pth")
  def test_a_pickle_is_refused(self, name):
    os.rename(os.path.join(self.folder, tensors.SINGLE), os.path.join(self.folder, name))
    with self.assertRaisesRegex(ValueError, f"pickle .*{name}.* refused; convert it"):
      hf.import_hf(self.folder)

  def test_no_weights_and_no_config_are_named(self):
    os.remove(os.path.join(self.folder, tensors.SINGLE))
    with self.assertRaisesRegex(ValueError, "no model.safetensors and no model.safetensors.index"):
      hf.import_hf(self.folder)
    os.remove(os.path.join(self.folder, "config.json"))
    with self.assertRaisesRegex(ValueError, "no config.json"):
      hf.load_config(self.folder)

  def test_missing_unexpected_and_misshaped_tensors_are_named(self):
    self.rewrite(lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with self.assertRaisesRegex(ValueError, r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
      hf.import_hf(self.folder)
    hf.export_hf(self.params, CONFIG, self.folder)
    self.rewrite(lambda w: w.update({"model.layers.1.mlp.router": np.zeros(2, np.float32)}))
    with self.assertRaisesRegex(ValueError, r"unexpected 1 .*model\.layers\.1\.mlp\.router"):
      hf.import_hf(self.folder)
    hf.export_hf(self.params, CONFIG, self.folder)
    self.rewrite(lambda w: w.update({"model.norm.weight": np.zeros(7, np.float32)}))
    with self.assertRaisesRegex(ValueError, r"model\.norm\.weight is \[7\], .* asks for \[64\]"):
      hf.import_hf(self.folder)

  def test_a_quantized_tensor_is_refused(self):
    self.rewrite(lambda w: w.update({"model.norm.weight": np.zeros(64, np.int8)}))
    with self.assertRaisesRegex(ValueError, "model.norm.weight is stored as I8"):
      hf.import_hf(self.folder)

  def test_a_file_that_was_cut_off_is_named(self):
    path = os.path.join(self.folder, tensors.SINGLE)
    os.truncate(path, os.path.getsize(path) - 10)
    with self.assertRaisesRegex(ValueError, "cut off inside tensor 'model.norm.weight'"):
      hf.import_hf(self.folder)
    with open(path, "wb") as f:
      f.write(b"not safetensors at all")
    with self.assertRaisesRegex(ValueError, "not a whole safetensors file"):
      hf.import_hf(self.folder)

  @parameterized.parameters("gone.safetensors", "../outside.safetensors")
  def test_an_index_may_only_name_files_of_its_folder(self, name):
    os.remove(os.path.join(self.folder, tensors.SINGLE))
    with open(os.path.join(self.folder, tensors.INDEX), "w") as f:
      json.dump({"weight_map": {"model.norm.weight": name}}, f)
    with self.assertRaisesRegex(ValueError, "is not a file of that folder"):
      hf.import_hf(self.folder)

  @parameterized.parameters(
      ('{"weight_map": {"model.norm', "index.json is not JSON .*cut off, copy it again"),
      ("{}", "index.json has no weight_map"), ("[]", "index.json has no weight_map"),
      ('{"weight_map": {}}', "index.json has no weight_map"))
  def test_a_broken_index_is_named(self, text, message):
    os.remove(os.path.join(self.folder, tensors.SINGLE))
    with open(os.path.join(self.folder, tensors.INDEX), "w") as f:
      f.write(text)
    with self.assertRaisesRegex(ValueError, f"{self.folder}.*{message}"):
      hf.import_hf(self.folder)


if __name__ == "__main__":
  absltest.main()
