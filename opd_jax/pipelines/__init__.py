"""What a run can be: the pipelines by name, each a module with run(config, workdir)."""

import importlib
from typing import Any

from opd_jax import config as configs

PIPELINES = {
    "opd": "opd_jax.pipelines.opd",
    "peers": "opd_jax.pipelines.peers",
    "opcd": "opd_jax.pipelines.opcd",
    "sft": "opd_jax.pipelines.offline",
    "reward_model": "opd_jax.pipelines.reward_model",
    "responses": "opd_jax.pipelines.responses",
    "evaluate": "opd_jax.pipelines.evaluate",
    "context_use": "opd_jax.pipelines.context_use",
    "critique_refine": "opd_jax.pipelines.critique_refine",
    "position_bias": "opd_jax.pipelines.position_bias",
    "teacher_signal": "opd_jax.pipelines.teacher_signal",
    "claims": "opd_jax.pipelines.claims",
}


def pick(name: str) -> Any:
  """The pipeline's module. Raises: ValueError for an unknown name."""
  if name not in PIPELINES:
    raise ValueError(f"pipeline is {name!r}; it must be one of {', '.join(PIPELINES)}."
                     + configs.nearest(name, PIPELINES))
  return importlib.import_module(PIPELINES[name])
