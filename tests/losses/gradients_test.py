"""Which kernels have a gradient, that it is right, and that padding and extremes leave it whole.

Every public kernel of the room stands in one of the two tables below.
"""

import functools
import inspect

from absl.testing import absltest, parameterized
import jax
from jax.test_util import check_grads
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import divergences, masked, policy_gradient, preference, signals, supervised
from opd_jax.losses import weights

B, T, V, K = 3, 4, 6, 3
RNG = np.random.default_rng(0)
# Held in float32 in float64 runs too: exact there.
TEACHER = RNG.normal(size=(B, T, V)).astype(np.float32)
MASK = np.arange(T) < np.array([[2], [4], [0]])  # the last row is empty
LENGTHS = dict(BT=(B, T), BTV=(B, T, V), B=(B,), PGT=(2, 2, T))
WEIGHT = RNG.uniform(0.5, 2.0, (B, T)).astype(np.float32)
OLD, SIGNAL = RNG.normal(size=(2, B, T)).astype(np.float32)
GROUP_MASK = np.arange(T) < np.array([[[3], [4]], [[1], [0]]])
PAIRS = RNG.normal(size=(4, B)).astype(np.float32)
REWARDS = np.array([[1, 0, 1, 0], [0.2, 0.9, 0.2, 0.5], [1, 1, 1, 1]], np.float32)  # [P, G]
REAL = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)


def log_topk(logits):
  return jax.nn.log_softmax(logits)[..., :K]


def topk(kind, tail):
  return lambda x: divergences.topk_divergence(log_topk(x), log_topk(TEACHER), kind, tail=tail)


# Name -> (shape of what is differentiated, function of it alone). Others are held.
DIFFERENTIABLE = {
    **{f"masked.{name}": ("BT", lambda x, f=f: f(x, MASK)) for name, f in (
        ("row_sum", masked.row_sum), ("row_mean", masked.row_mean), *masked.AGGREGATES.items())},
    "divergences.forward_kl": ("BTV", lambda x: divergences.forward_kl(x, TEACHER)),
    "divergences.reverse_kl": ("BTV", lambda x: divergences.reverse_kl(x, TEACHER)),
    "divergences.jsd 0.1": ("BTV", lambda x: divergences.jsd(x, TEACHER, 0.1)),
    "divergences.jsd 0.5": ("BTV", lambda x: divergences.jsd(x, TEACHER, 0.5)),
    **{f"divergences.topk_divergence {kind} {tail}": ("BTV", topk(kind, tail))
       for kind in divergences.KINDS for tail in ("bucket", "renormalize")},
    **{f"divergences.kl_estimate {k}": ("BT", lambda x, k=k: divergences.kl_estimate(x, OLD, k))
       for k in ("k1", "k2", "k3")},
    "policy_gradient.score_function_loss": ("BT", lambda x: policy_gradient.score_function_loss(
        x, SIGNAL, MASK, WEIGHT)),
    "policy_gradient.clipped_surrogate_loss": (
        "BT", lambda x: policy_gradient.clipped_surrogate_loss(x, OLD, SIGNAL, MASK, WEIGHT)),
    "policy_gradient.clipped_surrogate_loss dual": (
        "BT", lambda x: policy_gradient.clipped_surrogate_loss(
            x, OLD, SIGNAL, MASK, WEIGHT, dual=3.0)),
    "preference.dpo chosen": ("B", lambda x: preference.dpo(x, *PAIRS[:3])),
    "preference.dpo rejected": ("B", lambda x: preference.dpo(
        PAIRS[0], x, *PAIRS[1:3], label_smoothing=0.1)),
    "preference.simpo": ("B", lambda x: preference.simpo(x, PAIRS[0])),
    "preference.bradley_terry": ("B", lambda x: preference.bradley_terry(x, PAIRS[0])),
    "preference.group_dpo": ("BT", lambda x: preference.group_dpo(x, OLD, REWARDS, REAL)),
    "preference.group_simpo": ("BT", lambda x: preference.group_simpo(x, REWARDS, REAL)),
    "supervised.sft": ("BT", lambda x: supervised.sft(x, MASK)),
    "supervised.weighted_sft": ("PGT", lambda x: supervised.weighted_sft(
        x, GROUP_MASK, WEIGHT[:2, :2])),
}

# Name -> (shape of every argument, function of all of them that may depend on a parameter).
STOPPED = {
    "signals.opd": ("BT", 2, signals.opd),
    "signals.g_opd": ("BT", 3, signals.g_opd),
    "signals.select_teacher": (
        "BTV", 1, lambda x: signals.select_teacher(x, jnp.array([2, 0, 0, 1]))),
    "signals.group_advantage": ("BT", 1, signals.group_advantage),
    "signals.group_advantage centered": (
        "BT", 1, functools.partial(signals.group_advantage, normalize_std=False)),
    "signals.verified": ("BT", 1, signals.verified),
    "preference.dpo_signal": (
        "BT", 2, lambda p, b: preference.dpo_signal(p, b, REWARDS, REAL)),
    "preference.simpo_signal": ("BT", 1, lambda p: preference.simpo_signal(p, REWARDS, REAL)),
    "weights.uniform": ("BT", 2, lambda p, q: weights.uniform(p, q, MASK)),
    "weights.iw_opd": ("BT", 2, lambda p, q: weights.iw_opd(p, q, MASK)),
    "weights.iw_opd signed": (
        "BT", 2, lambda p, q: weights.iw_opd(p, q, MASK, signed=True, unit_mean=True)),
    "weights.truncated_importance": (
        "BT", 2, lambda p, q: weights.truncated_importance(p, q, 5.0)),
    "weights.self_normalized": ("BT", 2, weights.self_normalized),
}
# Of counts and masks, which have no gradient to speak of, and the body of the divergences.
NOT_KERNELS = {"masked.tokens", "masked.responses", "weights.position", "preference.pairs",
               "divergences.between", "divergences.mixture", "divergences.with_tail",
               "divergences.check_kind"}


def values(function):
  """The kernel's array; for a loss its scalar, without the metrics."""
  def array(*args):
    out = function(*args)
    return out[0] if isinstance(out, tuple) else out
  return array


def draw(shape, *, seed=1, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=LENGTHS[shape]).astype(dtype)


class GradientTest(parameterized.TestCase):

  @parameterized.parameters(*DIFFERENTIABLE)
  def test_gradient_equals_finite_differences(self, name):
    shape, kernel = DIFFERENTIABLE[name]
    with jax.enable_x64(True):  # in float32 a difference quotient has three digits
      check_grads(jax.jit(values(kernel)), (draw(shape, dtype=np.float64),), order=1,
                  modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)

  @parameterized.parameters(*DIFFERENTIABLE)
  def test_float32_gradient_equals_float64(self, name):
    shape, kernel = DIFFERENTIABLE[name]
    grad = jax.jit(jax.grad(lambda x: jnp.sum(values(kernel)(x))))
    got = grad(draw(shape))
    self.assertEqual(got.dtype, np.float32)
    with jax.enable_x64(True):
      want = grad(draw(shape).astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(*STOPPED)
  def test_signals_and_weights_have_exactly_no_gradient(self, name):
    shape, arguments, kernel = STOPPED[name]
    args = [draw(shape, seed=i) for i in range(arguments)]
    grads = jax.jit(jax.grad(lambda xs: jnp.sum(jnp.sin(kernel(*xs)))))(args)
    np.testing.assert_array_equal(np.stack(grads), 0.0)

  @parameterized.parameters(
      divergences.forward_kl, divergences.reverse_kl, divergences.jsd,
      *(functools.partial(divergences.topk_divergence, kind=kind, tail=tail)
        for kind in divergences.KINDS for tail in ("bucket", "renormalize")))
  def test_a_teacher_has_exactly_no_gradient(self, kernel):
    student, teacher = (jax.nn.log_softmax(draw("BTV", seed=seed)) for seed in (1, 2))
    grad = jax.jit(jax.grad(lambda q: jnp.sum(kernel(student, q))))(teacher)
    np.testing.assert_array_equal(grad, 0.0)

  def test_references_old_policies_and_weights_have_exactly_no_gradient(self):
    def total(held):
      old, signal, weight, chosen, rejected, group_weight = held
      return (policy_gradient.clipped_surrogate_loss(OLD, old, signal, MASK, weight)[0]
              + policy_gradient.score_function_loss(OLD, signal, MASK, weight)[0]
              + preference.dpo(PAIRS[0], PAIRS[1], chosen, rejected)[0]
              + supervised.weighted_sft(draw("PGT"), GROUP_MASK, group_weight)[0])
    held = (OLD + 0.1, SIGNAL, WEIGHT, PAIRS[2], PAIRS[3], WEIGHT[:2, :2])
    grads = jax.jit(jax.grad(total))(jax.tree.map(jnp.float32, held))
    for grad in grads:
      np.testing.assert_array_equal(grad, 0.0)

  def test_every_kernel_stands_in_a_table(self):
    rooms = (masked, signals, weights, divergences, policy_gradient, preference, supervised)
    kernels = {f"{room.__name__.split('.')[-1]}.{name}" for room in rooms
               for name, f in vars(room).items()
               if inspect.isfunction(f) and f.__module__ == room.__name__ and name[0] != "_"}
    listed = {name.split(" ")[0] for name in (*DIFFERENTIABLE, *STOPPED)}
    self.assertEqual(kernels - NOT_KERNELS, listed)


# Logits of one column, student and teacher, that break a careless kernel.
INF = np.inf
EXTREME = {
    "plain": ([0.3, -1.0, 2.0, 0.0], [1.0, 2.0, -0.5, 0.0]),
    "equal": ([0.3, -1.0, 2.0, 0.0], [0.3, -1.0, 2.0, 0.0]),
    "opposite ends": ([1e4, -1e4, 0.0, 0.0], [-1e4, 1e4, 0.0, 0.0]),
    "both sure of the same": ([1e4, -1e4, -1e4, -1e4], [1e4, -1e4, -1e4, -1e4]),
    "all at the top": ([1e4, 1e4, 1e4, 1e4], [1e4, 1e4, 1e4, -1e4]),
    "banned by both": ([0.3, -INF, 2.0, -INF], [1.0, -INF, 0.0, -INF]),
    "banned by the student": ([0.3, -INF, 2.0, 0.0], [1.0, 2.0, 0.0, 0.0]),
    "banned by the teacher": ([0.3, 1.0, 2.0, 0.0], [1.0, -INF, 0.0, 0.0]),
    "one token left": ([-INF, 0.0, -INF, -INF], [-INF, 1e4, -INF, -INF]),
    "different tokens left": ([-INF, 0.0, -INF, -INF], [0.0, -INF, -INF, -INF]),
    "nothing left": ([-INF] * 4, [-INF] * 4),
}
OF_LOGITS = {
    "forward_kl": divergences.forward_kl, "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jsd,
    **{f"topk {kind} {tail}": lambda s, t, kind=kind, tail=tail: divergences.topk_divergence(
        jax.nn.log_softmax(s)[..., :2], jax.nn.log_softmax(t)[..., :2], kind, tail=tail)
       for kind in divergences.KINDS for tail in ("bucket", "renormalize")},
}


def columns(side, names):
  """[1, T, 4] logits, one extreme a column."""
  return np.array([[EXTREME[name][side] for name in names]], np.float32)


def cases(kernel):
  """A log-softmax outside the kernel has no answer where nothing is left."""
  return [name for name in EXTREME if not (kernel.startswith("topk") and name == "nothing left")]


class ExtremeTest(parameterized.TestCase):

  @parameterized.parameters(*OF_LOGITS)
  def test_extreme_and_banned_logits_give_no_nan(self, kernel):
    student, teacher = (columns(side, cases(kernel)) for side in (0, 1))
    value, pullback = jax.vjp(jax.jit(lambda x: OF_LOGITS[kernel](x, teacher)), student)
    grad, = pullback(jnp.ones_like(value))
    for t, case in enumerate(cases(kernel)):
      with self.subTest(case):
        self.assertTrue(np.isfinite(value[0, t]))
        self.assertGreaterEqual(value[0, t], -1e-6)
        self.assertTrue(np.all(np.isfinite(grad[0, t])), grad[0, t])
        np.testing.assert_array_equal(grad[0, t][np.isneginf(student[0, t])], 0.0)
        if np.array_equal(student[0, t], teacher[0, t]):
          np.testing.assert_allclose(value[0, t], 0.0, atol=1e-6)
          np.testing.assert_allclose(grad[0, t], 0.0, atol=1e-6)

  @parameterized.product(kernel=tuple(OF_LOGITS), aggregate=tuple(masked.AGGREGATES))
  def test_padded_columns_and_empty_rows_have_exactly_no_gradient(self, kernel, aggregate):
    names = ["plain", *cases(kernel)]
    student, teacher = (np.tile(columns(side, names), (3, 1, 1)) for side in (0, 1))
    mask = np.arange(len(names)) < np.array([[1], [2], [0]])  # the third row is empty
    loss = lambda x: masked.AGGREGATES[aggregate](OF_LOGITS[kernel](x, teacher), mask)
    value, grad = jax.jit(jax.value_and_grad(loss))(student)
    self.assertTrue(np.isfinite(value))
    np.testing.assert_array_equal(grad[~mask], 0.0)
    self.assertTrue(np.all(grad[:2, 0, 0] != 0.0))

  @parameterized.product(loss=("score_function", "clipped", "sft"),
                         aggregate=tuple(masked.AGGREGATES), filler=(np.nan, np.inf, -np.inf, 1e4))
  def test_whatever_stands_in_padding_losses_of_log_probabilities_ignore(
      self, loss, aggregate, filler):
    fill = lambda x: np.where(MASK, x, filler).astype(np.float32)
    losses = {
        "score_function": lambda x, **kw: policy_gradient.score_function_loss(
            x, fill(SIGNAL), MASK, fill(WEIGHT), **kw),
        "clipped": lambda x, **kw: policy_gradient.clipped_surrogate_loss(
            x, fill(OLD), fill(SIGNAL), MASK, fill(WEIGHT), **kw),
        "sft": lambda x, **kw: supervised.sft(x, MASK, **kw),
    }
    function = functools.partial(losses[loss], aggregate=masked.AGGREGATES[aggregate])
    clean = np.where(MASK, draw("BT"), 0.0).astype(np.float32)
    run = jax.jit(jax.value_and_grad(function, has_aux=True))
    (value, metrics), grad = run(fill(clean))
    (same, _), _ = run(clean)
    self.assertEqual(value, same)
    self.assertTrue(all(np.isfinite(x) for x in metrics.values()), metrics)
    np.testing.assert_array_equal(grad[~MASK], 0.0)

  @parameterized.parameters(np.nan, -np.inf, 1e4)
  def test_whatever_stands_in_padding_weighted_sft_and_preferences_ignore(self, filler):
    x = np.where(GROUP_MASK, draw("PGT"), filler).astype(np.float32)
    grad = jax.grad(lambda x: supervised.weighted_sft(x, GROUP_MASK, np.ones((2, 2)))[0])(x)
    np.testing.assert_array_equal(grad[~GROUP_MASK], 0.0)
    self.assertTrue(np.all(grad[GROUP_MASK] != 0.0))
    pairs = np.array([True, False, True])
    better, worse = (np.where(pairs, p, filler).astype(np.float32) for p in PAIRS[:2])
    for loss in (preference.simpo, preference.bradley_terry,
                 lambda a, b, mask: preference.dpo(a, b, b, a, mask=mask)):
      value, grads = jax.value_and_grad(
          lambda a, b: loss(a, b, mask=pairs)[0], argnums=(0, 1))(better, worse)
      self.assertTrue(np.isfinite(value))
      np.testing.assert_array_equal(np.stack(grads)[:, ~pairs], 0.0)

  def test_a_batch_of_padding_alone_is_a_loss_of_zero(self):
    empty, x = np.zeros((B, T), bool), np.full((B, T), np.nan, np.float32)
    for aggregate in masked.AGGREGATES.values():
      for loss in (lambda x: policy_gradient.score_function_loss(x, x, empty, None, aggregate),
                   lambda x: policy_gradient.clipped_surrogate_loss(
                       x, x, x, empty, aggregate=aggregate),
                   lambda x: supervised.sft(x, empty, aggregate)):
        (value, _), grad = jax.value_and_grad(loss, has_aux=True)(x)
        self.assertEqual(value, 0.0)
        np.testing.assert_array_equal(grad, 0.0)
    pairs = np.full(B, np.nan, np.float32)
    value, grad = jax.value_and_grad(
        lambda x: preference.bradley_terry(x, x, np.zeros(B, bool))[0])(pairs)
    self.assertEqual(value, 0.0)
    np.testing.assert_array_equal(grad, 0.0)

  @parameterized.parameters("k1", "k2", "k3")
  def test_kl_estimates_of_extreme_log_probabilities_are_finite(self, estimator):
    p = np.array([[0.0, -2e4, -INF, -1.0, -INF, 0.0]], np.float32)
    q = np.array([[-2e4, 0.0, -INF, -INF, -1.0, 0.0]], np.float32)
    value, grads = jax.value_and_grad(
        lambda *x: jnp.sum(divergences.kl_estimate(*x, estimator)), argnums=(0, 1))(p, q)
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.all(np.isfinite(grads)))


if __name__ == "__main__":
  absltest.main()
