"""Responses of the teachers to the prompts of a data set, sampled once and kept in the workdir."""

from collections.abc import Iterator, Sequence
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import distributed, keys, progress, sharding
from opd_jax.data import builders, loader
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import teachers
from opd_jax.rollouts import batch as batches
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
  if builders.is_guarded(config.data.builder, config.data.builder_kw):
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
  rollout, tokenizer = config.rollout, policy.tokenizer
  encode = loader.encode(tokenizer, tuple(teachers.sections(config)))
  rows = [row for row in (encode(source[i]) for i in range(len(source)))
          if row["teacher_id"] == who and len(row["prompt_ids"]) <= rollout.max_prompt]
  sample = policies.make_sampler(policy.model, tokenizer, rollout, Sampling(
      rollout.temperature, rollout.top_k, rollout.top_p))
  key, out, tried = keys.at(keys.root(config.seed), "rollout", who), [], 0
  for start in range(0, len(rows), rollout.prompts):
    part = rows[start:start + rollout.prompts]
    filler = [part[-1]] * (rollout.prompts - len(part))  # one shape for all
    batch = sample(policy.params, jax.device_put(batches.prompts(
        [row["prompt_ids"] for row in part + filler], rollout.group_size,
        policies.buckets(rollout), tokenizer.pad_id), sharding.of_batch(mesh)),
                   jax.random.fold_in(key, start))
    response, mask = np.asarray(batch.response), np.asarray(batch.mask)
    ended = np.any(mask & np.isin(response, tokenizer.eos_ids), axis=1)
    texts = policies.texts(tokenizer, batch)
    for i, row in enumerate(part):
      kept = {name: row[name] for name in row if name not in ("prompt_ids", "teacher_id")}
      group = range(i * rollout.group_size, (i + 1) * rollout.group_size)
      out += [{**kept, "id": f"{row['id']}/{j - group.start}", "response": texts[j]}
              for j in group if ended[j] and texts[j]]
      tried += len(group)
  progress.note(f"a teacher answered {len(rows)} of {len(source)} prompts {rollout.group_size}x: "
                f"{len(out)} of {tried} responses ended and are learned")
  return out
