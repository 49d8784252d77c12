"""A mixture of experts equals a loop over tokens, torch's gradients, and itself on eight devices.

Parity of logits, decoding, import and export is in families_test.py, with the other families.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import keys
from opd_jax.models import build, configs, hf, hf_rows, moe
from opd_jax.rollouts import sampler

SMALL = dict(vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
             mlp_dim=12, num_experts=8, experts_per_token=3)
CONFIG = dataclasses.replace(configs.NAMED["qwen3_30b_a3b"], **SMALL)


def uneven(experts, dtype="float32", tokens=200, count=2):
  """x, router logits and kernels of which the last expert is never chosen and the first always."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  logits = rng.normal(size=(1, tokens, experts)).astype(np.float32)
  logits[..., 0] += 20
  logits[..., -1] -= 20
  kernels = array(experts, 6, 5), array(experts, 6, 5), array(experts, 5, 6)
  return array(1, tokens, 6), jnp.asarray(logits), kernels, count


def looped(x, logits, kernels, count, normalized):
  """The definition, token by token and expert by expert, in float64."""
  gate, up, down = (np.float64(kernel) for kernel in kernels)
  result = np.zeros(x.shape)
  for t, (row, scores) in enumerate(zip(np.float64(x[0]), np.float64(logits[0]))):
    shares = np.exp(scores - scores.max()) / np.sum(np.exp(scores - scores.max()))
    chosen = np.argsort(-shares)[:count]
    whole = np.sum(shares[chosen]) if normalized else 1.0
    for e in chosen:
      wide = row @ gate[e]
      result[0, t] += shares[e] / whole * ((wide / (1 + np.exp(-wide)) * (row @ up[e])) @ down[e])
  return result


class MixtureTest(parameterized.TestCase):

  @parameterized.parameters(True, False)
  def test_mixture_equals_a_loop(self, normalized):
    x, logits, kernels, count = uneven(experts=5)
    got = jax.jit(moe.mixture, static_argnums=(3, 4))(x, logits, kernels, count, normalized)
    np.testing.assert_allclose(got, looped(x, logits, kernels, count, normalized), atol=1e-4)

  def test_grouped_products_and_their_gradients_are_the_groups_own(self):
    rng = np.random.default_rng(0)
    sizes = np.array([0, 37, 1, 0, 22])
    x, kernel, weight = (rng.normal(size=s).astype(np.float32)
                         for s in ((70, 4), (5, 4, 3), (70, 3)))
    group = np.repeat(np.arange(5), sizes)
    inside = np.arange(70)[:, None] < 60
    wanted = lambda x, kernel: jnp.einsum("md,mdf->mf", x[:60], kernel[group])
    both = lambda f, weight: jax.value_and_grad(
        lambda x, kernel: jnp.sum(f(x, kernel) * weight), (0, 1))(x, kernel)
    got = jax.jit(lambda: both(lambda *a: moe.grouped(*a, jnp.asarray(sizes)), weight))()
    np.testing.assert_allclose(moe.grouped(x, kernel, jnp.asarray(sizes)) * ~inside, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got,
                 both(wanted, weight[:60]))

  def test_several_passes_equal_one(self):
    x, logits, kernels, count = uneven(experts=5)
    weights, experts = moe.route(logits[0], count, True)
    order = jnp.argsort(experts.reshape(-1))
    ends = jnp.searchsorted(experts.reshape(-1)[order], jnp.arange(5), side="right")

    def both(rows):
      f = lambda *inputs: jnp.sum(
          moe._sum_of_copies(rows, -(-400 // rows), (order, ends), *inputs) ** 2)
      return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x[0], weights, kernels)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), both(150),
                 both(400))

  def test_no_array_of_tokens_times_experts_times_a_width(self):
    tokens, experts = 512, 64
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    kernels = shape(experts, 32, 16), shape(experts, 32, 16), shape(experts, 16, 32)
    loss = lambda *a: jnp.sum(moe.mixture(*a, 4, True) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
        shape(1, tokens, 32), shape(1, tokens, experts), kernels).compile()
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, tokens * experts * 32 * 4)


class TorchTest(parameterized.TestCase):

  def test_gradients_equal_torch_of_router_and_experts(self):
    torch = pytest.importorskip("torch")
    import transformers
    params = build.init_params(CONFIG, keys.root(0))
    tokens = np.random.default_rng(0).integers(0, 48, (2, 9))
    positions, ones = np.tile(np.arange(9), (2, 1)), np.ones((2, 9), int)
    target = np.random.default_rng(1).normal(size=(2, 9, 48)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
      hf.export_hf(params, CONFIG, folder + "/model")
      theirs = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model")
      logits = theirs(torch.tensor(tokens)).logits
      loss = torch.sum(logits * torch.tensor(target))
      loss.backward()
      want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    model = build.build(CONFIG)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
      hidden, _ = model.apply({"params": params}, tokens, positions, ones)
      return jnp.sum(model.apply({"params": params}, hidden, method="logits") * target)

    value, gradient = ours(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    blocks = jax.device_get(gradient["blocks"])
    compared = 0
    for tensor in hf_rows.tensor_list(CONFIG, stacked_experts=True):
      arrays = [functools.reduce(lambda tree, key: tree[key], row.path.split("/"), gradient)
                for row in tensor.rows]
      got = tensor.join([np.asarray(x[tensor.at[0]] if tensor.at else x) for x in arrays])
      scale = np.abs(want[tensor.name]).max()
      self.assertGreater(scale, 0, tensor.name)
      np.testing.assert_allclose(got, want[tensor.name], atol=1e-4 * scale, err_msg=tensor.name)
      compared += 1
    self.assertLen(want, compared)
    self.assertEqual(blocks["mlp"]["router"].shape, (2, 32, 8))

  def test_greedy_rollouts_equal_those_of_transformers(self):
    torch = pytest.importorskip("torch")
    import transformers
    params = jax.tree.map(lambda x: x * 2.0, build.init_params(CONFIG, keys.root(0)))
    model, greedy = build.build(CONFIG), sampler.Sampling(temperature=0.0)
    prompt = np.random.default_rng(0).integers(3, 48, (2, 7))
    got = jax.jit(lambda params: sampler.sample(
        model, params, prompt, np.ones((2, 7), bool), keys.root(1), max_response=10, eos_ids=(0,),
        pad_id=0, vocab_size=48, sampling=greedy))(params)
    with tempfile.TemporaryDirectory() as folder:
      hf.export_hf(params, CONFIG, folder + "/model")
      theirs = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model")
      want = theirs.generate(torch.tensor(prompt), do_sample=False, max_new_tokens=10,
                             min_new_tokens=10, pad_token_id=0).numpy()[:, 7:]
    mask = np.asarray(got.mask)
    np.testing.assert_array_equal(np.asarray(got.response)[mask], want[mask])
    self.assertGreater(mask.sum(), 10)

  def test_stacked_experts_of_transformers_5_are_read(self):
    pytest.importorskip("torch")
    import transformers
    params = build.init_params(CONFIG, keys.root(0))
    with tempfile.TemporaryDirectory() as room:
      hf.export_hf(params, CONFIG, room + "/ours")
      theirs = transformers.AutoModelForCausalLM.from_pretrained(room + "/ours")
      theirs.save_pretrained(room + "/theirs", save_original_format=False)
      names = [tensor.name for tensor in hf_rows.tensor_list(CONFIG, stacked_experts=True)]
      self.assertIn("model.layers.1.mlp.experts.gate_up_proj", names)
      self.assertEqual(hf.load_config(room + "/theirs"), CONFIG)
      jax.tree.map(np.testing.assert_array_equal, hf.import_hf(room + "/theirs"), params)


SCRIPT = """
import dataclasses, json, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from opd_jax import keys, sharding
from opd_jax.models import build, configs, decoding, hf, layers

config = dataclasses.replace(configs.NAMED["qwen3_30b_a3b"], **json.loads(sys.argv[1]))
rng = np.random.default_rng(0)
tokens = rng.integers(0, 48, (8, 40))
mask = (np.arange(40) >= np.arange(8)[:, None] % 4).astype(np.int32)
positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
model, key = build.build(config), keys.root(0)
alone = build.init_params(config, key)
# So that most tokens want the first experts: their device needs several passes.
alone["embedding"] += 0.5
alone["blocks"]["mlp"]["router"] = alone["blocks"]["mlp"]["router"].at[..., :2].add(0.3)

def loss(params):
  hidden, _ = model.apply({"params": params}, tokens, positions, mask)
  logits = model.apply({"params": params}, hidden, method="logits")
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
  return -jnp.sum(picked[..., 0] * mask[:, 1:]) / mask.sum()

def step(params):
  value, gradient = jax.value_and_grad(loss)(params)
  return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

def decode(params):  # prefill and one cached token, as a sampler does
  ready, one = decoding.preparation(model)(params), decoding.unrolled(model)
  cache = layers.empty_cache(config, 8, 40, jnp.float32, unrolled=True)
  @jax.jit
  def call(params, cache, *piece):
    hidden, cache = one.apply({"params": params}, *piece, cache)
    return one.apply({"params": params}, hidden, method="logits"), cache
  pieces = lambda a, b: (tokens[:, a:b], positions[:, a:b], mask[:, a:b])
  first, cache = call(ready, cache, *pieces(0, 39))
  last, _ = call(ready, cache, *pieces(39, 40))
  return np.concatenate([first, last], axis=1)

def shares(x):
  return x.size // x.addressable_shards[0].data.size

gap = lambda a, b: max(jax.tree.leaves(jax.tree.map(
    lambda x, y: float(np.abs(x - y).max()), jax.device_get(a), jax.device_get(b))))
want_decoded = decode(alone)
want_params, want_loss = jax.jit(step)(alone)
room, result = tempfile.mkdtemp(), {}
hf.export_hf(alone, config, room + "/alone")
for name, sizes in {"4x2": dict(data=4, model=2), "1x8": dict(data=1, model=8),
                    "2x2x2": dict(replica=2, data=2, model=2)}.items():
  mesh = sharding.make_mesh(**sizes)
  with jax.set_mesh(mesh):
    read = hf.import_hf(room + "/alone", mesh=mesh)
    layout = jax.tree.map(lambda x: x.sharding, read)
    found = dict(read=gap(read, alone), share=shares(read["blocks"]["mlp"]["up"]),
                 spec=tuple(read["blocks"]["mlp"]["up"].sharding.spec),
                 decoded=gap(decode(read), want_decoded))
    hf.export_hf(read, config, room + "/sharded")
    found["written"] = gap(hf.import_hf(room + "/sharded"), alone)
    params, value = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))(read)
  found |= dict(step=gap(params, want_params), loss=abs(float(value - want_loss)),
                moved=gap(params, alone))
  result[name] = found
print(json.dumps(result))
"""


class MeshTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    env = os.environ | {"JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "8"}
    child = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(SMALL)], env=env,
                           capture_output=True, text=True)
    if child.returncode:
      raise AssertionError(child.stderr)
    cls.result = json.loads(child.stdout)

  @parameterized.parameters("4x2", "1x8", "2x2x2")
  def test_decoding_and_a_train_step_equal_one_device(self, mesh):
    result = self.result[mesh]
    self.assertLess(result["decoded"], 1e-4)
    self.assertLess(result["loss"], 1e-5)
    self.assertLess(result["step"], 1e-5)
    self.assertGreater(result["moved"], 1e-3)

  @parameterized.parameters(("4x2", 8), ("1x8", 8), ("2x2x2", 4))
  def test_experts_are_cut_and_read_and_written_bit_for_bit(self, mesh, share):
    result = self.result[mesh]
    self.assertEqual((result["read"], result["written"]), (0, 0))
    self.assertEqual(result["share"], share)
    self.assertEqual(result["spec"], [None, "model", "data", None])


if __name__ == "__main__":
  absltest.main()
