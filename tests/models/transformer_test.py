"""What holds for every decoder whatever its weights: masks, packing, depth, rematerialization."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import keys, sharding
from opd_jax.models import attention
from opd_jax.models import build
from opd_jax.models import configs

TINY = dataclasses.replace(configs.NAMED["tiny_weak"], vocab_size=48)
SMALL = dict(vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, head_dim=8, mlp_dim=48)
PHI = dataclasses.replace(configs.NAMED["phi3_mini"], **SMALL, num_kv_heads=2, sliding_window=4)
GPT2 = dataclasses.replace(configs.NAMED["gpt2"], **SMALL, num_kv_heads=4, max_positions=32)
MOE = dataclasses.replace(configs.NAMED["qwen3_30b_a3b"], **SMALL, num_kv_heads=2, num_experts=4,
                          experts_per_token=2)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, positions, segment_ids):
  model = build.build(config)
  hidden, _ = model.apply({"params": params}, tokens, positions, segment_ids)
  return model.apply({"params": params}, hidden, method="logits")


class TransformerTest(parameterized.TestCase):

  @parameterized.parameters(None, 1, 3)
  def test_mask_equals_a_loop(self, window):
    rng = np.random.default_rng(0)
    keys_of, index = rng.integers(0, 3, (2, 9)), 4
    queries = keys_of[:, index:index + 3]
    got = attention.seen(jnp.array(queries), jnp.array(keys_of), jnp.array(index), window)
    for b in range(2):
      for s in range(3):
        for c in range(9):
          slot = index + s
          near = window is None or slot - c < window
          want = c == slot or (c < slot and near and queries[b, s] == keys_of[b, c] != 0)
          self.assertEqual(bool(got[b, s, c]), bool(want), (b, s, c))

  @parameterized.parameters((9, 12, 16), (8, 8, 256), (1, 12, 16))
  def test_flash_attention_is_asked_for_where_it_fits_and_padded_to_even(self, s, c, dim):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q, k, v = array(2, s, 4, dim), array(2, c, 2, dim), array(2, c, 2, dim)
    mask = jnp.asarray(rng.random((2, s, c)) < 0.5).at[:, :, 0].set(True)
    want = attention.attend(q, k, v, attention.Mask(mask))
    asked = []
    xla = jax.nn.dot_product_attention

    def stand_in(q, k, v, mask, implementation):
      asked.append((implementation, q.shape[1], k.shape[1], mask.shape))
      return xla(q, k, v, mask=mask, implementation="xla")

    with mock.patch.object(jax, "default_backend", return_value="gpu"), \
        mock.patch.object(jax.nn, "dot_product_attention", stand_in):
      got = attention.attend(q, k, v, attention.Mask(mask))
    fits = s == 9
    self.assertEqual(asked, [("cudnn", 10, 12, (2, 1, 10, 12)) if fits else
                             ("xla", s, c, (2, 1, s, c))])
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=1e-2)

  @parameterized.parameters(1, 3, 5, 11)
  def test_attention_by_blocks_of_queries_is_the_same_and_so_is_its_gradient(self, block):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = array(2, 11, 4, 8), array(2, 13, 2, 8), array(2, 13, 2, 8)
    mask = jnp.asarray(rng.random((2, 11, 13)) < 0.5).at[:, :, 0].set(True)
    weight = array(2, 11, 4, 8)

    def run():
      return jax.value_and_grad(lambda x: jnp.vdot(
          attention.attend(*x, attention.Mask(mask)), weight))((q, k, v))

    want = run()
    with mock.patch.object(attention, "SCORES", 2 * 4 * 13 * block), \
        mock.patch.object(jax.lax, "map", wraps=jax.lax.map) as mapped:
      got = run()
    self.assertEqual(mapped.called, block < 11)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)

  @parameterized.parameters((90, 128), (200, 64))
  def test_the_kernel_of_tpus_is_the_same_and_so_is_its_gradient(self, length, dim):
    rng = np.random.default_rng(0)
    array = lambda heads: jnp.asarray(rng.normal(size=(3, length, heads, dim)), jnp.float32)
    q, k, v, weight = array(4), array(2), array(2), array(4)
    segments = jnp.asarray(np.repeat([[0, 1, 2], [1, 1, 1], [0, 3, 0]], length // 3 + 1, axis=1)
                           [:, :length])
    weight *= (segments > 0)[:, :, None, None]  # padding may differ
    mask = attention.seen(segments, segments, jnp.int32(0), None)

    def run(attend, how):
      return jax.value_and_grad(lambda x: jnp.vdot(attend(*x, how), weight))((q, k, v))

    want = run(attention.in_blocks, mask)
    with mock.patch.object(attention, "BLOCK", 128), jax.set_mesh(sharding.make_mesh(1, 1)):
      got = jax.jit(lambda: run(functools.partial(attention.splash, interpret=True), segments))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, want)

  def test_the_kernel_of_tpus_is_asked_for_where_it_fits(self):
    asked = []

    def call(dtype, cached, window, dim=64):
      q, ids = jnp.zeros((1, 6, 2, dim), dtype), jnp.ones((1, 6), jnp.int32)
      held = jnp.ones((1, 6 + cached), jnp.int32)
      k = jnp.zeros((1, 6 + cached, 2, dim), dtype)
      with mock.patch.object(jax, "default_backend", return_value="tpu"), \
          mock.patch.object(attention, "splash", lambda q, *_: asked.append(1) or q):
        attention.attend(q, k, k, attention.mask(ids, held, jnp.int32(0), window))
      return bool(asked) and asked.pop() == 1

    self.assertTrue(call(jnp.bfloat16, False, None))
    self.assertTrue(call(jnp.bfloat16, False, 6))
    for other in ((jnp.float32, False, None), (jnp.bfloat16, True, None),
                  (jnp.bfloat16, False, 5), (jnp.bfloat16, False, None, 96)):
      self.assertFalse(call(*other))

  @parameterized.named_parameters(("qwen3", TINY), ("phi3_window", PHI), ("gpt2", GPT2),
                                  ("qwen3_moe", MOE))
  def test_packed_segments_equal_separate_rows(self, config):
    params = build.init_params(config, keys.root(0))
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 48, 7), rng.integers(0, 48, 6)
    packed = np.concatenate([[0, 0], a, b, [0]])[None]
    segment_ids = np.array([0] * 2 + [1] * 7 + [2] * 6 + [0])[None]
    positions = np.concatenate([[0, 0], np.arange(7), np.arange(6), [0]])[None]
    got = logits(config, params, packed, positions, segment_ids)[0]
    for row, start in ((a, 2), (b, 9)):
      alone = logits(config, params, row[None], np.arange(len(row))[None],
                     np.ones((1, len(row)), int))[0]
      np.testing.assert_allclose(got[start:start + len(row)], alone, atol=1e-5)

  def test_program_does_not_grow_with_depth(self):
    def program(depth):
      config = dataclasses.replace(TINY, num_layers=depth)
      model = build.build(config)
      params = jax.eval_shape(lambda: build.init_params(config, keys.root(0)))
      token = jax.ShapeDtypeStruct((2, 8), jnp.int32)
      loss = lambda p, t: jnp.sum(model.apply({"params": p}, t, t, t)[0])
      return jax.jit(jax.grad(loss)).lower(params, token).as_text().count("\n")
    self.assertEqual(program(2), program(24))

  def test_rematerialization_changes_no_gradient(self):
    params = build.init_params(TINY, keys.root(0))
    tokens = np.random.default_rng(0).integers(0, 48, (2, 8))
    positions, ones = np.tile(np.arange(8), (2, 1)), np.ones((2, 8), int)

    def gradient(remat):
      model = build.build(TINY, remat=remat)
      loss = lambda p: jnp.mean(model.apply({"params": p}, tokens, positions, ones)[0] ** 2)
      return jax.jit(jax.grad(loss))(params)

    want = gradient("none")
    for remat in ("full", "dots"):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(remat), want)
    with self.assertRaisesRegex(ValueError, "model.remat is 'half'; it must be one of"):
      gradient("half")

  def test_a_token_beyond_the_learned_positions_is_visible(self):
    params = build.init_params(GPT2, keys.root(0))
    token = np.zeros((1, 1), int)
    self.assertTrue(np.isnan(logits(GPT2, params, token, token + 32, token + 1)).all())

  def test_head_is_the_matrix_behind_logits(self):
    for config in (TINY, PHI):
      params = build.init_params(config, keys.root(0))
      hidden = np.random.default_rng(0).normal(size=(1, 2, config.embed_dim)).astype(np.float32)
      model = build.build(config)
      want = jax.jit(lambda p, h: model.apply({"params": p}, h, method="logits"))(params, hidden)
      np.testing.assert_allclose(hidden @ build.head(params, config), want, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
