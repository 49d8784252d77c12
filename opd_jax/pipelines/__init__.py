"""What a run can be: the pipelines by name, each a module with run(config, workdir)."""

import importlib
from typing import Any

from opd_jax import config as configs
from opd_jax import distributed

PIPELINES = {
    "opd": "opd_jax.pipelines.opd",
    "peers": "opd_jax.pipelines.peers",
    "rewarded": "opd_jax.pipelines.rewarded",
    "opcd": "opd_jax.pipelines.opcd",
    "sft": "opd_jax.pipelines.offline",
    "reward_model": "opd_jax.pipelines.reward_model",
    "responses": "opd_jax.pipelines.responses",
    "evaluate": "opd_jax.pipelines.evaluate",
    "context_use": "opd_jax.pipelines.context_use",
    "critique_refine": "opd_jax.pipelines.critique_refine",
    "position_bias": "opd_jax.pipelines.position_bias",
    "teacher_signal": "opd_jax.pipelines.teacher_signal",
    "diversity": "opd_jax.pipelines.diversity",
    "judged": "opd_jax.pipelines.judged",
    "claims": "opd_jax.pipelines.claims",
}

# Those that several processes can run together.
SEVERAL = ("opd", "peers", "opcd", "sft", "responses", "evaluate")


def pick(name: str) -> Any:
  """The pipeline's module.

  Raises: ValueError for an unknown name, or one that these processes cannot run together.
  """
  if name not in PIPELINES:
    raise ValueError(f"pipeline is {name!r}; it must be one of {', '.join(PIPELINES)}."
                     + configs.nearest(name, PIPELINES))
  if distributed.count() > 1 and name not in SEVERAL:
    raise ValueError(f"pipeline {name!r} runs in one process, and here are {distributed.count()}; "
                     f"start it on one host without {distributed.VARIABLE}. Several can run "
                     f"{', '.join(SEVERAL)}")
  return importlib.import_module(PIPELINES[name])
