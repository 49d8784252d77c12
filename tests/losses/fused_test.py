"""The chunked losses equal a float64 loop and the plain kernels; tiles_test.py has the memory."""

import functools
import math

from absl.testing import absltest, parameterized
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, fused, masked
from opd_jax.losses.tiles import Readout

B, T, D, D_TEACHER, V = 3, 7, 6, 5, 11
TILE = 3, 4  # three columns and four tokens: neither divides
MASK = np.arange(T) < np.array([[5], [0], [7]])  # the middle row is empty
FORMS = tuple(dict(kind=kind, **top) for kind in divergences.KINDS for top in (
    {}, dict(top_k=4), dict(top_k=4, top_of="teacher", tail="renormalize")))


def operands(dtype=np.float32, scale=1.0, seed=0):
  """Student's hidden states and head, teacher's hidden states and a head of two padded ids."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, D), (D, V), (B, T, D_TEACHER), (D_TEACHER, V + 2)
  return [jnp.asarray(scale * rng.normal(size=shape), dtype) for shape in shapes]


def log_softmax(logits):
  return logits - np.logaddexp.reduce(logits)


def kl(p, q):
  return sum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -np.inf)


def read(hidden, head, readout, banned):
  logits = readout.scale * (hidden @ head[:, :V])
  if readout.soft_cap is not None:
    logits = readout.soft_cap * np.tanh(logits / readout.soft_cap)
  logits = logits / readout.temperature
  return log_softmax(logits if banned is None else np.where(banned, -np.inf, logits))


def loop(student_hidden, student_head, teacher_hidden, teacher_head, kind, beta=0.3, top_k=0,
         top_of="student", tail="bucket", student_readout=Readout(), teacher_readout=Readout(),
         banned=None):
  """The divergence of every token, one at a time in float64."""
  arrays = [np.asarray(x, np.float64) for x in (student_hidden, student_head, teacher_hidden,
                                                teacher_head)]
  values = np.zeros((B, T))
  for b, t in np.argwhere(MASK):
    p = read(arrays[0][b, t], arrays[1], student_readout, banned)
    q = read(arrays[2][b, t], arrays[3], teacher_readout, banned)
    if top_k:
      ids = np.argsort(-(p if top_of == "student" else q))[:top_k]
      p, q = p[ids], q[ids]
      if tail == "bucket":
        p, q = (np.append(x, np.log1p(-np.exp(x).sum())) for x in (p, q))
      else:
        p, q = log_softmax(p), log_softmax(q)
    m = np.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    values[b, t] = {"forward_kl": lambda: kl(q, p), "reverse_kl": lambda: kl(p, q),
                    "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]()
  return values


def plain(student_hidden, student_head, teacher_hidden, teacher_head, kind, beta=0.3, top_k=0,
          top_of="student", tail="bucket", aggregate=masked.token_mean, weight=1.0):
  """The same loss by the plain kernels, with the whole [B, T, V]."""
  z, y = (jnp.einsum("btd,dv->btv", h, w[:, :V], preferred_element_type=jnp.float32)
          for h, w in ((student_hidden, student_head), (teacher_hidden, teacher_head)))
  if top_k:
    p, q = jax.nn.log_softmax(z), jax.nn.log_softmax(y)
    ids = jax.lax.top_k(p if top_of == "student" else q, top_k)[1]
    p, q = (jnp.take_along_axis(x, ids, axis=-1) for x in (p, q))
    values = divergences.topk_divergence(p, q, kind, beta, tail)
  else:
    values = divergences.DIVERGENCES[kind](z, y, **({"beta": beta} if kind == "jsd" else {}))
  return aggregate(values * weight, MASK)


STATIC = ("kind", "beta", "top_k", "top_of", "tail", "aggregate", "tile", "student_readout",
          "teacher_readout")


@functools.partial(jax.jit, static_argnames=STATIC)
def ours(*arrays, kind, beta=0.3, mask=MASK, **settings):
  return fused.fused_divergence(*arrays, mask, kind, beta, **settings)


@functools.partial(jax.jit, static_argnums=2, static_argnames=STATIC)
def gradients(arrays, weight, tile, **settings):
  loss = lambda *x: ours(*x, *arrays[2:], weight=weight, tile=tile, **settings)[0]
  return jax.value_and_grad(loss, argnums=(0, 1))(*arrays[:2])


def assert_close(got, want, tolerance):
  for a, b in zip(got, want):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


class DivergenceTest(parameterized.TestCase):

  @parameterized.parameters(*FORMS)
  def test_values_and_loss_equal_a_float64_loop(self, **form):
    arrays = operands()
    want = loop(*arrays, **form)
    loss, values = ours(*arrays, tile=TILE, **form)
    np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, want[MASK].mean(), rtol=1e-5)

  @parameterized.parameters(*FORMS)
  def test_gradients_equal_differences_of_the_float64_loop(self, **form):
    arrays = operands()
    _, got = gradients(arrays, np.ones((B, T)), TILE, **form)
    rng, step = np.random.default_rng(1), 1e-5
    for of in (0, 1):
      direction = rng.normal(size=arrays[of].shape)

      def moved(sign):
        out = [np.asarray(x, np.float64) for x in arrays]
        out[of] = out[of] + sign * step * direction
        return out

      slope = (loop(*moved(1), **form) - loop(*moved(-1), **form))[MASK].mean() / (2 * step)
      np.testing.assert_allclose(np.sum(np.asarray(got[of]) * direction), slope, rtol=2e-4,
                                 atol=1e-5)

  @parameterized.parameters(
      *(dict(tile=TILE, **form) for form in FORMS),
      *(dict(tile=tile, **form) for form in FORMS[::4]
        for tile in ((0, 0), (1, 1), (7, 3), (99, 99), (0, 10))))
  def test_tiles_of_any_size_equal_the_plain_kernels(self, tile, **form):
    arrays, weight = operands(), np.random.default_rng(2).uniform(size=(B, T))
    loss, got = gradients(arrays, weight, tile, **form)
    want = jax.value_and_grad(lambda *x: plain(*x, *arrays[2:], weight=weight, **form), (0, 1))
    assert_close((loss, *got), jax.tree.leaves(want(*arrays[:2])), 1e-5)

  @parameterized.product(kind=divergences.KINDS, tail=("bucket", "renormalize"))
  def test_what_a_teacher_said_before_is_as_good_as_the_teacher(self, kind, tail):
    arrays, weight = operands(), np.random.default_rng(2).uniform(size=(B, T))
    form = dict(kind=kind, tail=tail, top_k=4, top_of="teacher")
    want = gradients(arrays, weight, TILE, **form), ours(*arrays, tile=TILE, **form)[1]
    ids, said = fused.fused_topk(arrays[2], arrays[3][:, :V], 4, tile=TILE)
    said = jnp.where(MASK[..., None], said, np.nan)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def given(hidden, head):
      return fused.fused_given_divergence(hidden, head, ids, said, MASK, kind, 0.3, weight=weight,
                                          tail=tail, tile=TILE)

    (loss, values), got = jax.jit(given)(*arrays[:2])
    assert_close(jax.tree.leaves(((loss, got), values)), jax.tree.leaves(want), 1e-5)

  @parameterized.product(kind=divergences.KINDS, aggregate=tuple(masked.AGGREGATES))
  def test_every_aggregation(self, kind, aggregate):
    arrays, aggregate = operands(), masked.AGGREGATES[aggregate]
    got = gradients(arrays, np.ones((B, T)), (2, 11), kind=kind, aggregate=aggregate)
    want = jax.value_and_grad(lambda *x: plain(*x, *arrays[2:], kind=kind, aggregate=aggregate),
                              (0, 1))(*arrays[:2])
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)

  @parameterized.parameters(*FORMS[::2])
  def test_bfloat16_inputs_lose_nothing_but_the_rounding_of_slopes(self, **form):
    arrays = operands(jnp.bfloat16)
    loss, got = gradients(arrays, np.ones((B, T)), TILE, **form)
    self.assertEqual({x.dtype for x in got}, {jnp.dtype(jnp.bfloat16)})
    exact = [x.astype(jnp.float32) for x in arrays]
    want, slopes = gradients(exact, np.ones((B, T)), TILE, **form)
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # logits and softmax are float32
    assert_close(got, slopes, 2e-2)

  def test_float32_master_head_gets_a_float32_gradient(self):
    arrays = operands(jnp.bfloat16)
    arrays[1] = arrays[1].astype(jnp.float32)
    _, got = gradients(arrays, np.ones((B, T)), TILE, kind="reverse_kl")
    self.assertEqual([x.dtype for x in got], [jnp.bfloat16, jnp.float32])

  @parameterized.product(kind=divergences.KINDS, readout=(
      Readout(temperature=0.7), Readout(scale=2.0, soft_cap=3.0, temperature=1.3)))
  def test_scale_soft_cap_and_temperature(self, kind, readout):
    arrays, other = operands(), Readout(soft_cap=5.0)
    settings = dict(kind=kind, student_readout=readout, teacher_readout=other)
    np.testing.assert_allclose(ours(*arrays, tile=TILE, **settings)[1], loop(*arrays, **settings),
                               rtol=1e-4, atol=1e-5)
    loss = jax.jit(lambda *x: ours(*x, *arrays[2:], tile=TILE, **settings)[0])
    test_util.check_grads(loss, arrays[:2], order=1, modes=["rev"], atol=1e-2, rtol=1e-2)

  @parameterized.parameters(*FORMS)
  def test_teacher_weight_and_reported_values_have_exactly_no_gradient(self, **form):
    arrays = operands()
    loss = lambda teacher, weight: ours(*arrays[:2], *teacher, weight=weight, **form)[0]
    for grad in jax.tree.leaves(jax.grad(loss, (0, 1))(arrays[2:], jnp.ones((B, T)))):
      np.testing.assert_array_equal(grad, 0.0)
    for grad in jax.grad(lambda x: ours(*x, *arrays[2:], **form)[1].sum())(arrays[:2]):
      np.testing.assert_array_equal(grad, 0.0)

  @parameterized.parameters(*FORMS)
  def test_whatever_stands_in_padding_changes_nothing(self, **form):
    arrays, weight = operands(), np.ones((B, T), np.float32)
    clean = gradients(arrays, weight, TILE, **form)
    for i in (0, 2):
      arrays[i] = jnp.where(MASK[..., None], arrays[i], np.nan)
    dirty = gradients(arrays, np.where(MASK, weight, np.nan), TILE, **form)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    np.testing.assert_array_equal(np.asarray(dirty[1][0])[~MASK], 0.0)
    self.assertTrue(np.all(np.any(np.asarray(dirty[1][0])[MASK] != 0.0, axis=-1)))

  @parameterized.parameters(*divergences.KINDS)
  def test_a_batch_without_tokens_has_no_loss_and_no_gradient(self, kind):
    arrays = operands()
    loss = lambda *x: ours(*x, *arrays[2:], kind=kind, mask=np.zeros((B, T), bool))[0]
    value, got = jax.value_and_grad(loss, (0, 1))(*arrays[:2])
    self.assertEqual(value, 0.0)
    for grad in got:
      np.testing.assert_array_equal(grad, 0.0)

  @parameterized.parameters(*FORMS)
  def test_logits_of_ten_thousand_keep_their_values(self, **form):
    arrays = operands(scale=100.0)
    self.assertGreater(float(jnp.abs(arrays[0] @ arrays[1]).max()), 1e4)
    _, got = gradients(arrays, np.ones((B, T)), TILE, **form)
    self.assertTrue(all(np.all(np.isfinite(x)) for x in got))
    if form in FORMS[1::3]:
      return  # of a tail that is nothing: log 1e-7 for us, -inf for the loop
    want = loop(*arrays, **form)
    np.testing.assert_allclose(ours(*arrays, tile=TILE, **form)[1], want, rtol=1e-5,
                               atol=1e-6 * np.abs(want).max())

  @parameterized.parameters(*FORMS)
  def test_what_is_added_to_all_logits_cancels(self, **form):
    arrays, offset = operands(), 300.0
    # A state of 1 before a row of equal weights is an offset, of the teacher alone.
    far = [*arrays[:2], jnp.pad(arrays[2], ((0, 0), (0, 0), (0, 1)), constant_values=1.0),
           jnp.pad(arrays[3], ((0, 1), (0, 0)), constant_values=offset)]
    near, got = (gradients(x, np.ones((B, T)), TILE, **form) for x in (arrays, far))
    # What 300 itself loses in float32 is 3e-5.
    assert_close(jax.tree.leaves(got), jax.tree.leaves(near), 1e-4)

  @parameterized.parameters(*FORMS)
  def test_student_equal_to_teacher_has_no_loss_and_no_gradient(self, **form):
    hidden, head = operands()[:2]
    loss, got = gradients([hidden, head, hidden, head], np.ones((B, T)), TILE, **form)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    for grad in got:
      np.testing.assert_allclose(grad, 0.0, atol=1e-6)

  @parameterized.parameters(*FORMS)
  def test_banned_tokens_take_no_part(self, **form):
    arrays, banned = operands(), np.isin(np.arange(V), (0, 4, 9))
    got = ours(*arrays, tile=TILE, banned=banned, **form)[1]
    np.testing.assert_allclose(got, loop(*arrays, banned=banned, **form), rtol=1e-4, atol=1e-5)
    for tile in (TILE, (0, 0)):
      grad = jax.grad(lambda w: ours(arrays[0], w, *arrays[2:], banned=banned, tile=tile,
                                     **form)[0])(arrays[1])
      np.testing.assert_array_equal(np.asarray(grad)[:, banned], 0.0)
      self.assertTrue(np.all(np.isfinite(grad)))

  def test_a_longer_student_head_is_padding_beyond_the_shared_ids(self):
    arrays = operands()
    longer = jnp.pad(arrays[1], ((0, 0), (0, 5)), constant_values=7.0)
    want = gradients(arrays, np.ones((B, T)), TILE, kind="jsd")
    # The teacher has V + 2 ids; both are cut to the V that the test's short head knows.
    cut = [arrays[0], longer, arrays[2], arrays[3][:, :V]]
    loss, got = gradients(cut, np.ones((B, T)), TILE, kind="jsd")
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1][:, :V], want[1][1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[1][:, V:], 0.0)

  @parameterized.parameters(
      (dict(kind="kl"), "kind is 'kl'"), (dict(kind="jsd", beta=1.0), "reverse_kl"),
      (dict(kind="jsd", top_k=V + 1), "11 tokens"), (dict(kind="jsd", top_k=-1), "top_k is -1"),
      (dict(kind="jsd", top_of="both"), "'student' or 'teacher'"),
      (dict(kind="jsd", tail="cut"), "'bucket' or 'renormalize'"))
  def test_settings_that_do_not_exist_are_refused(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      ours(*operands(), **settings)

  def test_shapes_that_would_broadcast_are_refused(self):
    for settings in (dict(weight=np.ones(T)), dict(banned=np.zeros(V + 2, bool)),
                     dict(mask=MASK[:1])):
      with self.assertRaises(AssertionError):
        fused.fused_divergence(*operands(), **{"mask": MASK, "kind": "jsd", **settings})

  def test_a_batch_may_be_empty(self):
    arrays = [x[:, :0] if x.ndim == 3 else x for x in operands()]
    loss, values = fused.fused_divergence(*arrays, MASK[:, :0], "reverse_kl")
    self.assertEqual((loss, values.shape), (0.0, (B, 0)))


def plain_logprobs(hidden, head, tokens, readout=Readout()):
  logits = readout(jnp.einsum("btd,dv->btv", hidden, head))
  scores = jax.nn.log_softmax(logits)
  entropy = -jnp.sum(jnp.where(jnp.isneginf(scores), 0.0, jnp.exp(scores) * scores), axis=-1)
  return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0], entropy


class LogprobsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.hidden, self.head = operands()[:2]
    rng = np.random.default_rng(3)
    self.tokens = rng.integers(0, V, (B, T))
    self.cotangents = rng.normal(size=(2, B, T)).astype(np.float32)

  def total(self, function, **settings):
    def of(hidden, head):
      logprobs, entropy = function(hidden, head, self.tokens, **settings)
      return jnp.sum(self.cotangents[0] * logprobs + self.cotangents[1] * entropy)
    return of

  def test_values_equal_a_float64_loop(self):
    logprobs, entropy = fused.fused_logprobs(self.hidden, self.head, self.tokens, tile=TILE)
    for b, t in np.ndindex(B, T):
      p = log_softmax(np.asarray(self.hidden[b, t], np.float64) @ np.asarray(self.head, np.float64))
      self.assertAlmostEqual(float(logprobs[b, t]), p[self.tokens[b, t]], delta=1e-5)
      self.assertAlmostEqual(float(entropy[b, t]), -np.sum(np.exp(p) * p), delta=1e-5)

  @parameterized.parameters(
      ((0, 0), Readout()), ((1, 1), Readout()), ((7, 3), Readout()), ((99, 99), Readout()),
      (TILE, Readout(scale=2.0, soft_cap=3.0, temperature=1.3)))
  def test_values_and_gradients_equal_the_plain_form(self, tile, readout):
    plain_total = self.total(plain_logprobs, readout=readout)
    fused_total = jax.jit(self.total(fused.fused_logprobs, readout=readout, tile=tile))
    want = jax.value_and_grad(plain_total, (0, 1))(self.hidden, self.head)
    got = jax.value_and_grad(fused_total, (0, 1))(self.hidden, self.head)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)
    test_util.check_grads(fused_total, (self.hidden, self.head), order=1, modes=["rev"],
                          atol=2e-2, rtol=2e-2)

  def test_bfloat16(self):
    hidden, head = operands(jnp.bfloat16)[:2]
    got = jax.grad(self.total(fused.fused_logprobs), (0, 1))(hidden, head)
    want = jax.grad(self.total(plain_logprobs), (0, 1))(hidden.astype(jnp.float32),
                                                        head.astype(jnp.float32))
    self.assertEqual([x.dtype for x in got], [jnp.bfloat16] * 2)
    assert_close(got, want, 3e-2)

  def test_a_column_without_cotangent_may_hold_nan(self):
    def loss(hidden, head):
      logprobs, entropy = fused.fused_logprobs(hidden, head, self.tokens, tile=TILE)
      return masked.token_mean(logprobs + 0.1 * entropy, MASK)
    clean = jax.grad(loss, (0, 1))(self.hidden, self.head)
    dirty = jnp.where(MASK[..., None], self.hidden, np.nan)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(loss, (0, 1))(dirty, self.head), clean)

  def test_banned_tokens_have_no_probability_and_no_gradient(self):
    banned = np.isin(np.arange(V), (0, 4, 9))
    tokens = np.where(np.isin(self.tokens, (0, 4, 9)), 1, self.tokens)
    loss = lambda function, **settings: lambda h, w: sum(
        jnp.sum(c * x) for c, x in zip(self.cotangents, function(h, w, tokens, **settings)))
    got = jax.value_and_grad(loss(fused.fused_logprobs, banned=banned), (0, 1))(
        self.hidden, self.head)
    np.testing.assert_array_equal(np.asarray(got[1][1])[:, banned], 0.0)
    allowed = np.flatnonzero(~banned)
    tokens = np.searchsorted(allowed, tokens)  # the same vocabulary without them
    want = jax.value_and_grad(loss(plain_logprobs), (0, 1))(self.hidden, self.head[:, allowed])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][1][:, allowed], want[1][1], atol=1e-5)

  @parameterized.parameters("banned", "unknown")
  def test_a_token_that_cannot_be_has_no_gradient(self, what):
    tokens = np.full((B, T), 4 if what == "banned" else V)
    settings = dict(banned=np.arange(V) == 4) if what == "banned" else {}
    logprobs = lambda h, w: fused.fused_logprobs(h, w, tokens, tile=TILE, **settings)[0]
    np.testing.assert_array_equal(logprobs(self.hidden, self.head), -np.inf)
    for grad in jax.grad(lambda *x: logprobs(*x).sum(), (0, 1))(self.hidden, self.head):
      np.testing.assert_array_equal(grad, 0.0)

  def test_logits_of_ten_thousand_keep_their_values(self):
    hidden, head = 100 * self.hidden, 100 * self.head
    value, got = jax.value_and_grad(self.total(fused.fused_logprobs, tile=TILE), (0, 1))(
        hidden, head)
    self.assertTrue(all(np.all(np.isfinite(x)) for x in (value, *got)))
    logprobs, entropy = fused.fused_logprobs(hidden, head, self.tokens, tile=TILE)
    for b, t in np.ndindex(B, T):
      p = log_softmax(np.asarray(hidden[b, t], np.float64) @ np.asarray(head, np.float64))
      self.assertAlmostEqual(float(logprobs[b, t]), p[self.tokens[b, t]],
                             delta=1e-6 * np.abs(p).max())
      self.assertAlmostEqual(float(entropy[b, t]), -np.sum(np.exp(p) * p), delta=0.01)

  def test_two_equal_tokens_have_an_entropy_of_one_bit_wherever_they_are(self):
    for logit in (0.0, 1e3, 1e4):
      hidden, head = jnp.full((1, 1, 1), logit), jnp.ones((1, 2))
      for tile in ((1, 1), (1, 2)):
        logprobs, entropy = fused.fused_logprobs(hidden, head, np.zeros((1, 1), int), tile=tile)
        np.testing.assert_allclose([-logprobs, entropy], math.log(2), rtol=2e-3)

  @parameterized.parameters(1, 4, V)
  def test_topk_are_the_largest_logprobs(self, k):
    ids, logprobs = fused.fused_topk(self.hidden, self.head, k, tile=TILE)
    full = np.asarray(jax.nn.log_softmax(self.hidden @ self.head))
    np.testing.assert_allclose(logprobs, -np.sort(-full, axis=-1)[..., :k], atol=1e-5)
    np.testing.assert_allclose(logprobs, np.take_along_axis(full, np.asarray(ids), -1), atol=1e-5)
    with self.assertRaisesRegex(ValueError, "at most the vocabulary, 11"):
      fused.fused_topk(self.hidden, self.head, V + 1)


if __name__ == "__main__":
  absltest.main()
