"""Preference losses equal a loop and push the right way; their signals descend them in parts."""

import functools
import math
import pathlib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import train_state
from opd_jax.losses import masked, policy_gradient, preference, signals, supervised
from opd_jax.rollouts import batch as batches

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = RNG.normal(-20.0, 5.0, (4, 6)).astype(np.float32)
PAIRS = np.array([1, 1, 0, 1, 0, 1], bool)


def softplus(x):  # -log sigmoid(-x)
  return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values, pairs=None):
  values = [v for i, v in enumerate(values) if pairs is None or pairs[i]]
  return sum(values) / len(values)


LOSSES = {
    "dpo": (preference.dpo, (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)),
    "simpo": (preference.simpo, (CHOSEN / 10, REJECTED / 10)),
    "bradley_terry": (preference.bradley_terry, (CHOSEN / 10, REJECTED / 10)),
}


class PreferenceTest(parameterized.TestCase):

  @parameterized.product(beta=(0.05, 0.1, 1.0), smoothing=(0.0, 0.1), pairs=(None, PAIRS))
  def test_dpo_equals_a_loop(self, beta, smoothing, pairs):
    loss, metrics = jax.jit(lambda *x: preference.dpo(*x, beta, smoothing, pairs))(
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    rewards = [(beta * (float(c) - float(rc)), beta * (float(r) - float(rr))) for c, r, rc, rr in
               zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    h = [c - r for c, r in rewards]
    want = [(1 - smoothing) * softplus(-x) + smoothing * softplus(x) for x in h]
    np.testing.assert_allclose(loss, mean(want, pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/margin"], mean(h, pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/pair_accuracy"], mean([x > 0 for x in h], pairs))
    np.testing.assert_allclose(metrics["loss/chosen_reward"], mean([c for c, _ in rewards], pairs),
                               rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/rejected_reward"],
                               mean([r for _, r in rewards], pairs), rtol=1e-5)

  @parameterized.product(beta=(2.0, 10.0), margin=(0.0, 1.0), pairs=(None, PAIRS))
  def test_simpo_equals_a_loop(self, beta, margin, pairs):
    chosen, rejected = LOSSES["simpo"][1]
    loss, metrics = jax.jit(lambda *x: preference.simpo(*x, beta, margin, pairs))(chosen, rejected)
    gap = [beta * (float(c) - float(r)) for c, r in zip(chosen, rejected)]
    np.testing.assert_allclose(loss, mean([softplus(margin - g) for g in gap], pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/margin"], mean(gap, pairs), rtol=1e-4)

  @parameterized.parameters(False, True)
  def test_bradley_terry_equals_a_loop(self, some):
    pairs = PAIRS if some else None
    loss, metrics = jax.jit(lambda *x: preference.bradley_terry(*x, pairs))(CHOSEN, REJECTED)
    gap = [float(c) - float(r) for c, r in zip(CHOSEN, REJECTED)]
    np.testing.assert_allclose(loss, mean([softplus(-g) for g in gap], pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/pair_accuracy"], mean([g > 0 for g in gap], pairs))

  def test_dpo_at_the_reference_is_log_2_and_simpo_without_margin_of_equals_too(self):
    self.assertAlmostEqual(
        float(preference.dpo(CHOSEN, REJECTED, CHOSEN, REJECTED)[0]), math.log(2), places=6)
    self.assertAlmostEqual(
        float(preference.simpo(CHOSEN, CHOSEN, margin=0.0)[0]), math.log(2), places=6)
    self.assertAlmostEqual(
        float(preference.bradley_terry(CHOSEN, CHOSEN)[0]), math.log(2), places=6)

  @parameterized.parameters(*LOSSES)
  def test_descent_raises_the_chosen_and_lowers_the_rejected_equally(self, name):
    loss, args = LOSSES[name]
    chosen, rejected = jax.jit(jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1)))(*args)
    self.assertTrue(np.all(chosen < 0.0))
    np.testing.assert_allclose(rejected, -chosen, rtol=1e-6)

  @parameterized.parameters(*LOSSES)
  def test_missing_pairs_are_as_if_cut_out(self, name):
    loss, args = LOSSES[name]
    filled = [np.where(PAIRS, x, np.nan).astype(np.float32) for x in args]
    got = jax.jit(lambda *x: loss(*x, mask=PAIRS))(*filled)
    want = jax.jit(loss)(*(x[PAIRS] for x in args))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  @parameterized.product(name=tuple(LOSSES), gap=(1e4, -1e4, 0.0))
  def test_extreme_margins_are_finite(self, name, gap):
    loss, args = LOSSES[name]
    args = [args[1] + np.float32(gap), args[1], *args[3:], *args[3:]]
    (value, metrics), grad = jax.value_and_grad(lambda x: loss(x, *args[1:]), has_aux=True)(args[0])
    self.assertTrue(np.isfinite(value) and np.all(np.isfinite(grad)))
    self.assertTrue(all(np.isfinite(x) for x in metrics.values()))

  def test_simpo_takes_the_mean_log_probability_that_masked_gives(self):
    logprobs = RNG.normal(-1.0, 0.3, (4, 3)).astype(np.float32)
    mask = np.arange(3) < np.array([[3], [2], [1], [3]])
    per_token = masked.row_mean(logprobs, mask)
    loss, _ = preference.simpo(per_token[:2], per_token[2:])
    rows = [x[m].astype(np.float64).mean() for x, m in zip(logprobs, mask)]
    want = mean([softplus(1.0 - 2.0 * (rows[i] - rows[i + 2])) for i in (0, 1)])
    np.testing.assert_allclose(loss, want, rtol=1e-5)

  @parameterized.parameters(0.5, -0.1)
  def test_smoothing_that_would_turn_labels_over_is_refused(self, smoothing):
    with self.assertRaisesRegex(ValueError, f"label_smoothing is {smoothing}"):
      preference.dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, label_smoothing=smoothing)

  @parameterized.parameters(*LOSSES)
  def test_shapes_that_would_broadcast_are_refused(self, name):
    loss, args = LOSSES[name]
    with self.assertRaises(AssertionError):
      loss(args[0][:1], *args[1:])
    with self.assertRaises(AssertionError):
      loss(*args, mask=PAIRS[:1])


# Four groups of four: successes and failures, a graded one, one that agrees, one of ties and
# of responses that cannot be compared: one without tokens, one whose reward is not a number.
REWARDS = np.array([[1, 0, 1, 0], [0.2, 0.9, 0.2, 0.5], [1, 1, 1, 1], [1, 0, 1, np.nan]],
                   np.float32)
REAL = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
WHO_BEATS_WHOM = [  # (group, better, worse), by hand
    (0, 0, 1), (0, 0, 3), (0, 2, 1), (0, 2, 3),
    (1, 1, 0), (1, 1, 2), (1, 1, 3), (1, 3, 0), (1, 3, 2), (3, 2, 1)]
POLICY, REFERENCE = RNG.normal(-20.0, 5.0, (2, 4, 4)).astype(np.float32)
BETAS = dict(dpo=0.1, simpo=2.0)
AGGREGATES = dict(dpo="sequence_sum", simpo="sequence_mean")  # whose gradient is the loss's
FORMS = tuple(BETAS)


def group_loss(form, policy, reference, rewards, real):
  if form == "dpo":
    return preference.group_dpo(policy, reference, rewards, real)
  return preference.group_simpo(policy, rewards, real)


def group_signal(form, policy, reference, rewards, real):
  if form == "dpo":
    return preference.dpo_signal(policy, reference, rewards, real)
  return preference.simpo_signal(policy, rewards, real)


@functools.partial(jax.jit, static_argnums=0)
def _evaluated(form, *args):
  (loss, metrics), gradient = jax.value_and_grad(
      lambda policy: group_loss(form, policy, *args[1:]), has_aux=True)(args[0])
  return loss, metrics, gradient, group_signal(form, *args)


def evaluate(form, policy=POLICY, reference=REFERENCE, rewards=REWARDS, real=REAL):
  """Loss, metrics, gradient and signal, compiled once."""
  return _evaluated(form, *(np.asarray(x, np.float32) for x in (policy, reference, rewards)), real)


def group_loop(form, policy):
  """Loss, margins and dloss/dpolicy, pair by pair in float64."""
  losses, margins, gradient = [], [], np.zeros((4, 4))
  score = policy.astype(np.float64) - (REFERENCE if form == "dpo" else 0.0)
  for p, i, j in WHO_BEATS_WHOM:
    margins.append(BETAS[form] * (score[p, i] - score[p, j]))
    gap = margins[-1] - (form == "simpo")  # SimPO's gamma is 1
    losses.append(softplus(-gap))
    slope = BETAS[form] / (1.0 + math.exp(gap)) / len(WHO_BEATS_WHOM)
    gradient[p, i] -= slope
    gradient[p, j] += slope
  return mean(losses), margins, gradient


class GroupTest(parameterized.TestCase):

  def test_pairs_are_the_whole_group_against_each_other(self):
    better = jax.jit(preference.pairs)(REWARDS, REAL)
    self.assertEqual([tuple(x) for x in np.argwhere(better)], WHO_BEATS_WHOM)

  @parameterized.parameters(*FORMS)
  def test_loss_metrics_and_gradient_equal_a_loop(self, form):
    policy = POLICY if form == "dpo" else POLICY / 10
    loss, metrics, gradient, _ = evaluate(form, policy)
    want, margins, slope = group_loop(form, policy)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(metrics["loss/margin"], mean(margins), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/pair_accuracy"], mean([m > 0 for m in margins]))
    self.assertEqual(metrics["loss/pairs"], 10.0)

  @parameterized.product(beta=(0.05, 0.1), x64=(False, True))
  def test_groups_of_two_have_the_golden_loss_of_pairs(self, beta, x64):
    golden = np.load(pathlib.Path(__file__).parents[1] / "golden/kernels.npz")
    stack = lambda who: np.stack([golden[f"dpo_{who}_chosen"], golden[f"dpo_{who}_rejected"]], 1)
    policy, reference = stack("policy"), stack("ref")
    rewards, real = np.tile([1.0, 0.0], (len(policy), 1)), np.ones(policy.shape, bool)
    # Every other prompt has its responses the other way around.
    policy[::2], reference[::2], rewards[::2] = (
        x[::2, ::-1].copy() for x in (policy, reference, rewards))
    args = [x.astype(np.float64 if x64 else np.float32) for x in (policy, reference, rewards)]
    with jax.enable_x64(x64):
      loss, _ = jax.jit(functools.partial(preference.group_dpo, beta=beta))(*args, real)
    want = golden[f"dpo_loss_beta{beta}"]
    self.assertLess(abs(float(loss) - want) / (1 + abs(want)), 1e-10 if x64 else 1e-5)

  @parameterized.product(form=FORMS, rewards=(0.0, 1.0, np.nan, "none real"))
  def test_without_a_pair_loss_and_gradient_are_exactly_zero(self, form, rewards):
    real = np.full((4, 4), rewards != "none real")
    rewards = REWARDS if rewards == "none real" else np.full((4, 4), rewards, np.float32)
    policy = np.where(real, POLICY, np.nan).astype(np.float32)
    loss, metrics, gradient, signal = evaluate(form, policy, rewards=rewards, real=real)
    self.assertEqual(loss, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
    np.testing.assert_array_equal(signal, 0.0)
    self.assertEqual({float(x) for x in metrics.values()}, {0.0})

  @parameterized.parameters(*FORMS)
  def test_a_group_of_one_has_no_pair(self, form):
    one = np.array([[1.0], [0.0], [1.0]])
    loss, _, _, signal = evaluate(form, one, one, one, np.ones((3, 1), bool))
    self.assertEqual(loss, 0.0)
    np.testing.assert_array_equal(signal, 0.0)

  @parameterized.product(form=FORMS, filler=(np.nan, -np.inf, 1e4))
  def test_what_stands_in_responses_without_pairs_is_ignored(self, form, filler):
    better = np.asarray(preference.pairs(REWARDS, REAL))
    paired = better.any(axis=1) | better.any(axis=2)
    self.assertEqual(paired.sum(), 4 + 4 + 0 + 2)
    got = evaluate(form, *(np.where(paired, x, filler) for x in (POLICY, REFERENCE)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(evaluate(form))):
      np.testing.assert_array_equal(a, b)

  @parameterized.product(form=FORMS, gap=(1e4, -1e4))
  def test_extreme_margins_are_finite(self, form, gap):
    loss, metrics, _, signal = evaluate(form, POLICY + gap * np.nan_to_num(REWARDS))
    self.assertTrue(all(np.isfinite(x) for x in (loss, *metrics.values())))
    self.assertTrue(np.all(np.isfinite(signal)))
    # Whoever is right by far has nothing left to learn.
    self.assertEqual(np.any(signal[0]), gap < 0)

  @parameterized.parameters(*FORMS)
  def test_only_the_order_of_rewards_counts_and_that_of_responses_does_not(self, form):
    signal = evaluate(form)[3]
    np.testing.assert_array_equal(evaluate(form, rewards=7 * REWARDS - 3)[3], signal)
    order = np.array([2, 0, 3, 1])
    moved = evaluate(form, *(x[:, order] for x in (POLICY, REFERENCE, REWARDS, REAL)))[3]
    np.testing.assert_allclose(moved, signal[:, order], rtol=1e-5, atol=1e-7)

  def test_shapes_that_would_broadcast_are_refused(self):
    for args in ((POLICY[:1], REFERENCE, REWARDS, REAL), (POLICY, REFERENCE[:1], REWARDS, REAL),
                 (POLICY, REFERENCE, REWARDS[:1], REAL), (POLICY, REFERENCE, REWARDS, REAL[:1]),
                 (POLICY[0], REFERENCE[0], REWARDS[0], REAL[0])):
      with self.assertRaises(AssertionError):
        preference.group_dpo(*args)


class SignalTest(parameterized.TestCase):

  @parameterized.parameters(*FORMS)
  def test_a_signal_is_the_loops_slope_times_the_number_of_responses(self, form):
    policy = POLICY if form == "dpo" else POLICY / 10
    signal = evaluate(form, policy)[3]
    np.testing.assert_allclose(signal, -15 * group_loop(form, policy)[2], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.sum(signal, axis=1), 0.0, atol=1e-6)

  def test_at_its_reference_dpo_is_the_policy_gradient_with_the_groups_baseline(self):
    rewards = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]], np.float32)
    signal = evaluate("dpo", POLICY, POLICY, rewards, np.ones((4, 4), bool))[3]
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    # R beta / 2N, with 16 responses and 3 + 4 + 3 pairs, times G.
    np.testing.assert_allclose(signal, 16 * 0.1 / (2 * 10) * 4 * centered, rtol=1e-5, atol=1e-7)


# A model as small as can be: features of every state, and a head.
P, G, T, D, V = 3, 4, 5, 4, 16
MASK = np.arange(T) < np.array([5, 1, 3, 2, 4, 2, 5, 1, 3, 0, 2, 4])[:, None]  # one is empty
OUTCOMES = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], np.float32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)


def make_batch():
  return batches.Batch(
      prompt=np.zeros((P * G, 1), np.int32), prompt_mask=np.ones((P * G, 1), bool),
      response=np.random.default_rng(0).integers(0, V, (P * G, T)), mask=MASK, learn=MASK,
      reward=OUTCOMES.reshape(-1), advantage=np.zeros(P * G, np.float32),
      reference_logprobs=np.random.default_rng(1).normal(-3, 1, (P * G, T)).astype(np.float32),
      teacher_hidden=np.random.default_rng(2).normal(size=(P * G, T, D)).astype(np.float32))


def logprobs(head, batch):
  scores = jax.nn.log_softmax(batch.teacher_hidden @ head)
  return jnp.take_along_axis(scores, batch.response[..., None], axis=-1)[..., 0]


def rows(form, x, mask):
  """[B, T] -> [P, G]: what a response's tokens come to in that loss."""
  return (masked.row_sum if form == "dpo" else masked.row_mean)(x, mask).reshape(P, G)


@functools.partial(jax.jit, static_argnums=0)
def graded(form, batch):
  """The first pass: all responses at once, without gradient."""
  real = jnp.any(batch.learn, axis=1).reshape(P, G)
  signal = group_signal(form, rows(form, logprobs(HEAD, batch), batch.learn),
                        rows(form, batch.reference_logprobs, batch.learn),
                        batch.reward.reshape(P, G), real)
  return batch.replace(advantage=signal.reshape(-1), learn=batch.learn & jnp.any(signal != 0.0))


@functools.cache
def train_step(aggregate, micro_batches):
  """The second pass: the real train step, plain descent, compiled."""
  def loss(head, batch, constants):
    signal = jnp.broadcast_to(batch.advantage[:, None], batch.learn.shape)
    return policy_gradient.score_function_loss(
        logprobs(head, batch), signal, batch.learn, aggregate=masked.AGGREGATES[aggregate])[0], {}
  return jax.jit(train_state.make_train_step(
      loss, lambda batch, columns: {}, optax.sgd(1.0), masked.COUNTS[aggregate], micro_batches,
      ema_rate=0.0))


def update(batch, aggregate, micro_batches=1):
  """The gradient in HEAD by the train step, and its metrics."""
  state = train_state.TrainState(
      jnp.zeros((), jnp.int32), HEAD, optax.sgd(1.0).init(HEAD), ema=None)
  state, metrics = train_step(aggregate, micro_batches)(state, batch, ())
  return HEAD - state.params, metrics


def direct(form):
  """The gradient of the loss in HEAD in one pass."""
  batch = make_batch()
  real = np.any(MASK, axis=1).reshape(P, G)
  return jax.jit(jax.grad(lambda head: group_loss(
      form, rows(form, logprobs(head, batch), MASK),
      rows(form, batch.reference_logprobs, MASK), OUTCOMES, real)[0]))(HEAD)


def by_torch(form):
  """The same gradient by torch in float64, from the papers' formulas, pair by pair."""
  torch = pytest.importorskip("torch")
  batch = make_batch()
  head = torch.tensor(HEAD, dtype=torch.float64, requires_grad=True)
  scores = torch.log_softmax(torch.tensor(batch.teacher_hidden, dtype=torch.float64) @ head, -1)
  losses = []
  for p in range(P):
    scored = []
    for b in range(p * G, (p + 1) * G):
      length = int(MASK[b].sum())
      policy = sum(scores[b, t, int(batch.response[b, t])] for t in range(length))
      reference = float(batch.reference_logprobs[b, :length].astype(np.float64).sum())
      scored.append((policy - reference if form == "dpo" else policy / max(length, 1), length > 0))
    for i in range(G):
      for j in range(G):
        if OUTCOMES[p, i] > OUTCOMES[p, j] and scored[i][1] and scored[j][1]:
          gap = BETAS[form] * (scored[i][0] - scored[j][0]) - float(form == "simpo")
          losses.append(-torch.nn.functional.logsigmoid(gap))
  torch.stack(losses).mean().backward()
  return head.grad.numpy()


class InPartsTest(parameterized.TestCase):

  @parameterized.parameters(*FORMS)
  def test_a_signal_has_the_gradient_of_the_loss_with_no_two_of_a_group_in_a_micro_batch(
      self, form):
    want = by_torch(form)
    self.assertGreater(np.max(np.abs(want)), 0.02)
    np.testing.assert_allclose(direct(form), want, rtol=1e-4, atol=1e-6)
    batch = graded(form, make_batch())
    for micro_batches in (1, 4):
      gradient, _ = update(batch, AGGREGATES[form], micro_batches)
      np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)

  @parameterized.parameters(*FORMS)
  def test_no_other_aggregation_has_it(self, form):
    batch, want = graded(form, make_batch()), direct(form)
    for aggregate in masked.AGGREGATES:
      off = np.max(np.abs(update(batch, aggregate)[0] - want)) / np.max(np.abs(want))
      self.assertEqual(off < 1e-2, aggregate == AGGREGATES[form], (aggregate, off))

  @parameterized.parameters(*FORMS)
  def test_a_batch_without_a_pair_skips_the_update(self, form):
    batch = graded(form, make_batch().replace(reward=np.ones(P * G, np.float32)))
    moved, metrics = update(batch, AGGREGATES[form], 4)
    np.testing.assert_array_equal(moved, 0.0)
    self.assertEqual(metrics["update/skipped"], 1.0)
    self.assertEqual(metrics["loss/total"], 0.0)


class VerifiedTest(parameterized.TestCase):

  def learned(self, reward):
    batch = make_batch().replace(reward=reward)
    signal = np.asarray(signals.verified(batch.reward))
    return batch.replace(advantage=signal, learn=batch.learn & (signal > 0.0)[:, None])

  @parameterized.parameters(*masked.AGGREGATES)
  def test_it_is_sft_on_the_verified_responses_alone(self, aggregate):
    alone = jax.tree.map(lambda x: x[OUTCOMES.reshape(-1) == 1.0], make_batch())
    loss, want = jax.jit(jax.value_and_grad(lambda head: supervised.sft(
        logprobs(head, alone), alone.mask, masked.AGGREGATES[aggregate])[0]))(HEAD)
    for micro_batches in (1, 4):
      gradient, metrics = update(self.learned(OUTCOMES.reshape(-1)), aggregate, micro_batches)
      np.testing.assert_allclose(metrics["loss/total"], loss, rtol=1e-5)
      np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)

  def test_a_batch_without_success_skips_the_update(self):
    moved, metrics = update(self.learned(np.full(P * G, 0.9, np.float32)), "token_mean", 4)
    np.testing.assert_array_equal(moved, 0.0)
    self.assertEqual(metrics["update/skipped"], 1.0)


if __name__ == "__main__":
  absltest.main()
