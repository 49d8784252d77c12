"""The engine draws what the plain sampler draws, whoever shares its slots."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import keys, preemption
from opd_jax.models import build, configs, decoding
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import engine, sampler, scorer, slots
from opd_jax.rollouts.sampler import Sampling
from opd_jax.rollouts.slots import Settings

SMALL = dict(vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, head_dim=8, mlp_dim=48)
ROPE = configs.RopeScaling("dynamic", 2.0, original_positions=16)  # its angles depend on length
MODELS = {
    "qwen3": dataclasses.replace(configs.NAMED["tiny_weak"], **SMALL, num_kv_heads=2),
    "phi3": dataclasses.replace(configs.NAMED["phi3_mini"], **SMALL, num_kv_heads=2,
                                sliding_window=7, rope_scaling=ROPE),
    "gpt2": dataclasses.replace(configs.NAMED["gpt2"], **SMALL, num_kv_heads=4, max_positions=40),
    "qwen3_moe": dataclasses.replace(configs.NAMED["qwen3_30b_a3b"], **SMALL, num_kv_heads=2,
                                     num_experts=4, experts_per_token=2),
}
WIDTH, T, V = 12, 24, 48
KEY = keys.at(keys.root(1), "rollout")


@functools.cache
def policy(name="qwen3", dtype=jnp.float32):
  params = build.init_params(MODELS[name], keys.root(0))
  # Sharper than at birth, so that log-probabilities differ from uniform.
  return build.build(MODELS[name], dtype), jax.tree.map(lambda x: x * 2.0, params)


def prompts(count, group=1):
  rng = np.random.default_rng(0)
  rows = [rng.integers(3, V, n).tolist() for n in rng.integers(1, WIDTH + 1, count)]
  rows[-1] = rng.integers(3, V, WIDTH).tolist()
  return [np.repeat(x, group, axis=0) for x in batches.pad(rows, WIDTH, 0, left=True)]


def settings(eos=(2, 3, 4), **kwargs):
  return Settings(T, eos, 0, V, **{"chunk": 4, "buckets": (6,), **kwargs})


@functools.cache
def plain(name, rows, group, eos, sampling=Sampling()):
  model, params = policy(name)
  out = jax.jit(lambda prompt, mask: sampler.sample(
      model, params, prompt, mask, KEY, max_response=T, eos_ids=eos, pad_id=0, vocab_size=V,
      sampling=sampling))(*prompts(rows, group))
  return jax.tree.map(np.asarray, out)


@jax.jit
def score(*columns):
  model, params = policy()
  return scorer.logprobs(model, params, batches.Batch(*columns))[0]


class EngineTest(parameterized.TestCase):

  def assert_plain(self, wanted, name="qwen3", rows=9, group=1):
    """The engine's rollout, after a look at whether it is the plain sampler's."""
    model, params = policy(name)
    got = engine.make(model, wanted)(params, *prompts(rows, group), KEY)
    want = plain(name, rows, group, wanted.eos_ids, wanted.sampling)
    np.testing.assert_array_equal(got.response, want.response)
    np.testing.assert_array_equal(got.mask, want.mask)
    np.testing.assert_allclose(got.sampler_logprobs, want.sampler_logprobs, atol=2e-5)
    return got

  @parameterized.parameters(*MODELS)
  def test_every_family_equals_the_plain_sampler(self, name):
    lengths = self.assert_plain(settings(slots=4), name).mask.sum(axis=1)
    self.assertGreater(len(set(lengths)), 3)

  @parameterized.parameters((1, 16, 9), (2, 4, 9), (3, 4, 9), (4, 1, 9), (8, 4, 9), (64, 4, 9),
                            (64, 4, 70))
  def test_neither_slots_nor_chunks_change_a_row(self, count, chunk, rows):
    self.assert_plain(settings(slots=count, chunk=chunk), rows=rows)

  def test_a_cache_that_grows_and_shrinks_changes_no_row(self):
    widths, make = [], slots.compiled

    def compiled(*args):
      steps = make(*args)

      def align(*args, width):
        widths.append(width)
        return steps.align(*args, width=width)
      return steps._replace(align=align)

    with mock.patch.object(engine, "NARROWEST", 16), mock.patch.object(slots, "compiled", compiled):
      self.assert_plain(settings(slots=3))
    change = np.diff(widths)
    self.assertGreater(change.max(), 0)
    self.assertLess(change.min(), 0)
    self.assertIn(0, change)  # the columns had run out, not the width

  @parameterized.parameters((16, 16, "", [4, 1]), (4, 9, "int8", [1]), (6, 9, "", [1]))
  def test_slots_become_fewer_once_nobody_waits(self, count, rows, kv_dtype, wanted):
    kept, make = [], slots.compiled

    def compiled(*args):
      steps = make(*args)

      def keep(cache, token, slots):
        kept.append(len(slots))
        return steps.keep(cache, token, slots)
      return steps._replace(keep=keep)

    model, params = policy()
    limit = np.where(np.arange(rows) == 2, T, np.where(np.arange(rows) < 4, 12, 3))
    call = lambda count: engine.make(model, settings((V,), slots=count, kv_dtype=kv_dtype))(
        params, *prompts(rows), KEY, limit)
    want = call(rows + 1)
    with mock.patch.object(engine, "FEWEST", 1), mock.patch.object(slots, "compiled", compiled):
      got = call(count)
    self.assertEqual(kept, wanted)
    np.testing.assert_array_equal(got.mask.sum(axis=1), limit)
    np.testing.assert_array_equal(got.response, want.response)
    np.testing.assert_allclose(got.sampler_logprobs, want.sampler_logprobs, atol=2e-5)

  @parameterized.parameters("short", "long", "one_long", "first")
  def test_refill_under_every_load(self, load):
    free = plain("qwen3", 9, 1, (V,)).response  # nobody ends
    others = np.delete(free, 4, axis=0)
    eos = {"short": free[:, 2], "long": [V], "one_long": np.setdiff1d(others[:, 1:4], free[4]),
           "first": np.arange(V)}[load]
    lengths = self.assert_plain(settings(tuple(np.unique(eos).tolist()), slots=3)).mask.sum(axis=1)
    if load in ("long", "first"):
      np.testing.assert_array_equal(lengths, T if load == "long" else 1)
    if load == "short":
      self.assertEqual(set(lengths), {1, 2, 3})
    if load == "one_long":
      self.assertEqual(lengths[4], T)
      self.assertLess(np.median(lengths), T / 2)

  @parameterized.parameters((2, 16, 20), (2, 16, 5), (9, 1, 4))
  def test_a_group_reads_its_prompt_once(self, count, group, slots_count):
    wanted = settings(slots=slots_count)
    model, params = policy()
    queue, read = engine.in_groups(*prompts(count, group), np.full(count * group, T)), []
    steps = slots.compiled(model, wanted)

    def prefill(params, prompt, mask, **kwargs):
      read.append(mask.sum(axis=1))
      return steps.prefill(params, prompt, mask, **kwargs)

    weights = decoding.preparation(model)(params)
    got = engine.run(steps._replace(prefill=prefill), wanted, params, weights, queue, KEY)
    want = plain("qwen3", count, group, wanted.eos_ids)
    np.testing.assert_array_equal(got.response, want.response)
    block = -(-slots_count // group)
    self.assertLen(read, -(-count // block))
    np.testing.assert_array_equal(np.concatenate(read)[:count], queue.length[::group])

  def test_greedy_and_filtered_draws_are_the_plain_samplers_too(self):
    for sampling in (Sampling(temperature=0.0), Sampling(0.7, 20, 0.9)):
      self.assert_plain(settings(sampling=sampling))

  def test_logprobs_equal_the_scorers(self):
    model, params = policy()
    prompt, mask = prompts(9)
    got = engine.make(model, settings(slots=4))(params, prompt, mask, KEY)
    scored = score(prompt, mask, *got[:2])
    np.testing.assert_allclose(np.where(got.mask, scored, 0), got.sampler_logprobs, atol=2e-5)

  # In nats, of log-probabilities around -3: what rounding the cache alone costs.
  @parameterized.parameters(("float32", 2e-5, 2e-5), ("bfloat16", 0.004, 0.03),
                            ("int8", 0.008, 0.06))
  def test_error_of_a_rounded_cache_is_bounded(self, kv_dtype, mean, most):
    model, params = policy()
    prompt, mask = prompts(9)
    got = engine.make(model, settings((V,), kv_dtype=kv_dtype))(params, prompt, mask, KEY)
    scored = score(prompt, mask, *got[:2])
    error = np.abs(scored - got.sampler_logprobs)
    self.assertLess(error.mean(), mean)
    self.assertLess(error.max(), most)
    if kv_dtype == "int8":
      self.assertGreater(error.max(), 1e-4)  # it was int8

  @parameterized.parameters(("float32", ""), ("bfloat16", ""), ("float32", "bfloat16"),
                            ("bfloat16", "int8"))
  def test_the_cache_stays_where_it_is_and_angles_are_computed_once_a_step(self, dtype, kv_dtype):
    # A bfloat16 column is written by a pass over its layer's cache all the same: XLA on CPUs has
    # no bfloat16 update (tests/bench/README.md).
    model, params = policy(dtype=jnp.dtype(dtype))
    steps = slots.compiled(model, settings(kv_dtype=kv_dtype))
    weights = decoding.preparation(model)(params)
    cache = steps.empty(rows=5, width=37)  # sizes that nothing else has
    rows = slots.Rows(*(np.zeros(5, np.int32) for _ in range(4)), np.ones(5, bool))
    program = steps.decode.lower(weights, cache, jnp.zeros((5,), jnp.int32), rows, 12, 3, KEY,
                                 length=WIDTH + T - 1).compile()
    text = program.as_text()
    shape = r"\w+\[5,2,37,8\]"
    self.assertRegex(text, shape)
    self.assertEqual(re.findall(rf"= {shape}\S* (?:copy|transpose|concatenate)\(.*", text), [])
    size = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    self.assertGreaterEqual(program.memory_analysis().alias_size_in_bytes, size)
    self.assertLen(re.findall(r"cosine\(", text), 1)  # not one a layer
    block = jax.eval_shape(functools.partial(steps.prefill, length=WIDTH + T - 1), params,
                           np.zeros((3, WIDTH), np.int32), np.ones((3, WIDTH), bool))
    for old, new in zip(cache.layers, block.layers, strict=True):
      placed = slots.placed.lower(old, new, np.zeros(5, np.int32), np.ones(5, bool), 12).compile()
      self.assertGreaterEqual(placed.memory_analysis().alias_size_in_bytes,
                              sum(x.nbytes for x in jax.tree.leaves(old)))

  def test_a_row_longer_than_the_model_allows_is_named(self):
    model, params = policy("gpt2")
    wanted = settings()._replace(max_response=30)
    message = ("row 8 has a prompt of 12 tokens; with a response of up to 30 that makes 42, but "
               "the model allows 40; shorten")
    with self.assertRaisesRegex(ValueError, message):
      engine.make(model, wanted)(params, *prompts(9), KEY)
    just_fits = engine.in_groups(*prompts(9), np.full(9, 28))
    engine.check(just_fits, 28, model.config.max_positions)

  def test_a_row_ends_at_its_own_limit(self):
    model, params = policy()
    generate, limit = engine.make(model, settings(slots=4)), np.array([1, 24, 3, 9, 2, 5, 1, 24, 7])
    got, want = generate(params, *prompts(9), KEY, limit), plain("qwen3", 9, 1, (2, 3, 4))
    np.testing.assert_array_equal(got.mask, want.mask & (np.arange(T) < limit[:, None]))
    np.testing.assert_array_equal(got.response, np.where(got.mask, want.response, 0))
    for least, most in ((1, 25), (0, 24)):
      with self.assertRaisesRegex(ValueError, f"limits are {least} to {most} tokens; they must be "
                                  "at least 1 and at most max_response = 24"):
        generate(params, *prompts(9), KEY, np.array([least] * 8 + [most]))

  def test_a_response_goes_on_from_any_prefix_as_part_of_the_same_sequence(self):
    model, params = policy("phi3")  # its angles depend on the sequences' length
    greedy = Sampling(temperature=0.0)
    want, (prompt, mask) = plain("phi3", 9, 1, (2, 3, 4), greedy), prompts(9)
    lengths = want.mask.sum(axis=1)
    kept = np.minimum([0, 3, 9, 1, 15, 23, 6, 2, 12], lengths - 1)
    rows = [[*p[m], *r[:n]] for p, m, r, n in zip(prompt, mask, want.response, kept)]
    wide = WIDTH + T - 1  # also the length of the sequences, though not what this is padded to
    generate = engine.make(model, settings(slots=4, sampling=greedy, buckets=(WIDTH,), length=wide))
    got = generate(params, *batches.pad(rows, wide, 0, left=True), KEY, T - kept)
    for n, length, whole, rest, real in zip(kept, lengths, want.response, got.response, got.mask):
      np.testing.assert_array_equal(rest[real], whole[n:length])

  def test_a_rollout_that_sigterm_broke_off_is_drawn_again(self):
    model, params = policy()
    generate, asked = engine.make(model, settings(slots=4)), []
    with preemption.guard() as stop:
      def at_the_third_chunk():
        asked.append(None)
        if len(asked) == 3:
          signal.raise_signal(signal.SIGTERM)
        return stop()
      with self.assertRaises(engine.Stopped):
        generate(params, *prompts(9), KEY, stop=at_the_third_chunk)
    self.assertLen(asked, 3)
    self.assert_plain(settings(slots=4))

  def test_an_unknown_cache_is_refused(self):
    with self.assertRaisesRegex(ValueError, "kv_dtype is 'int4'; it must be one of '', 'float32'"):
      engine.make(policy()[0], settings(kv_dtype="int4"))


ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
import json, sys
sys.path.insert(0, "tests/rollouts")
import jax, numpy as np
import engine_test
from opd_jax import keys, sharding
from opd_jax.models import build
from opd_jax.rollouts import engine

model, params = engine_test.policy()
prompts, wanted = engine_test.prompts(8, 3), engine_test.settings((engine_test.V,), slots=16)
limit = np.where(np.arange(24) == 20, engine_test.T, 3 + np.arange(24) % 5)
want = engine.make(model, wanted)(params, *prompts, engine_test.KEY, limit)
counts, fewer = [], engine.fewer
engine.fewer = lambda *args: counts.append(fewer(*args)) or counts[-1]
engine.FEWEST = 1  # so that slots become fewer on the mesh
mesh = sharding.make_mesh(4, 2)
with jax.set_mesh(mesh):
  born = jax.device_put(params, sharding.of_params(build.abstract_params(model.config), mesh))
  got = engine.make(model, wanted)(born, *prompts, engine_test.KEY, limit)
print(json.dumps([counts, bool(np.array_equal(got.response, want.response)),
                  float(np.abs(got.sampler_logprobs - want.sampler_logprobs).max())]))
"""


class MeshTest(absltest.TestCase):

  def test_eight_devices_equal_one(self):
    env = os.environ | {"JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "8"}
    child = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT,
                           capture_output=True, text=True)
    self.assertEqual(child.returncode, 0, child.stderr)
    counts, same, error = json.loads(child.stdout.splitlines()[-1])
    self.assertEqual(set(counts), {16, 4})  # and not 1: four devices share the rows
    self.assertTrue(same)
    self.assertLess(error, 2e-5)


if __name__ == "__main__":
  absltest.main()
