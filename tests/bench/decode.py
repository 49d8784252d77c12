"""Tokens a second of sampling: our engine, our plain sampler, transformers on torch, Tunix.

    python tests/bench/decode.py --loads even8         # a load takes minutes, mixed takes hours
    python tests/bench/decode.py --loads groups --dtypes bfloat16
    python tests/bench/decode.py --quick               # a small model, to try the script
    bash tests/bench/peers.sh tunix                    # before it, to have Tunix among them

A random Llama of 135M parameters (SmolLM2's shape); temperature 1, nobody draws EOS, lengths are
given, so that every contestant makes the same number of tokens. Time includes reading the prompts
and, for us, preparing the weights. Contestants take turns, in changing order, in one run, medians
of 5 with their spread; ratios are to the fastest of the peers, or of all where there are none. All
are in one process but Tunix's sampler, which needs its own environment (peers/tunix_sampler.py).

The plain sampler, generate and Tunix decode requests in batches, each until its longest has ended;
the engine and continuous batching refill their slots. A group's prompt is read once by these two,
once a row by the others (generate repeats it before reading, Tunix has no way to say it).
"""

import argparse
from collections.abc import Callable
import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import peers
import turns

from opd_jax import host_memory, keys
from opd_jax.models import build, configs, hf_config
from opd_jax.rollouts import engine, sampler
from opd_jax.rollouts.slots import Settings

try:
  import torch
  import transformers
except ImportError:
  torch = None


class Load(NamedTuple):
  prompt: int          # tokens
  group: int           # responses a prompt
  batch: int           # rows at once
  limit: np.ndarray    # i32[R], tokens of each response


def loads(quick: bool) -> dict[str, Load]:
  """By name: `quick` divides lengths by 8 and requests by 16; mixed64 is a quarter of mixed."""
  less, fewer = (8, 16) if quick else (1, 1)
  draws = np.random.default_rng(0).lognormal(size=256 // fewer)
  mixed = np.clip(draws / draws.mean() * 96, 1, 512).round()
  even = lambda rows: np.full(rows, 64 // less)
  waves = Load(128 // less, 1, 32 // (4 if quick else 1), np.maximum(mixed // less, 1).astype(int))
  return {
      "even8": Load(128 // less, 1, 8, even(8)),
      "even32": Load(128 // less, 1, 32, even(32)),
      "mixed": waves,
      "mixed64": waves._replace(limit=waves.limit[:len(waves.limit) // 4]),
      "groups": Load(512 // less, 8, 32, even(32)),
  }


def model_config(quick: bool) -> configs.ModelConfig:
  return configs.NAMED["tiny_weak" if quick else "smollm2_135m"]


def requests(load: Load, vocab_size: int) -> np.ndarray:
  """Prompts i32[R, S] of random ids, rows of a group alike."""
  rows = len(load.limit) // load.group
  ids = np.random.default_rng(1).integers(3, vocab_size, (rows, load.prompt), np.int32)
  return np.repeat(ids, load.group, axis=0)


def our_engine(config, params, load: Load, dtype: str, kv_dtype: str = "") -> Callable[[], int]:
  prompt = requests(load, config.vocab_size)
  generate = engine.make(build.build(config, jnp.dtype(dtype)), Settings(
      int(load.limit.max()), (config.vocab_size,), 0, config.vocab_size, slots=load.batch,
      kv_dtype=kv_dtype))
  return lambda: int(generate(params, prompt, np.ones(prompt.shape, bool), keys.root(0),
                              load.limit).mask.sum())


def our_fixed(config, params, load: Load, dtype: str) -> Callable[[], int]:
  """The engine with as many slots at the end as at the beginning."""
  run = our_engine(config, params, load, dtype)

  def fixed():
    with mock.patch.object(engine, "FEWEST", load.batch):
      return run()
  return fixed


def our_plain(config, params, load: Load, dtype: str) -> Callable[[], int]:
  prompt, model = requests(load, config.vocab_size), build.build(config, jnp.dtype(dtype))

  @functools.partial(jax.jit, static_argnames="longest")
  def sample(params, prompt, longest):
    return sampler.sample(model, params, prompt, jnp.ones(prompt.shape, bool), keys.root(0),
                          max_response=longest, eos_ids=(config.vocab_size,), pad_id=0,
                          vocab_size=config.vocab_size)

  def run():
    for at in range(0, len(prompt), load.batch):
      part = slice(at, at + load.batch)
      jax.block_until_ready(sample(params, prompt[part], int(load.limit[part].max())))
    return int(load.limit.sum())
  return run


def torch_generate(config, params, load: Load, dtype: str) -> Callable[[], int]:
  del params  # random weights of the same shape
  raw = hf_config.to_hf(config, dtype)
  model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**raw), dtype=getattr(torch, dtype)).eval()
  prompt = requests(load, config.vocab_size)[::load.group].astype(np.int64)
  at_once = load.batch // load.group

  def run():
    for at in range(0, len(prompt), at_once):
      longest = int(load.limit[at * load.group:(at + at_once) * load.group].max())
      ids = torch.from_numpy(prompt[at:at + at_once])
      with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest,
                       min_new_tokens=longest, do_sample=True, top_k=0,
                       num_return_sequences=load.group, eos_token_id=None, pad_token_id=0)
    return int(load.limit.sum())
  return run


def torch_continuous(config, params, load: Load, dtype: str) -> Callable[[], int]:
  """transformers' continuous batching: each request with its own length, all in one queue."""
  del params
  raw = hf_config.to_hf(config, dtype)
  model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**raw), dtype=getattr(torch, dtype),
      attn_implementation="sdpa").eval()
  prompts = requests(load, config.vocab_size)[::load.group].tolist()
  settings = transformers.GenerationConfig(
      do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0, num_return_sequences=load.group,
      max_new_tokens=int(load.limit.max()))
  batching = transformers.ContinuousBatchingConfig(
      max_requests_per_batch=load.batch, max_batch_tokens=max(512, load.prompt),
      num_blocks=load.batch * (-(-(load.prompt + int(load.limit.max())) // 256) + 1))

  def run():
    made = 0
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching) as manager:
      for row, limit in zip(prompts, load.limit[::load.group]):  # one for a whole group
        manager.add_request(row, max_new_tokens=int(limit))
      for _ in load.limit:
        made += len(manager.get_result(timeout=600).generated_tokens)
    return made
  return run


def tunix_sampler(config, params, load: Load, dtype: str) -> Callable[[], int]:
  del params
  return peers.start("tunix", dict(
      model=hf_config.to_hf(config, dtype), dtype=dtype, batch=load.batch, seed=0,
      prompts=requests(load, config.vocab_size).tolist(), limits=load.limit.tolist()))


OURS = {"engine": our_engine, "engine, slots fixed": our_fixed,
        "engine, int8 cache": functools.partial(our_engine, kv_dtype="int8"),
        "plain sampler": our_plain}
PEERS = {"transformers generate": torch_generate,
         "transformers continuous batching": torch_continuous} if torch else {}
PEERS |= {"tunix sampler": tunix_sampler} if peers.is_there("tunix") else {}
CONTESTANTS = OURS | PEERS


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--loads", nargs="+", choices=loads(False), default=list(loads(False)))
  parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
  parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
  options = parser.parse_args()
  config = model_config(options.quick)
  params = build.init_params(config, keys.root(0))
  print(turns.versions("torch", "transformers"))
  print(turns.header("load"))
  for name in options.loads:
    load = loads(options.quick)[name]
    found = turns.rates({(who, dtype): CONTESTANTS[who](config, params, load, dtype)
                         for dtype in options.dtypes for who in options.contestants})
    print(turns.lines(name, found, set(PEERS)), flush=True)


if __name__ == "__main__":
  host_memory.ensure()
  main()
