"""Tokens a second of training: our steps against the same steps in torch, and TRL's.

    python tests/bench/train.py            # 135M parameters, 8 x 128 tokens; minutes on 2 cores
    python tests/bench/train.py --quick    # a small model, to try the script
    bash tests/bench/peers.sh trl          # before it, to have TRL's DistillationTrainer too

Two steps: supervised ("sft": forward, backward, AdamW), and distillation over the whole vocabulary
("distill": teacher's forward pass, student's forward and backward, reverse KL, AdamW). Ours are the
functions that the pipelines run, metrics included, with float32 master parameters and the compute
dtype named; torch's are transformers' model, its parameters in the dtype named, torch.optim.AdamW,
the textbook loss in float32. TRL's trainer distils only; it runs in a process and an environment of
its own (peers/trl_distill.py). All models have random weights of SmolLM2-135M's shape. Contestants
take turns in one run: medians of 5 with their spread; ratios are to the fastest of torch and TRL.
Tokens are those of the batch, prompt and response together.
"""

import argparse
from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

import peers
import turns

from opd_jax import config as configs
from opd_jax import host_memory, keys, sharding, train_state
from opd_jax.losses import masked
from opd_jax.models import build, hf_config
from opd_jax.models import configs as models
from opd_jax.pipelines import offline, opd
from opd_jax.rollouts.batch import Batch

try:
  import torch
  import transformers
except ImportError:
  torch = None

ROWS, LENGTH = 8, 128


def tokens(vocabulary: int) -> np.ndarray:
  return np.random.default_rng(0).integers(3, vocabulary, (ROWS, LENGTH)).astype(np.int32)


def batch_of(ids: np.ndarray) -> Batch:
  """Every token but the first is a response to it."""
  real = np.ones(ids.shape, bool)
  return Batch(prompt=ids[:, :1], prompt_mask=real[:, :1], response=ids[:, 1:], mask=real[:, 1:],
               learn=real[:, 1:], sampler_logprobs=np.full((ROWS, LENGTH - 1), -10.0, np.float32))


def ours(shape: models.ModelConfig, dtype: str, distill: bool) -> Callable[[], int]:
  model, batch = build.build(shape, jnp.dtype(dtype)), jax.device_put(batch_of(
      tokens(shape.vocab_size)))
  config = (configs.on_policy(loss=dict(surrogate="reverse_kl")) if distill
            else configs.offline())
  optimizer = train_state.make_optimizer(config.optimizer, 1000)
  state = train_state.create(build.init_params(shape, keys.root(0)), optimizer, False,
                             sharding.make_mesh())
  room = opd if distill else offline
  step = train_state.jit_train_step(train_state.make_train_step(
      functools.partial(room.loss, model, config.loss), room.describe, optimizer,
      masked.COUNTS[config.loss.aggregate], 1, 0.0), state)
  teacher, score, head = None, None, None
  if distill:
    teacher = build.init_params(shape, keys.root(1))
    score = jax.jit(functools.partial(opd.score, model, (model,), None, config.loss))
    head = (opd.scorer.head(model, teacher).astype(model.dtype),)

  def run():
    nonlocal state
    state, metrics = step(state, score(state.params, (teacher,), None, batch) if distill else batch, head)
    jax.block_until_ready(metrics)
    return ROWS * LENGTH
  return run


def torchs(shape: models.ModelConfig, dtype: str, distill: bool) -> Callable[[], int]:
  raw = transformers.AutoConfig.for_model(**hf_config.to_hf(shape, dtype))
  make = lambda: transformers.AutoModelForCausalLM.from_config(raw, dtype=getattr(torch, dtype))
  student, teacher = make().train(), make().eval() if distill else None
  optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
  ids = torch.from_numpy(tokens(shape.vocab_size).astype(np.int64))
  scores = lambda model: model(ids).logits[:, :-1].float().log_softmax(-1)

  def run():
    p = scores(student)
    if distill:
      with torch.no_grad():
        q = scores(teacher)
      loss = (p.exp() * (p - q)).sum(-1).mean()
    else:
      loss = -p.gather(-1, ids[:, 1:, None]).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ROWS * LENGTH
  return run


def trls(shape: models.ModelConfig, dtype: str, distill: bool) -> Callable[[], int]:
  del distill  # it has no other step, and is left out where that is asked for
  return peers.start("trl", dict(model=hf_config.to_hf(shape, dtype), dtype=dtype, prompt=1, seed=0,
                                 tokens=tokens(shape.vocab_size).tolist()))


CONTESTANTS = ({"ours": ours} | ({"torch": torchs} if torch else {})
               | ({"trl": trls} if peers.is_there("trl") else {}))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
  parser.add_argument("--steps", nargs="+", choices=("sft", "distill"), default=["sft", "distill"])
  parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
  options = parser.parse_args()
  shape = models.NAMED["tiny_weak" if options.quick else "smollm2_135m"]
  print(turns.versions("torch", "transformers"))
  print(turns.header("step"))
  for name in options.steps:
    distill = name == "distill"
    found = turns.rates({(who, dtype): CONTESTANTS[who](shape, dtype, distill)
                         for who in options.contestants if distill or who != "trl"
                         for dtype in options.dtypes})
    print(turns.lines(name, found, {"torch", "trl"}), flush=True)


if __name__ == "__main__":
  host_memory.ensure()
  main()
