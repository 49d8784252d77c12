"""How long XLA compiles what a run needs, for 4 and for 48 layers.

    python tests/bench/compiling.py            # a few minutes
    python tests/bench/compiling.py --quick    # 2 and 4 layers, to try the script

Widths are small: they change what compiled code does, hardly how long compiling takes. The disk
cache is off. Medians of 3; exits with 1 if 48 layers take more than 1.5 times as long as 4.
"""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, sharding, train_state
from opd_jax.losses import masked
from opd_jax.models import build, decoding
from opd_jax.models import configs as models
from opd_jax.pipelines import offline
from opd_jax.rollouts import scorer, slots
from opd_jax.rollouts.batch import Batch

GOAL, REPEATS, ROWS, PROMPT, RESPONSE = 1.5, 3, 8, 32, 32


def programs(layers: int):
  """What is compiled, by name: functions that lower it anew."""
  shape = dataclasses.replace(models.NAMED["tiny_weak"], num_layers=layers)
  model, params = build.build(shape, jnp.bfloat16), build.init_params(shape, keys.root(0))
  ids = lambda n: np.zeros((ROWS, n), np.int32)
  real = lambda n: np.ones((ROWS, n), bool)
  batch = Batch(ids(PROMPT), real(PROMPT), ids(RESPONSE), real(RESPONSE), real(RESPONSE))
  config = configs.offline()
  optimizer = train_state.make_optimizer(config.optimizer, 1000)
  state = train_state.create(params, optimizer, False, sharding.make_mesh())
  step = train_state.jit_train_step(train_state.make_train_step(
      functools.partial(offline.loss, model, config.loss), offline.describe, optimizer,
      masked.COUNTS[config.loss.aggregate], 1, 0.0), state)
  steps = slots.compiled(model, slots.Settings(RESPONSE, (2,), 0, shape.vocab_size))
  weights = decoding.preparation(model)(params)
  cache = steps.empty(rows=ROWS, width=PROMPT + RESPONSE)
  rows = slots.Rows(*(np.zeros(ROWS, np.int32) for _ in range(4)), np.ones(ROWS, bool))
  whole = PROMPT + RESPONSE - 1
  return {
      "train step": lambda: step.lower(state, batch, None),
      "scoring": lambda: jax.jit(functools.partial(scorer.logprobs, model)).lower(params, batch),
      "reading prompts": lambda: steps.prefill.lower(params, batch.prompt, batch.prompt_mask,
                                                     length=whole),
      "decoding": lambda: steps.decode.lower(weights, cache, jnp.zeros((ROWS,), jnp.int32), rows,
                                             PROMPT, 16, keys.root(0), length=whole),
  }


def seconds(lower) -> float:
  """Tracing, lowering and compiling; jax's own caches are emptied before."""
  found = []
  for _ in range(REPEATS):
    jax.clear_caches()
    start = time.perf_counter()
    lower().compile()
    found.append(time.perf_counter() - start)
  return float(np.median(found))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true")
  few, many = (2, 4) if (quick := parser.parse_args().quick) else (4, 48)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
  print(f"| what | {few} layers, s | {many} layers, s | ratio |\n|---|---|---|---|")
  of_few, of_many, missed = programs(few), programs(many), False
  for name in of_few:
    a, b = seconds(of_few[name]), seconds(of_many[name])
    print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)
    missed |= b / a > GOAL
  return int(missed and not quick)


if __name__ == "__main__":
  sys.exit(main())
