"""Position bias: a table, position_bias.json and position_bias.png in the workdir.

Teacher and student finish the student's beginnings; the gap between them is measured along the
responses, before and after training; and students are trained on parts of their responses, each
as a run of pipelines/opd.py in `runs/` of the workdir. A run that is finished is not run again.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, progress, sharding, verifiers, writer
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.evals import position_bias, position_bias_report
from opd_jax.pipelines import evaluation, objective, opd
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.policy import Policy
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import engine, scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling

Rows = Sequence[dict[str, Any]]


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Studies `config.student` and `config.teacher`, and what training does to the student."""
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  runs = plan(config)
  if runs:
    policies.check_rows("rollout.prompts x rollout.group_size",
                        config.rollout.prompts * config.rollout.group_size, mesh,
                        config.loss.micro_batches)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    student, teacher, after = load(config, config.after.source, mesh)
    rows, dropped = evaluation.read_rows(config, student)
    if dropped:
      progress.note(f"{dropped} prompts longer than rollout.max_prompt={config.rollout.max_prompt} "
                    "tokens are left out, and the next taken")
    verify = stack.enter_context(verifiers.make(**config.verifier))
    draws = position_bias.resample(len(rows), config.eval.seed)

    responses = own_responses(config, student, rows)
    fractions = [0.0, *sorted(set(config.cuts) - {1.0}), 1.0]
    found = position_bias.rescue(
        prompts(config, rows), responses, fractions, config.continuations,
        config.rollout.max_response,
        {"student": finisher(config, student), "teacher": finisher(config, teacher)},
        judge(student.tokenizer, verify, [row["answer"] for row in rows]))
    results: dict[str, Any] = {
        "prompts": len(rows), "responses": len(responses), "continuations": config.continuations,
        "fractions": fractions, "rescue": position_bias.curves(
            found, found["student"][-1, :, 0], len(rows), draws)}
    position_bias_report.rescue(results)

    along = functools.partial(gap, config, teacher=teacher, rows=rows, mesh=mesh)
    columns, mask = along(student, responses)
    results["before"] = position_bias.along(columns, mask, len(rows), draws)
    if runs:
      if not train(config, runs, workdir):
        return
      results["runs"] = {name: learned(workdir, name, one, columns["reverse_kl"], mask, draws)
                         for name, one in runs.items()}
      if after is None:
        after = load(config, f"workdir:{folder(workdir, 'all tokens')}", mesh)[2]
    if after is not None:
      columns, mask = along(after, own_responses(config, after, rows))
      results["after"] = position_bias.along(columns, mask, len(rows), draws)
  position_bias_report.along(results)
  position_bias_report.runs(results)
  path = pathlib.Path(workdir) / "position_bias.json"
  path.write_text(json.dumps(results, indent=1, allow_nan=False))
  position_bias_report.picture(results, path.with_suffix(".png"))
  progress.note(f"the numbers are in {path}, their picture beside it")


def plan(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """The runs by name: on all tokens, and on the first and the last of each of `parts` below 1.

  Raises: ValueError for what one of them would refuse.
  """
  if not config.parts:
    return {}
  known = configs.on_policy()
  shared = {key: value for key, value in config.to_dict().items() if key in known}
  del shared["pipeline"]
  losses = {"all tokens": {}}
  for side, name in (("prefix", "first"), ("suffix", "last")):
    for part in sorted(set(config.parts) - {1.0}):
      losses[f"{name} {100 * part:g}%"] = dict(
          weight="position", position=dict(fraction=part, side=side))
  runs = {name: configs.on_policy(**{**shared, "loss": {**shared["loss"], **loss}})
          for name, loss in losses.items()}
  for run_config in runs.values():
    configs.validate(run_config)
    objective.check(run_config)
  return runs


def load(config: ml_collections.ConfigDict, after: str,
         mesh: Mesh) -> tuple[Policy, Policy, Policy | None]:
  """The student, the teacher and, if `after` names a source, the student once trained.

  Raises: ValueError if they do not speak the same ids, if one takes too few tokens, or if `after`
    is another model than the student.
  """
  root = keys.root(config.seed)
  if not config.teacher.source:
    raise ValueError("teacher.source is ''; this study compares the student with a teacher: name "
                     "one")
  named = {"teacher": config.teacher}
  if after:
    named["after"] = ml_collections.ConfigDict({**config.after, "source": after})
  student = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
  others = {name: policies.load(section, config.model, keys.at(root, "init", 1 + i), mesh)
            for i, (name, section) in enumerate(named.items())}
  for name, policy in (("student", student), *others.items()):
    policies.check_lengths(policy, name, config.rollout)
  student, others, notices = policies.match(student, others)
  for line in notices:
    progress.note(line)
  if after:
    check_shape(student, others["after"], config.student.source, after)
  return student, others["teacher"], others.get("after")


def check_shape(student: Policy, after: Policy, source: str, after_source: str) -> None:
  """Refuses an `after` that cannot be the student once trained."""
  ours, theirs = (dataclasses.asdict(policy.model.config) for policy in (student, after))
  differ = [f"{name} {theirs[name]} (the student: {ours[name]})" for name in ours
            if ours[name] != theirs[name]]
  if differ:
    raise ValueError(f"after.source={after_source!r} cannot be student.source={source!r} once "
                     f"trained: it has {', '.join(differ)}")


def prompts(config: ml_collections.ConfigDict, rows: Rows) -> list[list[int]]:
  """The prompt of each response: all prompts, `eval.samples` times (see evals/position_bias.py)."""
  return [list(row["prompt_ids"]) for _ in range(config.eval.samples) for row in rows]


def finisher(config: ml_collections.ConfigDict, policy: Policy) -> position_bias.Finish:
  """A model as a function from prompts, with or without the beginning of a response, to the rest.

  One width for all: the engine reads a prompt in the smallest of the buckets that hold it, and is
  compiled for few of these, whatever the cuts.
  """
  rollout, section = config.rollout, config.eval
  # What prompt and response have together, however much of the response is given.
  longest = rollout.max_prompt + rollout.max_response - 1
  begun = tuple(rollout.max_prompt + size for size in rollout.response_buckets)
  settings = policies.settings(policy.tokenizer, rollout, Sampling(
      section.temperature, section.top_k, section.top_p))
  generate = engine.make(policy.model, settings._replace(
      buckets=(*settings.buckets, *begun), length=longest))
  root = keys.root(section.seed)

  def finish(asked: Sequence[Sequence[int]], limits: np.ndarray, call: int) -> list[list[int]]:
    ids, mask = batches.pad(asked, longest, policy.tokenizer.pad_id, left=True)
    found = generate(policy.params, ids, mask, keys.at(root, "eval", call),
                     np.asarray(limits, np.int32))
    return [response[real].tolist() for response, real in zip(found.response, found.mask)]

  return finish


def own_responses(config: ml_collections.ConfigDict, policy: Policy, rows: Rows) -> list[list[int]]:
  """A policy's whole responses to every prompt."""
  asked = prompts(config, rows)
  return finisher(config, policy)(asked, np.full(len(asked), config.rollout.max_response), 0)


def judge(tokenizer: Tokenizer, verify: verifiers.Verify,
          answers: Sequence[str]) -> position_bias.Judge:
  """Which responses, as ids, are right; `answers` are those of the prompts."""
  def right(responses: Sequence[Sequence[int]], each: int) -> np.ndarray:
    wanted = [answer for answer in answers for _ in range(each)]
    wanted *= len(responses) // len(wanted)
    verdicts = verify([tokenizer.decode(ids) for ids in responses], wanted)
    return np.array([verdict.reward >= 1.0 for verdict in verdicts], float)
  return right


def gap(config: ml_collections.ConfigDict, policy: Policy, responses: Sequence[Sequence[int]], *,
        teacher: Policy, rows: Rows, mesh: Mesh) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """What student and teacher say of every token: `position_bias.along`'s columns and mask.

  A token of which one of them says nothing finite is left out of the mask.
  """
  measure = compared(policy.model, teacher.model)
  asked, rollout = prompts(config, rows), config.rollout
  size, parts = config.eval.batch * config.eval.samples, []
  for start in range(0, len(asked), size):
    chosen = np.minimum(np.arange(start, start + size), len(asked) - 1)  # one shape for all
    batch = batches.pair([asked[i] for i in chosen], [responses[i] for i in chosen],
                         rollout.max_prompt, rollout.max_response, policy.tokenizer.pad_id)
    found = measure(policy.params, teacher.params, jax.device_put(batch, sharding.of_batch(mesh)))
    parts.append(jax.tree.map(np.asarray, (found, batch.mask)))
  columns, mask = jax.tree.map(lambda *x: np.concatenate(x)[:len(asked)], *parts)
  finite = functools.reduce(np.logical_and, map(np.isfinite, columns.values()))
  if dropped := int(np.sum(mask & ~finite)):
    progress.note(f"{dropped} of {mask.sum()} tokens are left out: the teacher rules them out")
  return columns, mask & finite


@functools.cache
def compared(student: nn.Module, teacher: nn.Module) -> Any:
  """`compare`, compiled once for students of one shape."""
  return jax.jit(functools.partial(compare, student, teacher))


def compare(student: nn.Module, teacher: nn.Module, student_params: Any, teacher_params: Any,
            batch: Batch) -> dict[str, Array]:
  """f32[B, T] each: KL(student || teacher), and the token's log-probability under both; nats."""
  return {
      "reverse_kl": opd.reverse_kl(student, (teacher,), student_params, (teacher_params,), batch),
      "student": scorer.logprobs(student, student_params, batch)[0],
      "teacher": scorer.logprobs(teacher, teacher_params, batch)[0]}


def folder(workdir: str, name: str) -> pathlib.Path:
  """Where a run lives: "first 30%" in runs/first_30."""
  return pathlib.Path(workdir) / "runs" / name.rstrip("%").replace(" ", "_")


def train(config: ml_collections.ConfigDict, runs: dict[str, ml_collections.ConfigDict],
          workdir: str) -> bool:
  """Trains what is not trained yet; false if it was asked to stop before the end."""
  for name, run_config in runs.items():
    where = folder(workdir, name)
    if not is_finished(where, config.total_steps):
      progress.note(f"training on {name} of each response, in {where}")
      where.mkdir(parents=True, exist_ok=True)
      (where / "config.json").write_text(run_config.to_json(indent=2))
      opd.run(run_config, str(where))
      if not is_finished(where, config.total_steps):
        return False
  return True


def is_finished(where: pathlib.Path, total_steps: int) -> bool:
  """Whether the last checkpoint is whole and evaluated."""
  steps = [int(path.name) for path in (where / "checkpoints").glob("*") if path.name.isdigit()]
  return (max(steps, default=0) == total_steps
          and (where / "eval" / f"step_{total_steps:06d}.json").is_file())


def learned(workdir: str, name: str, config: ml_collections.ConfigDict, reverse_kl: np.ndarray,
            mask: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
  """What a run had to learn from, and what became of its student.

  Args:
    workdir, name, config: of the run.
    reverse_kl, mask: [R, T], of the student before it.
    draws: from `position_bias.resample`.
  Returns: "share_of_kl" in the tokens it learned from, "before", "after" and "change" of the
    accuracy on the evaluation's prompts, and its "curve": [update, accuracy] pairs.
  """
  where, total = folder(workdir, name), config.total_steps
  rewards = {when: np.array([record["rewards"] for record in json.loads(
      (where / "eval" / f"step_{step:06d}.json").read_text())["records"]])
      for when, step in (("before", 0), ("after", total))}
  sums = {when: x.sum(axis=1) for when, x in rewards.items()}
  sums["change"] = sums["after"] - sums["before"]
  whole = config.loss.weight == "uniform"
  part = dict(fraction=1.0, side="prefix") if whole else config.loss.position.to_dict()
  metric = f"eval/mean@{config.eval.samples}"
  return {
      "share_of_kl": position_bias.share(reverse_kl, mask, prompts=len(sums["change"]),
                                         draws=draws, **part),
      **{what: position_bias.interval(x, config.eval.samples, draws) for what, x in sums.items()},
      "curve": [[line["step"], line[metric]] for line in writer.read(str(where)) if metric in line]}
