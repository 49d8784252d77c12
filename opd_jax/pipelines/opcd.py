"""OPCD: a strong model learns to do without a weak model's critiques what it does with them.

    answers -> critiques -> refinements -> checks -> S_e grows -> KL(p(.|x) || sg p(.|x, f))

A step of this loop is an epoch of Algorithm 1. The teacher is the student as it was at the epoch's
beginning, shown the critique f; the student sees the plain question x. With `loss.signal`
"verified" it learns the refined answers instead: SFT on refinements, the baseline.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import (distributed, keys, preemption, progress, sharding, train_state,
                     verifiers)
from opd_jax.checkpoint import Checkpoints
from opd_jax.data import builders, chat, loader
from opd_jax.evals import run as evals
from opd_jax.losses import divergences
from opd_jax.pipelines import critiques, evaluation, in_context, objective, on_policy, opd, stages
from opd_jax.pipelines import judge as judges
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder as responders
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import engine
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.teachers import contexts
from opd_jax.train_state import TrainState
from opd_jax.writer import Writer

CONTROLS = ("", "self", "none")
Row = stages.Row


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains `config.student` on what critiques change in it; everything lands in `workdir`.

  A run that was killed goes on in the stage where it was, with the same draws; updates go on from
  the epoch's beginning.

  Raises:
    ValueError: the config asks for something impossible, or two epochs on end kept no critique.
    FloatingPointError: loss or gradient is not finite; the batch is on disk.
  """
  check(config)
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("rollout.prompts x rollout.group_size",
                      config.rollout.prompts * config.rollout.group_size, mesh)
  policies.check_rows("triples", config.triples, mesh, config.loss.micro_batches)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  total = config.total_steps
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    root = keys.root(config.seed)
    student = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
    in_context.check_lengths(config, student)
    objective.check_divergence(config.loss, student.model.config.vocab_size)
    rows = questions(config, student)
    begin_with(config, workdir, rows)
    cast = assemble(config, student, mesh)
    policies.describe(student, workdir)
    progress.note(formula(config))
    guarded = builders.is_guarded(config.data)
    messages = {row["id"]: json.loads(row["messages"]) for row in rows}
    verify = stack.enter_context(verifiers.make(**config.verifier))
    evaluate = evaluation.make(config, student, verify, mesh, workdir)
    optimizer = train_state.make_optimizer(config.optimizer, 1)
    state = train_state.create(student.params, optimizer, False, mesh)
    update = on_policy.make_update(config, opd.make_loss(config, student), opd.describe, optimizer,
                                   state)
    learn = make_learn(config, student, update, messages, mesh, workdir)

    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    first = 0
    if found := checkpoints.restore(state, total):
      first, state, _ = found
      if guarded and first < total:
        raise ValueError(f"{workdir} was left after {first} epochs, but of the guarded data set "
                         f"{config.data.builder!r} no text is kept to go on with; choose another "
                         "workdir, or set data.builder_kw.plain_text=True")
      progress.note(f"resuming after {first} epochs")
    writer = stack.enter_context(Writer(workdir, config, first))
    bar = stack.enter_context(progress.Bar(total, first))
    stop = stack.enter_context(preemption.guard())

    def go_on() -> None:
      if stop():
        raise engine.Stopped

    if first == 0:
      writer.write(0, evaluation.named(evaluate(state.params, "step_000000")))
    size = len(rows) * config.rollout.group_size
    kept = [] if guarded else [
        x for epoch in range(first) for x in whole(workdir, epoch, size) if x["kept"]]
    try:
      for epoch in range(first, total):
        here = folder(workdir, epoch)
        triples = critiques.gather(config, cast, rows, state.params, epoch,
                                   None if guarded else here, student.tokenizer,
                                   evals.shared(verify), go_on)
        if guarded:
          stages.rows(here / critiques.TRIPLES, len(triples), len(triples), lambda start, stop: [
              critiques.without_texts(x) for x in triples])
        new = [x for x in triples if x["kept"]]
        kept += new
        metrics = critiques.metrics(triples) | {"critique/all": float(len(kept))}
        if not new:
          refuse_second(config, workdir, epoch, triples)
        if kept:
          state, learned = learn(state, kept, epoch, go_on)
          metrics |= learned
        done = epoch + 1
        scores: dict[str, float] = {}
        if evaluation.due(config, done):
          scores = evaluation.named(evaluate(state.params, f"step_{done:06d}"))
        writer.write(done, metrics | scores)
        bar.update(done, {"reward": metrics["rollout/reward"], "kept": metrics["critique/kept"],
                          "loss": metrics.get("loss/total", 0.0)})
        if done % config.checkpoint.every == 0 or done == total:
          checkpoints.save(done, state, {}, scores)
    except engine.Stopped:
      progress.note("SIGTERM: stopped; " + (
          "of guarded data nothing is kept to go on with" if guarded else
          "the same command goes on from here"))
      return
    last = f"step_{total:06d}"
    if not evaluation.is_there(workdir, last):  # total_steps was lowered
      writer.write(total, evaluation.named(evaluate(state.params, last)))
    conclude(config, workdir, student, state)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what has no meaning, before anything is loaded. Raises: ValueError naming the key."""
  loss = config.loss
  objective.check(config)
  for key, value, known in (("control", config.control, CONTROLS),
                            ("filter", config.filter, critiques.FILTERS)):
    if value not in known:
      raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, known))}")
  for key, found, wanted in (
      ("teacher.source", config.teacher.source, ""), ("teachers", len(config.teachers), 0),
      ("reference.source", config.reference.source, ""),
      ("teacher_cache", config.teacher_cache, ""),
      ("student_share", config.student_share, 1.0), ("ema.rate", config.ema.rate, 0.0),
      ("loss.updates_per_batch", loss.updates_per_batch, 1),
      ("loss.reference_kl", loss.reference_kl, 0.0)):
    if found != wanted:
      raise ValueError(f"{key} is {found!r}, which has no effect on OPCD; leave it at {wanted!r}")
  if loss.surrogate not in divergences.KINDS and loss.signal != "verified":
    raise ValueError(f"loss.surrogate is {loss.surrogate!r} and loss.signal {loss.signal!r}; what "
                     "a critique changes is learned with loss.surrogate='reverse_kl' (or another "
                     f"of {', '.join(divergences.KINDS)}), refinements with loss.signal='verified'")
  asks = config.filter in ("both", "rubric")
  if asks != bool(config.rubric):
    raise ValueError(f"filter is {config.filter!r} and rubric {config.rubric!r}; " + (
        "name a file with a rubric, or set filter='outcome'" if asks else
        "a rubric is of no use without filter='both' or 'rubric'"))
  if config.rubric:
    judges.read_rubric(config.rubric)
  if config.control and config.critic.source:
    raise ValueError(f"control is {config.control!r}, which asks no critic, and critic.source "
                     f"{config.critic.source!r}; set critic.source='' or control=''")
  if not config.control and not config.critic.source:
    raise ValueError("critic.source is ''; name a critic, or set control='self' (the student "
                     "criticizes itself) or 'none' (no critiques)")
  if config.optimizer.schedule != "constant":
    raise ValueError(f"optimizer.schedule is {config.optimizer.schedule!r}, but how many updates "
                     "there will be depends on what is kept; set 'constant'")


def begin_with(config: ml_collections.ConfigDict, workdir: str, rows: Sequence[Row]) -> None:
  """Refuses triples in the workdir of other models, questions (`rows`) or another rubric."""
  root, epochs = keys.root(config.seed), pathlib.Path(workdir, "epochs")
  stages.begin_with(epochs, "questions", lambda: stages.contents(
      [row["id"], row["messages"], row["answer"]] for row in rows))
  for place, name in enumerate(("student", "critic", "judge")):
    if config[name].source:
      stages.begin_with(epochs, f"{name}'s weights", lambda: policies.fingerprint(
          config[name], keys.at(root, "init", place)))
  if config.rubric:
    stages.begin_with(epochs, "rubric's words", lambda: judges.read_rubric(config.rubric))


def assemble(config: ml_collections.ConfigDict, student: policies.Policy,
             mesh: Mesh) -> critiques.Cast:
  """Loads the critic and the judge, and makes everyone ready to speak."""
  root, rollout = keys.root(config.seed), config.rollout
  rows = rollout.prompts * rollout.group_size
  longer = ml_collections.ConfigDict(rollout.to_dict() | dict(
      max_prompt=config.context.budget, prompt_buckets=tuple(config.context.buckets)))
  brief = ml_collections.ConfigDict(longer.to_dict() | dict(
      max_response=config.critique.max_response))
  speaks = lambda policy, section, sampling: responders.make(
      policy, section, Sampling(sampling.temperature, sampling.top_k, sampling.top_p), rows, mesh)
  itself = lambda params: params
  critic, whose, judge, judging = student, itself, student, itself
  if config.critic.source:
    critic = policies.load(config.critic, config.model, keys.at(root, "init", 1), mesh)
    whose = lambda params: critic.params
    check_fits(config, "critic", critic, config.critique.max_response)
  if config.judge.source:
    judge = policies.load(config.judge, config.model, keys.at(root, "init", 2), mesh)
    judging = lambda params: judge.params
    check_fits(config, "judge", judge, max(map(len, map(judge.tokenizer.encode, judges.WORDS))))
  if config.control == "self":
    check_fits(config, "student", student, config.critique.max_response)
  judged = None
  if config.rubric:
    judged = judges.make(judge, judges.read_rubric(config.rubric),
                         in_context.widths(config.context), cases(config, mesh), mesh)
  return critiques.Cast(
      answer=speaks(student, rollout, rollout), refine=speaks(student, longer, config.refine),
      criticize=None if config.control == "none" else speaks(critic, brief, config.critique),
      critic=whose, judge=judged, judging=judging)


def cases(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """Cases that the judge is asked about at a time: a rollout's, but no more tokens than
  context.tokens allow a teacher who reads (a case is read once a word)."""
  rows, data = config.rollout.prompts * config.rollout.group_size, sharding.ways("batch", mesh)
  if not config.context.tokens:
    return rows
  width = in_context.widths(config.context)[-1]
  block = contexts.block_rows(config.context.tokens // len(judges.WORDS), width, 0, data)
  return min(block, rows)


def check_fits(config: ml_collections.ConfigDict, who: str, policy: policies.Policy,
               response: int) -> None:
  """Refuses requests that are longer than who is asked allows."""
  allowed, longest = policy.model.config.max_positions, config.context.budget + response
  if longest > allowed:
    raise ValueError(f"context.budget is {config.context.budget} tokens; with what the {who} may "
                     f"say that makes {longest}, but it allows {allowed}; lower the budget")


def questions(config: ml_collections.ConfigDict, student: policies.Policy) -> list[Row]:
  """The rows of the training split that are asked in every epoch; those too long are left out.

  Raises: ValueError if there are too few.
  """
  source = builders.open_source(config.data.builder, config.data.builder_kw,
                                config.data.train_split, config.data.cache)
  encode, rows, wanted = loader.encode(student.tokenizer), [], config.questions or len(source)
  for i in range(len(source)):
    row = encode(source[i])
    if len(row["prompt_ids"]) <= config.rollout.max_prompt:
      rows.append(row)
    if len(rows) == wanted:
      break
  if len(rows) < (config.questions or 1):
    raise ValueError(f"the split {config.data.train_split!r} has {len(rows)} questions of at most "
                     f"rollout.max_prompt={config.rollout.max_prompt} tokens (of {len(source)} "
                     f"rows); `questions` asks for {config.questions}")
  return rows


def make_learn(config: ml_collections.ConfigDict, student: policies.Policy, update: Callable,
               messages: dict[str, chat.Messages], mesh: Mesh,
               workdir: str) -> Callable[..., tuple[TrainState, dict[str, float]]]:
  """The updates of an epoch: (state, kept triples, epoch, go_on) -> (state, means of metrics).

  The last batch of a pass has what is left, and is an update like the others.
  """
  tokenizer, spread = student.tokenizer, sharding.of_batch(mesh)
  compares = config.loss.surrogate in divergences.KINDS
  guarded = builders.is_guarded(config.data)
  read_behind = in_context.make(config.context, compares, student.model, tokenizer.pad_id, mesh)
  head = jax.jit(functools.partial(in_context.heads, student.model))

  def learn(state: TrainState, kept: Sequence[Row], epoch: int,
            go_on: Callable[[], None]) -> tuple[TrainState, dict[str, float]]:
    frozen = jax.tree.map(jnp.copy, state.params) if compares else None  # training donates them
    constants = (head(frozen),) if compares else None
    found, rows = [], []
    for here in minibatches(config, kept, epoch):
      go_on()
      batch = sharding.put(as_batch(config, tokenizer, messages, here), spread)
      metrics: dict[str, float] = {}
      if compares:
        made = [shown(tokenizer, messages[x["prompt"]], x) for x in here]
        filler = made[-1]._replace(shown=())  # gains nothing, so it is not read
        batch, metrics = read_behind(frozen, batch, made + [filler] * (config.triples - len(made)))
        metrics |= contexts.metrics(made)
      state, learned = update(state, batch, constants)
      train_state.check_finite(learned, batch, workdir, epoch + 1,
                               [x["prompt"] for x in here] if guarded else None)
      found.append({name: float(x) for name, x in jax.device_get(learned).items()} | metrics)
      rows.append(len(here))
    # By triples: the last batch of a pass may have fewer.
    return state, {name: float(np.average([x[name] for x in found], weights=rows))
                   for name in found[0]} | {"update/count": float(len(found))}

  return learn


def minibatches(config: ml_collections.ConfigDict, kept: Sequence[Row],
                epoch: int) -> Iterator[list[Row]]:
  """The epoch's batches: passes over all that is kept, in a random order each."""
  key = keys.at(keys.root(config.seed), "source", epoch)
  seed = [int(word) for word in np.ravel(jax.random.key_data(key))]
  count, turn = 0, 0
  while True:
    order = contexts.shuffled(kept, seed, turn)
    for start in range(0, len(order), config.triples):
      yield order[start:start + config.triples]
      count += 1
      if count == config.updates:
        return
    turn += 1
    if not config.updates:
      return


def as_batch(config: ml_collections.ConfigDict, tokenizer: Any,
             messages: dict[str, chat.Messages], here: Sequence[Row]) -> Batch:
  """Triples as what the student sees of them: the plain question, and the answer or refinement.

  The last rows may only fill the batch: of these no token is real.
  """
  compares, size = config.loss.surrogate in divergences.KINDS, config.triples
  filled = [*here, *here[-1:] * (size - len(here))]
  prompts = batches.prompts([tokenizer.encode_chat(messages[x["prompt"]]) for x in filled], 1,
                            policies.buckets(config.rollout), tokenizer.pad_id)
  batch = batches.answered(prompts, [x["ids" if compares else "refined_ids"] for x in filled],
                           (*config.rollout.response_buckets, config.rollout.max_response),
                           tokenizer.pad_id)
  real = batch.mask & (np.arange(size) < len(here))[:, None]
  advantage = None if compares else np.ones(size, np.float32)
  return batch.replace(mask=real, learn=real, advantage=advantage)


def shown(tokenizer: Any, messages: chat.Messages, triple: Row) -> contexts.Context:
  """What the teacher of a triple sees."""
  told = chat.with_critique(messages, triple["critique"])
  part = contexts.Part("feedback", triple["critique"], 0, triple["chain"])
  return contexts.Context(told, tokenizer.encode_chat(told), (part,), (), 0)


def folder(workdir: str, epoch: int) -> pathlib.Path:
  return pathlib.Path(workdir, "epochs", f"{epoch:04d}")


def read(workdir: str, epoch: int) -> list[Row]:
  """The triples of an epoch, kept or not; S_e is what is kept of it and of those before it."""
  return distributed.of_first(lambda: stages.read(folder(workdir, epoch) / critiques.TRIPLES))


def whole(workdir: str, epoch: int, size: int) -> list[Row]:
  """The triples of an epoch that is behind us. Raises: ValueError if they are not all there."""
  found = read(workdir, epoch)
  if len(found) != size:
    raise ValueError(f"{folder(workdir, epoch) / critiques.TRIPLES} has {len(found)} of the {size} "
                     "triples that were learned from; put it back, or choose another workdir")
  return found


def refuse_second(config: ml_collections.ConfigDict, workdir: str, epoch: int,
                  triples: Sequence[Row]) -> None:
  """Says that an epoch kept no critique. Raises: ValueError if the one before kept none either."""
  progress.note(f"epoch {epoch + 1}: no critique stood the checks "
                f"({critiques.reasons(config, triples)}); nothing new is learned")
  if epoch and not any(x["kept"] for x in read(workdir, epoch - 1)):
    raise ValueError(
        f"epochs {epoch} and {epoch + 1} kept no critique. What was said is in "
        f"{folder(workdir, epoch) / critiques.TRIPLES} ({critiques.reasons(config, triples)}): if "
        "hardly a refinement is right, ask easier questions or more answers each "
        "(rollout.group_size); if the judge says no to all, change the rubric, the judge, or set "
        "filter='outcome'; if critiques are cut off, raise critique.max_response; if something is "
        "too long, context.budget")


def formula(config: ml_collections.ConfigDict) -> str:
  """Everything in force, as one line."""
  who = {"": config.critic.source, "self": "the student itself", "none": "nobody"}[config.control]
  checks = {"both": "refinement right and rubric", "outcome": "refinement right",
            "rubric": "rubric", "none": "all"}[config.filter]
  shown = ";  q is the student at the epoch's beginning, shown the critique"
  return (f"objective: {objective.formula(config)}"
          + (shown if config.loss.surrogate in divergences.KINDS else ", of refinements")
          + f";  critiques by {who}, kept: {checks}")


def conclude(config: ml_collections.ConfigDict, workdir: str, student: policies.Policy,
             state: TrainState) -> None:
  """Leaves the table, with the best epoch beside the last one, the report and the export."""
  def highest() -> str:
    paths = sorted(pathlib.Path(workdir, "eval").glob("step_*.json"))
    return max((path.stem for path in paths[1:]),
               key=lambda name: evaluation.read(workdir, name)[f"mean@{config.eval.samples}"])

  best = distributed.of_first(highest)
  last = f"step_{config.total_steps:06d}"
  on_policy.conclude(config, workdir, student, state.params, {
      "student before": "step_000000", f"at its best, epoch {int(best[5:])}": best,
      "student after": last})
