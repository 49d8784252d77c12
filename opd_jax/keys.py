"""Randomness: (seed, stream, step) -> PRNG key. No other file calls `jax.random.key`.

Keys are derived, never carried, so that a resumed run draws what the unbroken run
would have drawn and checkpoints hold no keys.
"""

import jax

# The numbers are part of every run's identity: append, never renumber.
STREAMS = {"init": 0, "rollout": 1, "eval": 2, "context": 3, "source": 4}


def root(seed: int) -> jax.Array:
  """The one key from which a run derives all others."""
  return jax.random.key(seed)


def at(key: jax.Array, stream: str, step: int | jax.Array = 0) -> jax.Array:
  """Key of one stream at one step.

  Args:
    key: scalar PRNG key, from `root`.
    stream: a name in `STREAMS`.
    step: training step, i32 scalar.
  Returns: scalar PRNG key.
  """
  return jax.random.fold_in(jax.random.fold_in(key, STREAMS[stream]), step)
