"""The aggregations equal a loop, and count what they say they count."""

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax.losses import masked

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6)).astype(np.float32)
# Holes are allowed (a dropped token), and the third row is empty.
MASK = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
                bool)


def loop(aggregate, x, mask):
  """Each aggregation from its definition, in float64."""
  rows = [[float(v) for v, real in zip(*row) if real] for row in zip(x, mask)]
  rows = [row for row in rows if row]
  if not rows:
    return 0.0
  if aggregate == "token_mean":
    return sum(map(sum, rows)) / sum(map(len, rows))
  if aggregate == "sequence_mean":
    return sum(sum(row) / len(row) for row in rows) / len(rows)
  return sum(map(sum, rows)) / len(rows)


class MaskedTest(parameterized.TestCase):

  @parameterized.product(aggregate=tuple(masked.AGGREGATES), rows=(4, 3, 1))
  def test_aggregation_equals_a_loop(self, aggregate, rows):
    got = jax.jit(masked.AGGREGATES[aggregate])(X[:rows], MASK[:rows])
    np.testing.assert_allclose(got, loop(aggregate, X[:rows], MASK[:rows]), rtol=1e-6)

  @parameterized.parameters(*masked.AGGREGATES)
  def test_empty_rows_leave_the_denominator(self, aggregate):
    full = MASK.any(axis=1)
    kernel = jax.jit(masked.AGGREGATES[aggregate])
    np.testing.assert_allclose(kernel(X, MASK), kernel(X[full], MASK[full]), rtol=1e-6)

  @parameterized.parameters(*masked.AGGREGATES)
  def test_no_token_at_all_is_zero_and_teaches_nothing(self, aggregate):
    value, grad = jax.jit(jax.value_and_grad(masked.AGGREGATES[aggregate]))(
        np.full_like(X, np.nan), np.zeros_like(MASK))
    self.assertEqual(value, 0.0)
    np.testing.assert_array_equal(grad, 0.0)

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_padding_may_hold_anything(self, filler):
    filled = np.where(MASK, X, filler).astype(np.float32)
    for aggregate, kernel in masked.AGGREGATES.items():
      value, grad = jax.jit(jax.value_and_grad(kernel))(filled, MASK)
      np.testing.assert_allclose(value, loop(aggregate, X, MASK), rtol=1e-6)
      np.testing.assert_array_equal(grad[~MASK], 0.0)
      self.assertTrue(np.all(grad[MASK] > 0.0))

  def test_a_token_weighs_what_its_aggregation_says(self):
    grad = {name: jax.grad(kernel)(X, MASK) for name, kernel in masked.AGGREGATES.items()}
    length = MASK.sum(axis=1, keepdims=True) * np.ones_like(X)
    np.testing.assert_allclose(grad["token_mean"][MASK], 1 / 9)
    np.testing.assert_allclose(grad["sequence_mean"][MASK], 1 / (3 * length[MASK]))
    np.testing.assert_allclose(grad["sequence_sum"][MASK], 1 / 3)

  def test_a_constant_is_its_own_mean(self):
    constant = np.full_like(X, 0.7)
    self.assertAlmostEqual(float(masked.token_mean(constant, MASK)), 0.7, places=6)
    self.assertAlmostEqual(float(masked.sequence_mean(constant, MASK)), 0.7, places=6)
    self.assertAlmostEqual(float(masked.sequence_sum(constant, MASK)), 0.7 * 9 / 3, places=6)

  def test_counts_are_the_denominators(self):
    self.assertEqual(masked.tokens(MASK), 9.0)
    self.assertEqual(masked.responses(MASK), 3.0)
    self.assertEqual(masked.COUNTS.keys(), masked.AGGREGATES.keys())
    for name, count in masked.COUNTS.items():  # shares of parts add up to the whole
      parts = [(masked.AGGREGATES[name](X[i:i + 2], MASK[i:i + 2]), count(MASK[i:i + 2]))
               for i in (0, 2)]
      whole = sum(mean * n for mean, n in parts) / sum(n for _, n in parts)
      np.testing.assert_allclose(whole, loop(name, X, MASK), rtol=1e-6)

  def test_rows_equal_a_loop(self):
    sums = [sum(float(v) for v in x[m]) for x, m in zip(X, MASK)]
    means = [s / max(m.sum(), 1) for s, m in zip(sums, MASK)]
    np.testing.assert_allclose(masked.row_sum(X, MASK), sums, rtol=1e-6)
    np.testing.assert_allclose(masked.row_mean(X, MASK), means, rtol=1e-6)

  @parameterized.parameters(*masked.AGGREGATES)
  def test_shapes_that_would_broadcast_are_refused(self, aggregate):
    with self.assertRaises(AssertionError):
      masked.AGGREGATES[aggregate](X, MASK[:1])
    with self.assertRaises(AssertionError):
      masked.AGGREGATES[aggregate](X[0], MASK[0])


if __name__ == "__main__":
  absltest.main()
