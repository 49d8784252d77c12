"""The named configs are what transformers builds from their config.json."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from opd_jax.models import build
from opd_jax.models import configs
from opd_jax.models import hf_config
from opd_jax.models import hf_rows
from opd_jax.models import rope

PUBLIC = tuple(name for name in configs.NAMED if not name.startswith("tiny"))


def llama(**fields):
  return dict(model_type="llama", vocab_size=32, hidden_size=16, num_hidden_layers=2,
              num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
              rms_norm_eps=1e-5) | fields


class ConfigsTest(parameterized.TestCase):

  @parameterized.parameters(*configs.NAMED)
  def test_config_json_and_back_is_the_same_config(self, name):
    config = configs.NAMED[name]
    self.assertEqual(hf_config.from_hf(hf_config.to_hf(config, "float32")), config)

  @parameterized.parameters(*PUBLIC)
  def test_weights_and_rotary_angles_are_those_of_transformers(self, name):
    torch = pytest.importorskip("torch")
    import transformers
    config = configs.NAMED[name]
    raw = hf_config.to_hf(config, "float32")
    theirs = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
      model = transformers.AutoModelForCausalLM.from_config(theirs)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if config.tied_embeddings:
      del shapes["lm_head.weight"]
    # In memory transformers 5 has all experts of a layer in one tensor.
    listed = hf_rows.tensor_list(config, stacked_experts=config.num_experts > 0)
    self.assertEqual({t.name: t.shape for t in listed}, shapes)
    if config.family == "gpt2":
      return
    for length in (4096, 4097):  # both sides of the switch of Phi-4-mini
      positions = np.arange(length)[None]
      embedding = type(model.model.rotary_emb)(theirs)
      cos, sin = embedding(torch.zeros(1), torch.tensor(positions))
      got_cos, got_sin = rope.angles(config, positions, length)
      half = config.rotary_dim // 2
      # float32 rounds an angle of 4096 radians to 2e-4 whoever computes it.
      np.testing.assert_allclose(got_cos[0], cos[0, :, :half].numpy(), atol=1e-3)
      np.testing.assert_allclose(got_sin[0], sin[0, :, :half].numpy(), atol=1e-3)

  @parameterized.parameters(
      ("qwen3_1p7b", 1.72e9), ("llama3p1_8b", 8.03e9), ("phi4_mini", 3.84e9), ("phi4", 14.66e9),
      ("phi3_mini", 3.82e9), ("smollm2_135m", 134.5e6), ("gpt2", 124.4e6))
  def test_parameter_counts_are_the_published_ones(self, name, published):
    config = configs.NAMED[name]
    count = sum(int(np.prod(t.shape)) for t in hf_rows.tensor_list(config))
    self.assertAlmostEqual(count / published, 1.0, delta=0.003)
    self.assertEqual(build.count_params(config), (count, count))

  @parameterized.parameters(("qwen3_30b_a3b", 30.5e9, 3.3e9), ("qwen3_235b_a22b", 235e9, 22e9))
  def test_parameter_counts_of_mixtures_are_the_published_ones(self, name, whole, active):
    counts = build.count_params(configs.NAMED[name])
    np.testing.assert_allclose(counts, (whole, active), rtol=0.02)
    listed = hf_rows.tensor_list(configs.NAMED[name])
    self.assertEqual(sum(math.prod(t.shape) for t in listed), counts[0])

  def test_both_spellings_of_the_number_of_experts_are_read(self):
    raw = hf_config.to_hf(configs.NAMED["qwen3_30b_a3b"], "float32")
    count = raw.pop("num_experts")
    self.assertEqual(hf_config.from_hf(raw | {"num_local_experts": count}),
                     configs.NAMED["qwen3_30b_a3b"])

  @parameterized.parameters(
      (dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\] is not implemented .*only \[\] is"),
      (dict(decoder_sparse_step=2), "decoder_sparse_step=2 is not implemented .*only 1 is"),
      (dict(num_experts_per_tok=129), "num_experts_per_tok=129 of 128 experts"),
      (dict(num_experts=None), "the field 'num_local_experts' is missing"))
  def test_mixtures_that_are_not_implemented_are_refused_by_name(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      hf_config.from_hf(hf_config.to_hf(configs.NAMED["qwen3_30b_a3b"], "float32") | fields)

  def test_both_spellings_of_rotary_settings_are_read(self):
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
    old = hf_config.from_hf(llama(rope_theta=5e5, rope_scaling=scaling))
    new = hf_config.from_hf(llama(rope_parameters=scaling | {"rope_theta": 5e5}))
    self.assertEqual(old, new)
    self.assertEqual(old.rope_theta, 5e5)
    self.assertEqual(old.rope_scaling.original_positions, 16)

  def test_yarn_lengthens_what_the_model_allows(self):
    config = hf_config.from_hf(llama(rope_scaling=dict(
        type="yarn", factor=4.0, original_max_position_embeddings=64)))
    self.assertEqual(config.max_positions, 256)

  @parameterized.parameters(
      (dict(model_type="mamba"), "model_type is 'mamba'; supported are gpt2, llama, phi3, qwen2"),
      (dict(attention_bias=True), "attention_bias=True is not implemented for llama"),
      (dict(mlp_bias=True), "mlp_bias=True is not implemented"),
      (dict(hidden_act="gelu"), "hidden_act='gelu' is not implemented"),
      (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window=True"),
      (dict(quantization_config=dict(bits=4)), "quantization_config=.* is not implemented"),
      (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types=.*sliding"),
      (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not implemented"),
      (dict(rope_scaling=dict(rope_type="axial")), "RoPE scaling 'axial' is not implemented"),
      (dict(rope_scaling=dict(rope_type="linear")), "lacks its 'factor'"),
      (dict(intermediate_size=None), "the field 'intermediate_size' is missing"),
  )
  def test_what_is_not_implemented_is_refused_by_name(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      hf_config.from_hf(llama(**fields))

  def test_every_family_has_a_module(self):
    self.assertEqual(set(build.MODULES), set(hf_config.ARCHITECTURES))


if __name__ == "__main__":
  absltest.main()
