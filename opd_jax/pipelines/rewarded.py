"""On-policy learning from a reward model, whose rewards take the place of a verifier's.

    the student's responses -> their texts -> rewards -> any loss that learns from rewards

The loop and the losses are those of the OPD family (GRPO, DPO, SimPO, SFT on successes); a reward
model may have a tokenizer of its own. The verifier of the config says what responses are truly
worth: it is evaluated and logged (`rollout/reward`, beside `reward/mean`), and teaches nothing.
EVE's baseline "RL on the weak reward" (appendix 9.4) is GRPO with it, see configs/claims/eve.py.
"""

import json

import jax
from jax import Array
import ml_collections
import numpy as np

from opd_jax import sharding
from opd_jax.pipelines import objective, on_policy, opd, reward_model
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts.batch import Batch
from opd_jax.train_state import TrainState


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains `config.student` on its own samples towards the rewards of `config.reward`."""
  on_policy.run(config, workdir, build)


def build(config: ml_collections.ConfigDict, student: policies.Policy,
          mesh: jax.sharding.Mesh) -> on_policy.Method:
  """The method of `opd`, graded by the reward model.

  Raises: ValueError for a loss that does not learn from rewards, without a reward model, and for
    one that is not accurate enough.
  """
  section = config.reward
  if config.loss.signal not in objective.REWARDED:
    raise ValueError(f"loss.signal is {config.loss.signal!r}, which learns from no reward; set it "
                     f"to one of {', '.join(objective.REWARDED)}, or pipeline='opd'")
  if not section.source:
    raise ValueError("reward.source is ''; name the workdir of a reward model "
                     "(configs/reward_model.py), or learn from the verifier: pipeline='opd'")
  # First: a reward model that says nothing is refused before anything large is loaded.
  judge = reward_model.load(section.source, config, mesh, section.min_accuracy)
  method = opd.build(config, student, mesh)

  def grade(state: TrainState, batch: Batch, verified: on_policy.Verified,
            key: Array) -> tuple[Batch, dict[str, float]]:
    conversations = [json.loads(row["messages"]) for row in verified.rows
                     for _ in range(config.rollout.group_size)]
    rewards, metrics = settle(judge(conversations, verified.texts),
                              ended(batch, method.student.tokenizer.eos_ids))
    batch, more = method.grade(
        state, batch.replace(reward=sharding.put(rewards, sharding.of_batch(mesh))), verified, key)
    return batch, metrics | more

  return method._replace(formula=f"{method.formula};  R: {section.source}", grade=grade)


def ended(batch: Batch, eos_ids: tuple[int, ...]) -> np.ndarray:
  """Which responses of a rollout have come to their end, bool[B]."""
  response, mask = sharding.fetch(batch.response), sharding.fetch(batch.mask)
  return np.any(mask & np.isin(response, eos_ids), axis=1)


def settle(rewards: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
  """The rewards that are learned from, and metrics of them.

  A reward model knows nothing of responses that have no end, or that it could not be asked about:
  they have the least reward of the others in the batch, so that not to end is never worthwhile.

  Args:
    rewards: f32[B], as the model says; NaN where it was not asked.
    ended: bool[B], which responses have come to their end.
  Returns: f32[B], all finite; "reward/mean" and "reward/std" of those that are known, and the
    share "reward/known" of these.
  """
  known = ended & np.isfinite(rewards)
  if not known.any():  # all alike: nothing is learned
    return np.zeros_like(rewards), {"reward/known": 0.0}
  found = rewards[known]
  return np.where(known, rewards, found.min()), {
      "reward/mean": float(found.mean()), "reward/std": float(found.std()),
      "reward/known": float(known.mean())}
