"""Responses of the teachers to the prompts of a data set, sampled once and kept in the workdir."""

from collections.abc import Callable, Sequence
import itertools
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from opd_jax import keys, progress
from opd_jax.data import builders, loader
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder, stages, teachers
from opd_jax.rollouts.sampler import Sampling

FILE = "teacher_answers.jsonl"

Row = stages.Row


def of(config: ml_collections.ConfigDict, source: Any, mesh: Mesh, workdir: str) -> list[Row]:
  """The rows of `source` with responses that their teachers gave, as text.

  Sampled as `rollout` says, rollout.group_size responses a prompt, by one teacher after another:
  one is in memory at a time, and its tokenizer may be its own. Prompts longer than
  rollout.max_prompt, and responses that are empty or did not end, are left out and counted. A run
  that is resumed goes on behind the last rollout.prompts that were answered, with teachers of the
  same weights; of guarded data nothing is kept, and it samples anew.

  Raises: ValueError if there is nothing to learn from, if a row names a teacher there is not, and
    if the workdir has answers of other weights or to other rows.
  """
  root, sections, folder = keys.root(config.seed), teachers.sections(config), pathlib.Path(workdir)
  rows = [source[i] for i in range(len(source))]
  owners = [loader.teacher_id(row, tuple(sections)) for row in rows]
  order = sorted(range(len(rows)), key=lambda i: owners[i])  # of each teacher in a row
  path = None if builders.is_guarded(config.data) else folder / FILE
  if path:
    for i, (name, section) in enumerate(sections.items()):
      stages.begin_with(folder, f"{teachers.label(name)}'s weights",
                        lambda: policies.fingerprint(section, keys.at(root, "init", 1 + i)))
    stages.begin_with(folder, "rows asked", lambda: stages.contents(
        (rows[i]["id"], rows[i]["messages"], owners[i]) for i in order))

  here: dict[int, Callable[..., list[Row]]] = {}  # the teacher in memory

  def make(start: int, stop: int) -> list[Row]:
    made = []
    for who, part in itertools.groupby(order[start:stop], key=lambda i: owners[i]):
      if who not in here:
        here.clear()
        here[who] = load(config, who, mesh)
      made += here[who]([rows[i] for i in part],
                        jax.random.fold_in(keys.at(root, "rollout", who), start))
    return made

  said = stages.rows(path, len(rows), config.rollout.prompts, make)
  out = [{**rows[i], "id": f"{rows[i]['id']}/{j}", "response": text}
         for i, answers in zip(order, said) for j, text in enumerate(answers["responses"]) if text]
  heard = [answers["responses"] for answers in said if answers["responses"]]
  progress.note(f"teachers answered {len(heard)} of {len(rows)} prompts "
                f"{config.rollout.group_size}x: {len(out)} of {sum(map(len, heard))} responses "
                "ended and are learned")
  if not out:
    raise ValueError(f"no response of a teacher ended within rollout.max_response="
                     f"{config.rollout.max_response} tokens; raise it")
  return out


def load(config: ml_collections.ConfigDict, who: int,
         mesh: Mesh) -> Callable[[Sequence[Row], jax.Array], list[Row]]:
  """Teacher number `who`, as a function from rows and a key to what it says.

  Which is a row each, its id and the texts of the responses: none if its prompt is too long, "" in
  the place of one that did not end.
  """
  rollout, group = config.rollout, config.rollout.group_size
  name, section = list(teachers.sections(config).items())[who]
  policy = policies.load(section, config.model, keys.at(keys.root(config.seed), "init", 1 + who),
                         mesh)
  policies.check_lengths(policy, teachers.label(name), rollout)
  respond = responder.make(
      policy, rollout, Sampling(rollout.temperature, rollout.top_k, rollout.top_p),
      rollout.prompts, mesh, group)

  def answer(rows: Sequence[Row], key: jax.Array) -> list[Row]:
    said = respond(policy.params, [json.loads(row["messages"]) for row in rows], key)
    return [dict(id=row["id"], responses=[x.text if x.ended else "" for x in
                                          said[i * group:(i + 1) * group] if x])
            for i, row in enumerate(rows)]

  return answer
