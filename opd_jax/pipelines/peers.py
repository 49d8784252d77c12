"""MOPD and SDPO: a model that has seen what its peers wrote teaches itself token by token.

    rollouts -> verify -> contexts of peers -> their teacher's states -> surrogate(...)

The G rollouts of a prompt are verified; each is scored once more behind a prompt that shows some of
the others (`teachers/contexts.py`), by the student itself, its average or an older one, or by a
larger model. A rollout whose context gained nothing carries no loss. The loss is that of the OPD
family.
"""

from collections.abc import Callable, Sequence
import functools
import json
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections

from opd_jax import sharding
from opd_jax.data import chat
from opd_jax.losses import divergences
from opd_jax.pipelines import in_context, objective, on_policy, opd, responder, teachers
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.teachers import contexts
from opd_jax.teachers import params as teacher_params
from opd_jax.train_state import TrainState


class Teacher(NamedTuple):
  """Who reads the contexts."""

  model: Any                           # a module, or a scorer.Mixture
  params: teacher_params.TeacherParams
  policy: policies.Policy | None       # of another model than the student
  who: str                             # in words


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains `config.student` on its own samples towards itself with `config.context`."""
  on_policy.run(config, workdir, build)


def build(config: ml_collections.ConfigDict, student: policies.Policy,
          mesh: Mesh) -> on_policy.Method:
  """Loads who is asked, checks that contexts fit, and picks the loss."""
  check(config)
  asked = teachers.outline(config, student, objective.asks_reference(config.loss))
  asked = teachers.load(config, asked, mesh)
  student = asked.student
  teacher = choose(config, asked)
  objective.check_divergence(config.loss, min(
      x.model.config.vocab_size for x in (student, *asked.teachers.values())))
  in_context.check_lengths(config, student if teacher.policy is None else teacher.policy)
  reference = asked.reference
  ask = jax.jit(functools.partial(
      opd.score, student.model, (), reference and reference.model, config.loss))
  head = jax.jit(functools.partial(in_context.heads, teacher.model))
  compares = config.loss.surrogate in divergences.KINDS
  # Another model's does not change, and its parameters may have to come from the host for it.
  whose = ((lambda state: head(teacher.params(state))) if teacher.policy is None or not compares
           else teacher_params.frozen(jax.block_until_ready(head(teacher.params(None)))))
  return on_policy.Method(
      formula=objective.formula(config),
      notices=[*asked.notices, f"q is {teacher.who}, shown {describe(config.context)}"],
      student=student, teachers={}, recall=lambda batch, rows: batch,
      score=lambda state, batch: ask(
          state.params, (), reference and sharding.to_device(reference.params), batch),
      grade=make_grade(config, student, teacher, mesh),
      constants=lambda state: (whose(state),) if compares else None,
      loss=functools.partial(opd.loss, student.model, config.loss), describe=opd.describe,
      reverse_kl=None)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that cannot teach anything, before anything is loaded."""
  objective.check(config)
  contexts.check(settings(config.context))
  if config.context.peers == "plain" and config.context.feedback == "never":
    raise ValueError("context.peers is 'plain' and context.feedback 'never': the teacher is shown "
                     "nothing, and of a rollout whose context gained nothing nothing is learned; "
                     f"set one of {', '.join(x for x in contexts.PEERS if x != 'plain')}")
  if config.rollout.group_size == 1 and config.context.peers != "plain":
    raise ValueError("a context shows a rollout's peers, and rollout.group_size is 1, so there are "
                     "none; set it to 2 or more")
  if config.teacher.source and config.teacher_params != "frozen":
    raise ValueError(f"teacher.source is {config.teacher.source!r} and teacher_params "
                     f"{config.teacher_params!r}, but only the student's own teacher (source='') "
                     "changes; set teacher_params='frozen', or teacher.source=''")
  if (config.teacher_params == "ema") != (config.ema.rate > 0.0):
    raise ValueError(f"teacher_params is {config.teacher_params!r} and ema.rate "
                     f"{config.ema.rate:g}; the one is of no use without the other: set "
                     "teacher_params='ema' and ema.rate=0.05, or neither")


def choose(config: ml_collections.ConfigDict, asked: teachers.Asked) -> Teacher:
  """The reader of the contexts: the student in some form, or another model."""
  if asked.teachers:
    policy = asked.teachers[""]
    return Teacher(policy.model, lambda state: sharding.to_device(policy.params), policy,
                   config.teacher.source)
  model, kind = asked.student.model, config.teacher_params
  whose = teacher_params.of_student(kind, asked.student.params)
  who = {"current": "the student as it is", "frozen": "the student as it was at the start",
         "ema": f"the student's average (rate {config.ema.rate:g})",
         "trust_region": f"the student at the start and, {100 * config.trust:g}% of the logits, "
                         "as it is"}[kind]
  if kind == "trust_region":
    model = scorer.Mixture(model, (1.0 - config.trust, config.trust))
  return Teacher(model, whose, None, who)


def settings(context: ml_collections.ConfigDict) -> contexts.Settings:
  """The `context` section, as contexts are made by it."""
  return contexts.Settings(context.budget, context.peers, context.control, context.match,
                           context.feedback, context.success_at, context.remove_thinking)


def describe(context: ml_collections.ConfigDict) -> str:
  """The `context` section, in words."""
  peers = context.peers.replace("_", " ")
  if context.control:
    peers = f"{context.control} texts in the place of {peers}, matched by {context.match}"
  return f"{peers}, in at most {context.budget} tokens"


def make_grade(config: ml_collections.ConfigDict, student: policies.Policy, teacher: Teacher,
               mesh: Mesh) -> Callable[..., tuple[Batch, dict[str, float]]]:
  """A function that has the teacher read every verified rollout behind its context.

  Returns: (state, batch, verified, key) -> (batch with the teacher's arrays, metrics).
  """
  size = config.rollout.group_size
  tokenizer = student.tokenizer if teacher.policy is None else teacher.policy.tokenizer
  compares = config.loss.surrogate in divergences.KINDS
  read = in_context.make(config.context, compares, teacher.model, tokenizer.pad_id, mesh)
  summarize = make_summarize(config, student, mesh) if config.context.summary else None

  def grade(state: TrainState, batch: Batch, verified: on_policy.Verified,
            key: Array) -> tuple[Batch, dict[str, float]]:
    made = contexts.make(groups(verified, size), settings(config.context), tokenizer, key,
                         summarize and functools.partial(summarize, state.params, key))
    return read(teacher.params(state), batch, made)

  return grade


def make_summarize(config: ml_collections.ConfigDict, student: policies.Policy,
                   mesh: Mesh) -> Callable[[Any, Array, Sequence[str]], list[str]]:
  """A function (params, key, texts) -> summaries: the student's own, as it is now, greedily.

  A peer whose summary is empty or cut off, or whose text is too long to be read, is left out.
  """
  rollout = ml_collections.ConfigDict(config.rollout.to_dict() | dict(
      max_prompt=config.context.budget, prompt_buckets=tuple(config.context.buckets),
      max_response=config.context.summary, response_buckets=()))
  respond = responder.make(student, rollout, Sampling(temperature=0.0),
                           config.rollout.prompts * config.rollout.group_size, mesh)

  def summarize(params: Any, key: Array, texts: Sequence[str]) -> list[str]:
    said = respond(params, [chat.summary_request(text) for text in texts], key)
    return [x.text if x and x.ended else "" for x in said]

  return summarize


def groups(verified: on_policy.Verified, size: int) -> list[contexts.Group]:
  """The rollouts of a step, prompt by prompt."""
  found = []
  for i, row in enumerate(verified.rows):
    mine = slice(size * i, size * (i + 1))
    verdicts = verified.verdicts[mine]
    found.append(contexts.Group(
        i, json.loads(row["messages"]), verified.texts[mine],
        [verdict.reward for verdict in verdicts], [verdict.feedback for verdict in verdicts]))
  return found
