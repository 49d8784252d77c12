"""The form for decoding computes what the model computes, and bfloat16 is rounded only once."""

import dataclasses

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import keys
from opd_jax.models import build, configs, decoding, layers

SMALL = dict(vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, head_dim=8, mlp_dim=48)
QWEN2 = dataclasses.replace(configs.NAMED["qwen2p5_7b"], **SMALL, num_kv_heads=2)
GPT2 = dataclasses.replace(configs.NAMED["gpt2"], **SMALL, num_kv_heads=4, max_positions=40)
MOE = dataclasses.replace(configs.NAMED["qwen3_30b_a3b"], **SMALL, num_kv_heads=2, num_experts=4,
                          experts_per_token=2)


class DecodingTest(parameterized.TestCase):

  @parameterized.product(config=(QWEN2, GPT2, MOE), dtype=("float32", "bfloat16"))
  def test_unrolled_layers_equal_scanned_ones(self, config, dtype):
    model, params = build.build(config, jnp.dtype(dtype)), build.init_params(config, keys.root(0))
    tokens = np.random.default_rng(0).integers(0, 48, (2, 9))
    positions, ones = np.tile(np.arange(9), (2, 1)), np.ones((2, 9), int)

    def logits(model, params):
      hidden, _ = model.apply({"params": params}, tokens, positions, ones)
      return model.apply({"params": params}, hidden, method="logits")

    want = jax.jit(lambda p: logits(model, p))(params)
    ready, alone = decoding.preparation(model)(params), decoding.unrolled(model)
    got = jax.jit(lambda p: logits(alone, p))(ready)
    np.testing.assert_allclose(got, want, atol=1e-6 if dtype == "float32" else 1e-2)
    kernel = ready["blocks"]["layer_1"]["attention"]["query"]
    self.assertEqual(kernel.dtype, dtype)
    np.testing.assert_array_equal(
        kernel, params["blocks"]["attention"]["query"][1].astype(dtype))

  def test_sums_of_bfloat16_are_rounded_once_forward_and_backward(self):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    x, kernel, weight = array(2, 3, 64), array(64, 2, 5), array(2, 3, 2, 5)

    def both(f):
      loss = lambda x, kernel: jnp.sum((f(x, kernel) * weight).astype(jnp.float32))
      return f(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)

    got = both(lambda x, kernel: layers.dense("bsd,dnh->bsnh", x, kernel))
    wide = lambda *arrays: [y.astype(jnp.float32) for y in arrays]
    want = (jnp.einsum("bsd,dnh->bsnh", *wide(x, kernel)),
            jnp.einsum("bsnh,dnh->bsd", *wide(weight, kernel)),
            jnp.einsum("bsd,bsnh->dnh", *wide(x, weight)))
    for a, b in zip(got, want):
      self.assertEqual(a.dtype, jnp.bfloat16)
      np.testing.assert_allclose(a.astype(np.float32), b, rtol=2 ** -8, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
