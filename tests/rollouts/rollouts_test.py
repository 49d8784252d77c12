"""The sampler says what the scorer says, and neither padding nor neighbors change a row."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import build, configs
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import sampler, scorer
from opd_jax.rollouts.sampler import Sampling

CONFIG = configs.NAMED["tiny_weak"]
MODEL = build.build(CONFIG)
PARAMS = build.init_params(CONFIG, jax.random.key(0))
# Sharper than at birth, so that log-probabilities differ from uniform.
PARAMS = jax.tree.map(lambda x: x * 3.0, PARAMS)
EOS, PAD, T = 2, 0, 12


@functools.partial(jax.jit, static_argnames=("max_response", "sampling", "eos"))
def sample(prompt, mask, key, max_response=T, sampling=Sampling(), eos=(EOS,)):
  return sampler.sample(MODEL, PARAMS, prompt, mask, key, max_response=max_response, eos_ids=eos,
                        pad_id=PAD, vocab_size=CONFIG.vocab_size, sampling=sampling)


def prompts(lengths, width):
  rng = np.random.default_rng(0)
  rows = [rng.integers(3, 300, size=n).tolist() for n in lengths]
  return batches.pad(rows, width, PAD, left=True)


class SamplerTest(parameterized.TestCase):

  def rollout(self, lengths=(4, 9, 6), width=9, seed=1, **kwargs):
    prompt, mask = prompts(lengths, width)
    out = sample(prompt, mask, jax.random.key(seed), **kwargs)
    return batches.Batch(prompt, mask, **out._asdict())

  def test_sampler_logprobs_equal_the_scorers(self):
    batch = self.rollout(eos=tuple(range(3, 30)))
    self.assertLess(int(batch.mask.sum()), batch.mask.size)  # some rows ended early
    scored, _ = scorer.logprobs(MODEL, PARAMS, batch)
    np.testing.assert_allclose(np.where(batch.mask, batch.sampler_logprobs, 0),
                               np.where(batch.mask, scored, 0), atol=2e-5)

  def test_cached_greedy_decoding_equals_the_full_forward(self):
    batch = self.rollout(sampling=Sampling(temperature=0.0))
    states = scorer.hidden(MODEL, PARAMS, batch)
    greedy = jnp.argmax(MODEL.apply({"params": PARAMS}, states, method="logits"), axis=-1)
    np.testing.assert_array_equal(np.where(batch.mask, batch.response, 0),
                                  np.where(batch.mask, greedy, 0))

  def test_left_padding_and_neighbors_change_nothing(self):
    batch = self.rollout()
    wider = self.rollout(width=14)
    np.testing.assert_array_equal(batch.response, wider.response)
    np.testing.assert_allclose(batch.sampler_logprobs, wider.sampler_logprobs, atol=1e-5)
    fewer = self.rollout(lengths=(4, 9))
    np.testing.assert_array_equal(batch.response[:2], fewer.response)

  def test_a_longer_limit_only_adds_tokens(self):
    short, long = self.rollout(max_response=5), self.rollout(max_response=T)
    np.testing.assert_array_equal(short.response, long.response[:, :5])

  def test_eos_first_last_and_never(self):
    first = self.rollout(eos=tuple(range(CONFIG.vocab_size)))
    np.testing.assert_array_equal(first.mask.sum(axis=1), 1)
    np.testing.assert_array_equal(first.response[:, 1:], PAD)
    free = self.rollout(eos=(CONFIG.vocab_size,))
    self.assertTrue(np.all(free.mask))  # never: truncated, all of it real
    last = int(free.response[0, -1])
    if last not in np.asarray(free.response[0, :-1]):
      ended = self.rollout(eos=(last,))
      np.testing.assert_array_equal(ended.response[0], free.response[0])
      self.assertTrue(np.all(ended.mask[0]))

  def test_masks_come_from_lengths_so_pad_may_equal_eos(self):
    prompt, mask = prompts((4, 6), 6)
    out = sampler.sample(MODEL, PARAMS, prompt, mask, jax.random.key(3), max_response=T,
                         eos_ids=tuple(range(0, 60)), pad_id=0, vocab_size=CONFIG.vocab_size)
    for row, real in zip(np.asarray(out.response), np.asarray(out.mask)):
      length = real.sum()
      self.assertTrue(length == T or row[length - 1] < 60)  # EOS itself is real
      np.testing.assert_array_equal(row[length:], 0)

  @parameterized.parameters([Sampling()], [Sampling(temperature=0.0)], [Sampling(0.7, 318, 0.9)])
  def test_padding_ids_are_never_drawn_and_change_nothing(self, sampling):
    want = self.rollout(sampling=sampling)
    # Rows beyond the tokenizer, as likely as the likeliest tokens: copies of the real ones.
    config = dataclasses.replace(CONFIG, vocab_size=2 * CONFIG.vocab_size)
    params = PARAMS | {"embedding": jnp.concatenate([PARAMS["embedding"]] * 2)}
    prompt, mask = prompts((4, 9, 6), 9)
    out = jax.jit(lambda params: sampler.sample(
        build.build(config), params, prompt, mask, jax.random.key(1), max_response=T,
        eos_ids=(EOS,), pad_id=PAD, vocab_size=CONFIG.vocab_size, sampling=sampling))(params)
    np.testing.assert_array_equal(out.response, want.response)
    np.testing.assert_allclose(out.sampler_logprobs, want.sampler_logprobs, atol=1e-5)

  def test_one_key_one_text(self):
    np.testing.assert_array_equal(self.rollout(seed=5).response, self.rollout(seed=5).response)
    self.assertTrue(np.any(self.rollout(seed=5).response != self.rollout(seed=6).response))


class SamplingDistributionTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.logits = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32) * 2

  @parameterized.parameters((1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.7),
                            (0.6, 10, 0.95), (1.0, 50, 0.01))
  def test_equals_a_plain_loop(self, temperature, top_k, top_p):
    got = sampler.sampling_logprobs(self.logits, Sampling(temperature, top_k, top_p))
    for row, logits in zip(np.exp(got), self.logits / temperature):
      order = np.argsort(-logits)
      kept = list(order[:top_k] if top_k else order)
      p = np.exp(logits[kept] - logits[kept].max())
      p /= p.sum()
      count = int(np.sum(np.cumsum(p) - p < top_p)) if top_p < 1 else len(kept)
      want = np.zeros(20)
      want[kept[:count]] = p[:count] / p[:count].sum()
      np.testing.assert_allclose(row, want, atol=1e-5)

  def test_draws_follow_the_distribution(self):
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens, logprobs = sampler.draw(jnp.tile(self.logits[:1], (20_000, 1)), keys,
                                    Sampling(0.7, 6, 0.9))
    share = np.bincount(tokens, minlength=20) / 20_000
    want = np.exp(sampler.sampling_logprobs(self.logits[:1], Sampling(0.7, 6, 0.9))[0])
    np.testing.assert_allclose(share, want, atol=0.015)
    np.testing.assert_allclose(np.exp(logprobs), want[tokens], rtol=1e-4)


class ScorerTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(4)
    self.batch = batches.pair([rng.integers(3, 300, n).tolist() for n in (3, 7)],
                              [rng.integers(3, 300, n).tolist() for n in (10, 6)], 8, 10, PAD)

  def test_column_t_speaks_about_token_t(self):
    scored, entropy = scorer.logprobs(MODEL, PARAMS, self.batch)
    for i, (n, m) in enumerate(((3, 10), (7, 6))):  # each row alone, unpadded
      tokens = np.concatenate([self.batch.prompt[i][-n:], self.batch.response[i][:m]])[None]
      ones = np.ones_like(tokens)
      states, _ = MODEL.apply({"params": PARAMS}, tokens, np.arange(n + m)[None], ones)
      logp = jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, states, method="logits"))[0]
      for t in range(m):
        self.assertAlmostEqual(float(scored[i, t]), float(logp[n + t - 1, tokens[0, n + t]]),
                               delta=2e-5)
        self.assertAlmostEqual(float(entropy[i, t]),
                               float(-np.sum(np.exp(logp[n + t - 1]) * logp[n + t - 1])), delta=1e-4)

  def test_topk_are_the_largest_logprobs(self):
    ids, logprobs = scorer.topk_logprobs(MODEL, PARAMS, self.batch, 5)
    states = scorer.hidden(MODEL, PARAMS, self.batch)
    full = np.asarray(jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, states, method="logits")))
    np.testing.assert_allclose(logprobs, -np.sort(-full, axis=-1)[..., :5], atol=1e-5)
    np.testing.assert_allclose(logprobs, np.take_along_axis(full, np.asarray(ids), -1), atol=1e-5)


class BatchTest(absltest.TestCase):

  def test_groups_are_neighbors_and_buckets_bound_shapes(self):
    batch = batches.prompts([[5, 6], [7, 8, 9]], 2, (8, 4), PAD)
    np.testing.assert_array_equal(batch.prompt, [[0, 0, 5, 6]] * 2 + [[0, 7, 8, 9]] * 2)
    np.testing.assert_array_equal(batch.prompt_mask.sum(axis=1), [2, 2, 3, 3])
    with self.assertRaisesRegex(ValueError, "9 tokens is longer than the largest bucket, 8"):
      batches.prompts([[1] * 9], 1, (4, 8), PAD)

  def test_routed_rows_meet_the_function_of_their_choice_alone(self):
    met = []  # (function, value) of every row that is no filling
    def function(i):
      def one(rows, real):
        jax.debug.callback(lambda x, real: met.extend((i, v) for v in x[real].tolist()), rows, real)
        return rows * 10 + i, jnp.sum(jnp.where(real, rows, 0))
      return one
    choose = jax.jit(lambda choice: batches.routed(
        [function(i) for i in range(3)], choice, jnp.arange(26)))
    for choice in (np.arange(26) % 3, np.full(26, 2), np.array([1] * 13 + [0] * 13)):
      met.clear()
      out, total = choose(choice)
      jax.effects_barrier()
      np.testing.assert_array_equal(out, np.arange(26) * 10 + choice)
      self.assertEqual(total, 26 * 25 // 2)
      self.assertCountEqual(met, list(zip(choice.tolist(), range(26))))

  def test_split_deals_every_row_once(self):
    rows = np.arange(12).reshape(6, 2)
    parts = batches.split({"x": rows}, 3)["x"]
    self.assertEqual(parts.shape, (3, 2, 2))
    np.testing.assert_array_equal(np.sort(parts.reshape(6, 2), axis=0), rows)


if __name__ == "__main__":
  absltest.main()
