"""Dropped layers and sliced vocabularies."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import keys
from opd_jax.models import build
from opd_jax.models import configs
from opd_jax.models import surgery

CONFIG = dataclasses.replace(configs.NAMED["tiny_weak"], vocab_size=48, num_layers=7,
                             tied_embeddings=False)


class SurgeryTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.params = build.init_params(CONFIG, keys.root(0))

  @parameterized.parameters((2, (0, 2, 4, 6)), (3, (0, 1, 3, 4, 6)), (7, (0, 1, 2, 3, 4, 5)))
  def test_every_nth_layer_is_left_out(self, every, kept):
    params, config = surgery.drop_layers(self.params, CONFIG, every)
    self.assertEqual(config, dataclasses.replace(CONFIG, num_layers=len(kept)))
    want = self.params | {"blocks": jax.tree.map(lambda x: x[np.array(kept)],
                                                 self.params["blocks"])}
    jax.tree.map(np.testing.assert_array_equal, params, want)

  @parameterized.parameters(-1, 1, 8)
  def test_a_number_that_leaves_nothing_or_everything_is_refused(self, every):
    with self.assertRaisesRegex(ValueError, f"drop_layers_every is {every}; .* allows 2 to 7"):
      surgery.drop_layers(self.params, CONFIG, every)

  def test_slicing_the_vocabulary_slices_the_logits(self):
    tokens, positions = np.arange(6)[None], np.arange(6)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params, config):
      model = build.build(config)
      hidden, _ = model.apply({"params": params}, tokens, positions, np.ones_like(tokens))
      return model.apply({"params": params}, hidden, method="logits")

    params, config = surgery.slice_vocab(self.params, CONFIG, 40)
    np.testing.assert_allclose(logits(params, config), logits(self.params, CONFIG)[..., :40],
                               atol=1e-6)
    with self.assertRaisesRegex(ValueError, "vocabulary of 48 to 50"):
      surgery.slice_vocab(self.params, CONFIG, 50)

  def test_extrapolation_equals_numpy_and_has_both_ends(self):
    base = build.init_params(CONFIG, keys.root(1))
    for alpha in (0.0, 0.5, 1.0, 1.5):
      found = surgery.extrapolate(self.params, CONFIG, jax.tree.map(jnp.copy, base), CONFIG, alpha)
      want = jax.tree.map(lambda b, x: np.float64(b) + alpha * (np.float64(x) - np.float64(b)),
                          base, self.params)
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, want)

  def test_a_base_of_another_shape_is_refused_and_named(self):
    params, config = surgery.drop_layers(self.params, CONFIG, 2)
    with self.assertRaisesRegex(ValueError, "same shape; .* num_layers 7 and 4"):
      surgery.extrapolate(self.params, CONFIG, params, config, 1.5)


if __name__ == "__main__":
  absltest.main()
