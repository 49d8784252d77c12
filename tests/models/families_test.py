"""Every family and rotary scaling equals transformers, in, out and while decoding."""

import copy
import functools
import os
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import build
from opd_jax.models import hf
from opd_jax.models import layers

torch = pytest.importorskip("torch")
import transformers  # pylint: disable=g-import-not-at-top,wrong-import-position

SIZES = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
# Phi-4-mini rotates three quarters of each head: here 8 of 12 elements, 4 frequencies.
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.1, 1.3, 1.5],
                long_factor=[1.0, 2.0, 4.0, 8.0])

# (transformers config, its fields); sequences have 24 tokens.
CASES = {
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3_untied_yarn": ("Qwen3", dict(head_dim=16, rope_theta=1e6, rope_scaling=YARN)),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=24, num_local_experts=8,
                                   num_experts_per_tok=3, norm_topk_prob=True)),
    "qwen3_moe_shares": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=24,
                                          num_local_experts=6, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen2_yarn": ("Qwen2", dict(rope_scaling=YARN)),
    "llama": ("Llama", dict(rope_theta=5e5)),
    "smollm2": ("Llama", dict(num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-5,
                              rope_theta=1e5, tie_word_embeddings=True)),
    "llama_llama3": ("Llama", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama_linear": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama_dynamic": ("Llama", dict(max_position_embeddings=16,
                                    rope_scaling=dict(rope_type="dynamic", factor=4.0))),
    "phi3_window": ("Phi3", dict(sliding_window=7)),
    "phi4": ("Phi3", dict(rope_theta=250_000.0)),
    "phi4_mini_short": ("Phi3", dict(
        original_max_position_embeddings=32, partial_rotary_factor=0.7, rope_scaling=LONGROPE,
        tie_word_embeddings=True, sliding_window=100)),
    "phi4_mini_long": ("Phi3", dict(
        original_max_position_embeddings=16, partial_rotary_factor=0.7, rope_scaling=LONGROPE,
        tie_word_embeddings=True)),
    "gpt2": ("GPT2", {}),
}
NAMES = tuple(CASES)
LENGTH, PADDING = 24, 5


class Case:
  """A random torch model, its folder, and ours read from that folder."""

  def __init__(self, name: str, room: str):
    family, fields = CASES[name]
    sizes = SIZES
    if family == "GPT2":
      sizes = dict(vocab_size=64, n_embd=48, n_layer=3, n_head=4, n_positions=64,
                   bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    fields = copy.deepcopy(fields)  # transformers writes into the rope dict it is given
    hf_config = getattr(transformers, f"{family}Config")(**(sizes | fields))
    self.torch = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    for weight in self.torch.parameters():  # every weight matters: norms and biases too
      torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.15)
    self.folder = os.path.join(room, name)
    self.torch.save_pretrained(self.folder, max_shard_size="30KB")
    self.config = hf.load_config(self.folder)
    self.params = hf.import_hf(self.folder)
    model = build.build(self.config)

    @jax.jit
    def forward(params, tokens, positions, segment_ids, cache=None):
      hidden, cache = model.apply({"params": params}, tokens, positions, segment_ids, cache)
      return model.apply({"params": params}, hidden, method="logits"), cache

    self.forward = forward


def inputs():
  """Two rows, the second left-padded: tokens, mask, positions."""
  tokens = np.random.default_rng(0).integers(0, 64, (2, LENGTH))
  mask = np.arange(LENGTH) >= np.array([[0], [PADDING]])
  return tokens, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def torch_logits(model, tokens, mask, positions):
  with torch.no_grad():
    return model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)),
                 position_ids=torch.tensor(positions)).logits.numpy()


class FamiliesTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.room = tempfile.TemporaryDirectory()
    cls.case = staticmethod(functools.cache(lambda name: Case(name, cls.room.name)))

  @classmethod
  def tearDownClass(cls):
    cls.room.cleanup()
    super().tearDownClass()

  @parameterized.parameters(*NAMES)
  def test_logits_equal_transformers_with_and_without_left_padding(self, name):
    case = self.case(name)
    tokens, mask, positions = inputs()
    want = torch_logits(case.torch, tokens, mask, positions)
    got, _ = case.forward(case.params, tokens, positions, mask.astype(np.int32))
    self.assertGreater(np.std(want), 0.1)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    np.testing.assert_allclose(got[1, PADDING:], want[1, PADDING:], atol=1e-4)

  @parameterized.parameters(*NAMES)
  def test_cached_decode_equals_full_forward(self, name):
    case = self.case(name)
    tokens, mask, positions = inputs()
    segment_ids = mask.astype(np.int32)
    want, _ = case.forward(case.params, tokens, positions, segment_ids)
    cache = layers.empty_cache(case.config, 2, LENGTH, jnp.float32)
    got = []
    for start, stop in ((0, 16), *((t, t + 1) for t in range(16, LENGTH))):
      logits, cache = case.forward(case.params, tokens[:, start:stop], positions[:, start:stop],
                                   segment_ids[:, start:stop], cache)
      got.append(logits)
    got = np.concatenate(got, axis=1)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    np.testing.assert_allclose(got[1, PADDING:], want[1, PADDING:], atol=2e-5)

  @parameterized.parameters(*NAMES)
  def test_import_export_import_is_bit_exact_and_transformers_loads_it(self, name):
    case = self.case(name)
    folder = os.path.join(self.room.name, f"{name}_exported")
    hf.export_hf(case.params, case.config, folder, max_shard_bytes=30_000)
    self.assertEqual(hf.load_config(folder), case.config)
    jax.tree.map(np.testing.assert_array_equal, hf.import_hf(folder), case.params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    state = exported.state_dict()
    for key, weight in case.torch.state_dict().items():
      np.testing.assert_array_equal(state[key].numpy(), weight.numpy(), err_msg=key)
    np.testing.assert_allclose(torch_logits(exported, *inputs()),
                               torch_logits(case.torch, *inputs()), atol=1e-6)

  @parameterized.parameters("qwen3", "phi4_mini_long", "gpt2")
  def test_bfloat16_compute_is_close_to_float32(self, name):
    case = self.case(name)
    tokens, mask, positions = inputs()
    want, _ = case.forward(case.params, tokens, positions, mask.astype(np.int32))
    model = build.build(case.config, jnp.bfloat16)

    @jax.jit
    def half(params):
      hidden, _ = model.apply({"params": params}, tokens, positions, mask.astype(np.int32))
      return hidden, model.apply({"params": params}, hidden, method="logits")

    hidden, got = half(case.params)
    self.assertEqual((hidden.dtype, got.dtype), (jnp.bfloat16, jnp.float32))
    self.assertLess(np.std((got - want)[mask]), 0.03 * np.std(want[mask]))


if __name__ == "__main__":
  absltest.main()
