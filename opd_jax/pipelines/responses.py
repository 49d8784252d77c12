"""Rows made of rows: what a model answers, and what others think of its answers.

    prompts -> K responses each: plain, behind demonstrations, or shown another's response
            -> log-probabilities under any models -> rewards -> all, the best, or a pair of them

Leaves WORKDIR/rows.jsonl, data for any other run (data.builder="rows"). EVE's preferences,
demonstrations, strong samples and weak scores are made by it: the stages of configs/claims/eve.py.
"""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import json
import math
import pathlib
import random
import re
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import distributed, keys, progress, sharding, verifiers
from opd_jax.data import builders, chat
from opd_jax.data.builders import rows as made
from opd_jax.evals import run as evals
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder, reward_model, scoring, stages
from opd_jax.rollouts.sampler import Sampling
from opd_jax.writer import Writer

KEEP = ("all", "best", "ranked_pair", "drawn_pair")

Row = dict[str, Any]
Member = dict[str, Any]  # one response of a row's group: `response`, and what is known of it


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes the rows; a run that was killed goes on in the middle of any stage.

  Raises: ValueError for guarded data, for choices that do not go together, and if no row is left.
  """
  check(config)
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("rollout.prompts x rollout.group_size",
                      config.rollout.prompts * config.rollout.group_size, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    source, found = read(config), {}
    if config.student.source:
      source, found = answer(config, source, mesh, workdir)
    for field, section in config.scores.items():
      source = scoring.of(config, section, field, source, mesh, workdir)
    rows = [(row, json.loads(row["group"])) for row in map(source.__getitem__, range(len(source)))]
    if config.reward.source:
      rows = reward(config, rows, mesh, workdir, stack)
    kept = [one for row, members in rows if (one := keep(config, row, members))]
    if not kept:
      raise ValueError(f"of {len(rows)} rows none has responses to keep as keep={config.keep!r} "
                       f"asks for ({found}); look at them in {workdir}")
    metrics = {f"rows/{name}": value for name, value in (
        found | dict(asked=len(rows), kept=len(kept)) | describe(kept)).items()}
    if distributed.is_first():
      write(pathlib.Path(workdir, made.FILE), kept)
    stack.enter_context(Writer(workdir, config, 0)).write(0, metrics)
  progress.note(f"the rows are in {workdir}/{made.FILE}")
  progress.table("rows", [name.removeprefix("rows/") for name in metrics],
                 [[f"{value:.4g}" for value in metrics.values()]])


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what cannot work before anything is loaded.

  Raises: ValueError naming the key.
  """
  if builders.is_guarded(config.data):
    raise ValueError(f"data.builder={config.data.builder!r} is guarded: its texts, and those of "
                     "models about it, must not reach the disk, and this pipeline writes rows of "
                     "text; choose other data")
  if config.keep not in KEEP:
    raise ValueError(f"keep is {config.keep!r}; it must be one of {', '.join(KEEP)}")
  if config.keep != "all" and not config.reward.source:
    raise ValueError(f"keep={config.keep!r} chooses by rewards, and reward.source is ''; name a "
                     "reward model's workdir there, 'verifier' or 'implicit'")
  fields = config.reward.fields
  if config.reward.source == "implicit" and (
      len(fields) != 2 or not fields[0] or fields[0] == fields[1]):
    raise ValueError(f"reward.fields is {fields}; it must name two different fields of a response: "
                     "the log-probability wanted and the one it is compared with ('': none)")
  if not config.student.source:
    for name in ("shots", "refine"):
      if config[name].rows:
        raise ValueError(f"{name}.rows is {config[name].rows!r}, which has no effect without a "
                         "student.source that is shown them; name one, or empty it")
  for name in ("shots", "refine"):
    template = config[name].template
    if missing := [place for place in ("{question}", "{response}") if place not in template]:
      raise ValueError(f"{name}.template is {template!r}; it must hold {' and '.join(missing)}")


def read(config: ml_collections.ConfigDict) -> list[Row]:
  """The rows of data.train_split from number `skip` on, `prompts` of them or all.

  Raises: ValueError if there are fewer.
  """
  source = builders.open_source(config.data.builder, config.data.builder_kw,
                                config.data.train_split, config.data.cache)
  stop = config.skip + config.prompts if config.prompts else len(source)
  if not config.skip < stop <= len(source):
    raise ValueError(f"skip={config.skip} and prompts={config.prompts} ask for more rows than "
                     f"the {len(source)} of the split {config.data.train_split!r}")
  rows = [source[i] for i in range(config.skip, stop)]
  if not config.student.source and (bare := [row["id"] for row in rows if not row["group"]]):
    raise ValueError(f"row {bare[0]!r} brings no `group` of responses, and student.source is '': "
                     "name a model that answers, or choose data that has groups")
  return rows


def answer(config: ml_collections.ConfigDict, rows: Sequence[Row], mesh: Mesh,
           workdir: str) -> tuple[list[Row], dict[str, int]]:
  """The rows with rollout.group_size responses of the student each in their `group`.

  Responses that are empty or did not end are left out of it, and of prompts longer than
  rollout.max_prompt there are none.

  Returns: the rows, and how many responses were "cut_off" and "empty", prompts "too_long".
  """
  rollout, group, root = config.rollout, config.rollout.group_size, keys.root(config.seed)
  stages.begin_with(pathlib.Path(workdir), "student's weights", lambda: policies.fingerprint(
      config.student, keys.at(root, "init")))
  asked = requests(config, rows)
  stages.begin_with(pathlib.Path(workdir), "questions", lambda: stages.contents(asked))
  loaded: list[Callable[..., Any]] = []

  def make(start: int, stop: int) -> list[Row]:
    if not loaded:  # a run that only goes on with later stages needs no model here
      policy = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
      policies.check_lengths(policy, "student", rollout)
      respond = responder.make(policy, rollout, Sampling(
          rollout.temperature, rollout.top_k, rollout.top_p), rollout.prompts, mesh, group)
      loaded.append(lambda *arguments: respond(policy.params, *arguments))
    said = loaded[0](asked[start:stop], keys.at(root, "rollout", start))
    return [dict(id=rows[start + i]["id"], responses=[
        x and dict(response=x.text, ended=x.ended) for x in said[i * group:(i + 1) * group]])
            for i in range(stop - start)]

  found = stages.rows(pathlib.Path(workdir, "responses.jsonl"), len(rows), rollout.prompts, make)
  given = [x for row in found for x in row["responses"] if x]
  usable = lambda x: x and x["ended"] and x["response"]
  counted = dict(too_long=sum(None in row["responses"] for row in found),
                 cut_off=sum(not x["ended"] for x in given),
                 empty=sum(x["ended"] and not x["response"] for x in given))
  groups = [[dict(response=x["response"]) for x in row["responses"] if usable(x)] for row in found]
  return [{**row, "group": json.dumps(members)} for row, members in zip(rows, groups)], counted


def requests(config: ml_collections.ConfigDict, rows: Sequence[Row]) -> list[chat.Messages]:
  """What the student is asked: each row's question, behind demonstrations if `shots` names some.

  The demonstrations of a row are drawn for it from those of shots.rows that are of another
  question. With refine.rows, which has a response for every row by its id, the question
  is put as refine.template says.

  Raises: ValueError if refine.rows lacks a row, or shots.rows has too few.
  Source: EVE, section 5 and appendix 9.6.
  """
  shown = [(question(row), row["response"]) for row in (
      made.read(config.shots.rows) if config.shots.rows else ())]
  others = {row["id"]: row["response"] for row in (
      made.read(config.refine.rows) if config.refine.rows else ())}
  if others and (missing := [row["id"] for row in rows if row["id"] not in others]):
    raise ValueError(f"refine.rows={config.refine.rows!r} has no response for {len(missing)} rows "
                     f"({missing[0]!r} is the first); it must be made of the same prompts")
  if config.shots.rows and len({text for text, _ in shown}) <= config.shots.number:
    raise ValueError(f"shots.rows={config.shots.rows!r} has {len(shown)} rows, too few to draw "
                     f"shots.number={config.shots.number} of other questions from for each prompt")

  def one(row: Row) -> chat.Messages:
    *before, last = json.loads(row["messages"])
    text = last["content"]
    request = fill(config.refine.template, text, others[row["id"]]) if others else text
    if shown:
      drawn = random.Random(f"{config.seed}/shots/{row['id']}").sample(
          [x for x in shown if x[0] != text], config.shots.number)
      request = "".join(fill(config.shots.template, *x) for x in drawn) + request
    return [*before, {**last, "content": request}]

  return [one(row) for row in rows]


def fill(template: str, question: str, response: str) -> str:
  """A template with both texts in their places; a placeholder in one of them is text."""
  both = dict(question=question, response=response)
  return re.sub(r"\{(question|response)\}", lambda match: both[match[1]], template)


def question(row: Row) -> str:
  """The last turn of a row's conversation."""
  return json.loads(row["messages"])[-1]["content"]


def reward(config: ml_collections.ConfigDict, rows: Sequence[tuple[Row, list[Member]]],
           mesh: Mesh, workdir: str,
           stack: contextlib.ExitStack) -> list[tuple[Row, list[Member]]]:
  """The rows, each of whose responses brings a `reward`, beta times what config.reward.source says.

  A reward model or a verifier is asked once, and its rewards are kept in WORKDIR/rewards.jsonl.
  "implicit" is the log pi - log pi_ref of the two `fields`; NaN where one of them is.
  """
  section = config.reward
  if section.source == "implicit":
    wanted, anchor = section.fields
    for row, members in rows:
      for name in filter(None, section.fields):
        if any(name not in x for x in members):
          raise ValueError(f"row {row['id']!r} has a response without {name!r}, which "
                           "reward.source='implicit' compares; add it to `scores`")
    return [(row, [{**x, "reward": section.beta * (x[wanted] - (x[anchor] if anchor else 0.0))}
                   for x in members]) for row, members in rows]
  if section.source == "verifier":
    verify = evals.shared(stack.enter_context(verifiers.make(**config.verifier)))
    judge = lambda part: [x.reward for x in verify(
        [x["response"] for _, members in part for x in members],
        [row["answer"] for row, members in part for _ in members])]
  else:
    stages.begin_with(pathlib.Path(workdir), "reward model", lambda: hashlib.sha256(
        reward_model.last_evaluation(section.source).read_bytes()).hexdigest())
    rewards = reward_model.load(section.source, config, mesh, section.min_accuracy)
    judge = lambda part: rewards(
        [json.loads(row["messages"]) for row, members in part for _ in members],
        [x["response"] for _, members in part for x in members])

  stages.begin_with(pathlib.Path(workdir), "rows to be rewarded", lambda: stages.contents(
      (row["id"], row["answer"], [x["response"] for x in members]) for row, members in rows))

  def make(start: int, stop: int) -> list[Row]:
    found = iter(judge(rows[start:stop]))
    return [dict(id=row["id"], rewards=[float(next(found)) for _ in members])
            for row, members in rows[start:stop]]

  found = stages.rows(pathlib.Path(workdir, "rewards.jsonl"), len(rows), config.batch.chunk, make)
  return [(row, [{**x, "reward": section.beta * value}
                 for x, value in zip(members, one["rewards"], strict=True)])
          for (row, members), one in zip(rows, found, strict=True)]


def keep(config: ml_collections.ConfigDict, row: Row, members: Sequence[Member]) -> Row | None:
  """The row with the responses that config.keep chooses, the first of them as its `response`.

  all          each, as it was given
  best         the one of the greatest reward, the first of equals
  ranked_pair  of the first and the last that differ, first the one of the greater reward
  drawn_pair   these two, in an order drawn with P(y1 > y2) = sigmoid(r1 - r2)

  A response whose reward is not finite is none. Returns: None if nothing is left to choose.
  """
  if config.keep != "all":
    members = [x for x in members if math.isfinite(x["reward"])]
  if not members:
    return None
  if config.keep == "best":
    members = [max(members, key=lambda x: x["reward"])]
  elif config.keep.endswith("_pair"):
    first = members[0]
    second = next((x for x in reversed(members) if x["response"] != first["response"]), None)
    if second is None:
      return None
    gap = first["reward"] - second["reward"]
    draw = random.Random(f"{config.seed}/preference/{row['id']}").random()
    # Of equal rewards, and of rewards that differ without end, both forms hold.
    leads = gap >= 0.0 if config.keep == "ranked_pair" else draw < 0.5 * (1 + math.tanh(gap / 2))
    members = [first, second] if leads else [second, first]
  return {**row, "response": members[0]["response"], "group": json.dumps(members)}


def describe(rows: Sequence[Row]) -> dict[str, float]:
  """What was kept: responses a row; mean reward of the first, and of all, if they have some."""
  groups = [json.loads(row["group"]) for row in rows]
  found = {"responses": float(np.mean([len(group) for group in groups]))}
  if "reward" in groups[0][0]:
    found["reward_of_first"] = float(np.mean([group[0]["reward"] for group in groups]))
    found["reward"] = float(np.nanmean([x["reward"] for group in groups for x in group]))
  return found


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Leaves the rows on disk, whole or not at all."""
  aside = path.with_suffix(".tmp")
  aside.write_text("".join(json.dumps({name: row[name] for name in made.FIELDS}) + "\n"
                           for row in rows))
  aside.rename(path)
