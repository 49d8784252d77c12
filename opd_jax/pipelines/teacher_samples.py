"""Responses of the teachers to the prompts of a data set, sampled once and kept in the workdir."""

from collections.abc import Iterator, Sequence
import json
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections

from opd_jax import distributed, keys, progress
from opd_jax.data import builders, loader
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder, teachers
from opd_jax.rollouts.sampler import Sampling

FILE = "teacher_samples.jsonl"

Row = dict[str, Any]


def of(config: ml_collections.ConfigDict, source: Any, mesh: Mesh, workdir: str) -> list[Row]:
  """The rows of `source` with responses that their teachers gave, as text.

  Sampled as `rollout` says, rollout.group_size responses a prompt, by one teacher after another:
  one is in memory at a time, and its tokenizer may be its own. Prompts longer than
  rollout.max_prompt, and responses that are empty or did not end, are left out and counted. A
  run that is resumed reads what it sampled; of guarded data nothing is kept, and it samples anew.

  Raises: ValueError if there is nothing to learn from, if a row names a teacher there is not, and
    in several processes.
  """
  path = pathlib.Path(workdir, FILE)
  if distributed.count() > 1:
    raise ValueError(f"teachers answer a data set in one process, and here are "
                     f"{distributed.count()}; give the answers as data (data.builder='jsonl'), or "
                     f"start on one host without {distributed.VARIABLE}")
  if builders.is_guarded(config.data):
    rows = list(by_all(config, source, mesh))
  else:
    if not path.is_file():
      aside = path.with_suffix(".tmp")
      with aside.open("w") as file:
        for row in by_all(config, source, mesh):
          file.write(json.dumps(row) + "\n")
      aside.rename(path)
    with path.open() as file:
      rows = [json.loads(line) for line in file]
  if not rows:
    raise ValueError(f"no response of a teacher ended within rollout.max_response="
                     f"{config.rollout.max_response} tokens; raise it")
  return rows


def by_all(config: ml_collections.ConfigDict, source: Any, mesh: Mesh) -> Iterator[Row]:
  """The responses of one teacher after another."""
  for i, (name, section) in enumerate(teachers.sections(config).items()):
    key = keys.at(keys.root(config.seed), "init", 1 + i)
    policy = policies.load(section, config.model, key, mesh)
    policies.check_lengths(policy, teachers.label(name), config.rollout)
    yield from sampled(config, i, policy, source, mesh)


def sampled(config: ml_collections.ConfigDict, who: int, policy: policies.Policy, source: Any,
            mesh: Mesh) -> Sequence[Row]:
  """The responses of one teacher, number `who`, to the rows that name it."""
  rollout, names = config.rollout, tuple(teachers.sections(config))
  rows = [row for row in (source[i] for i in range(len(source)))
          if loader.teacher_id(row, names) == who]
  respond = responder.make(
      policy, rollout, Sampling(rollout.temperature, rollout.top_k, rollout.top_p),
      rollout.prompts, mesh, rollout.group_size)
  said = respond(policy.params, [json.loads(row["messages"]) for row in rows],
                 keys.at(keys.root(config.seed), "rollout", who))
  out = [{**rows[place // rollout.group_size],
          "id": f"{rows[place // rollout.group_size]['id']}/{place % rollout.group_size}",
          "response": response.text}
         for place, response in enumerate(said) if response and response.ended and response.text]
  asked = len([response for response in said if response])
  progress.note(f"a teacher answered {asked // rollout.group_size} of {len(source)} prompts "
                f"{rollout.group_size}x: {len(out)} of {asked} responses ended and are learned")
  return out
