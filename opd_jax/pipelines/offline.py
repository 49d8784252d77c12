"""The loop over a fixed data set, top to bottom: learning from given responses.

`given` has the objectives of a language model (SFT, DPO, EVE), `reward_model` that of a reward.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
import time
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections

from opd_jax import (compilations, distributed, keys, preemption, progress, sharding, train_state,
                     verifiers)
from opd_jax.checkpoint import Checkpoints
from opd_jax.data import builders, loader
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf
from opd_jax.pipelines import evaluation, given
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import sample_scores, scoring, teacher_samples, teachers
from opd_jax.rollouts.batch import Batch
from opd_jax.writer import Writer

# Enough rows to learn the words of a data set from.
TOKENIZER_ROWS = 2000


class Method(NamedTuple):
  """What a pipeline hands to the loop."""

  formula: str                     # the objective, printed at the start
  objective: given.Objective       # what a row must bring
  source: Any                      # the rows, with all that the objective needs to know of them
  params: Any                      # what is trained
  group: Callable[[Batch, Sequence[given.Member | None]], given.Given]  # rows and their members
  loss: Callable[[Any, given.Given, None], tuple[Array, dict[str, Array]]]  # see make_train_step
  describe: Callable[[given.Given, dict[str, Array]], dict[str, Array]]
  count: Callable[[Array], Array]  # learn bool[P, G, T] -> the loss's denominator
  evaluate: Callable[[Any, str], dict[str, float]]  # (params, name) -> metrics
  export: Callable[[Any], None]                     # parameters, at the end; by all processes
  finish: Callable[[dict[str, float]], None]        # metrics of the last evaluation; by the first


Build = Callable[[ml_collections.ConfigDict, policies.Policy, Any, Mesh, str,
                  contextlib.ExitStack], Method]


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Fits `config.student` to the responses of `config.data`; resumes if it can."""
  objective = given.of(config)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples,
                      sharding.make_mesh(**config.mesh))
  train(config, workdir, objective.group_size, language_model)


def train(config: ml_collections.ConfigDict, workdir: str, group_size: int, build: Build) -> None:
  """Trains what `build` makes of `config.student` on the groups of `config.data`.

  Args:
    group_size: G, responses that are learned together.
    build: (config, student, source, mesh, workdir, stack) -> the method; what it opens is entered
      in the stack.
  """
  mesh = sharding.make_mesh(**config.mesh)
  for size in config.batch.buckets:
    policies.check_rows(
        f"batch.tokens // bucket = {config.batch.tokens} // {size}" if group_size == 1 else
        f"batch.tokens // {group_size} responses // bucket = {config.batch.tokens} // {group_size} "
        f"// {size}", loader.rows_in(size, config.batch.tokens // group_size), mesh,
        config.loss.micro_batches)
  root = keys.root(config.seed)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    source = builders.open_source(config.data.builder, config.data.builder_kw,
                                  config.data.train_split, config.data.cache)
    guarded = builders.is_guarded(config.data)
    if guarded and config.tokenizer_vocab:
      raise ValueError(f"tokenizer_vocab is {config.tokenizer_vocab}, but the words of the guarded "
                       f"data set {config.data.builder!r} must not reach the disk; set it to 0")
    tokenizer = learn_tokenizer(source, config.tokenizer_vocab) if config.tokenizer_vocab else None
    student = policies.load(config.student, config.model, keys.at(root, "init"), mesh, tokenizer)
    policies.describe(student, workdir)
    method = build(config, student, source, mesh, workdir, stack)
    progress.note(f"objective: {method.formula}")
    unusable: dict[str, float] = {}
    if method.objective.name != "sft":  # whose bad rows are errors when they come up
      unusable = given.survey(method.source, method.objective)
      progress.note("data: " + ", ".join(f"{n} {name.partition('/')[2].replace('_', ' ')}"
                                         for name, n in unusable.items()))
    data = open_batches(config, method, student.tokenizer)
    evaluate = method.evaluate
    optimizer = train_state.make_optimizer(config.optimizer, config.total_steps)
    state = train_state.create(method.params, optimizer, config.ema.rate > 0, mesh)
    train_step = make_update(config, method.loss, method.describe, method.count, optimizer, state)
    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    first_step = 0
    if found := checkpoints.restore(state, config.total_steps):
      first_step, state, seen = found
      data.restore(seen)
      progress.note(f"resuming after {first_step} updates")
    writer = stack.enter_context(Writer(workdir, config, first_step))
    bar = stack.enter_context(progress.Bar(config.total_steps, first_step))
    stop = stack.enter_context(preemption.guard())
    compiled = stack.enter_context(compilations.counted())
    tokens, since = 0, time.perf_counter()
    previous, warned = None, False

    if not first_step and evaluation.due(config, 0):
      writer.write(0, evaluation.named(evaluate(state.params, f"step_{0:06d}")))
    for step in range(first_step, config.total_steps):
      length, rows = next(data)
      members = [member for row in rows
                 for member in (row["members"] if row else [None] * group_size)]
      batch = sharding.put(
          method.group(given.as_batch(members, length, student.tokenizer.pad_id), members),
          sharding.of_batch(mesh))
      state, metrics = train_step(state, batch, None)
      if previous:  # finished by now: looking at it holds nothing up
        train_state.check_finite(*previous)
      ids = [row["id"] for row in rows if row] if guarded else None
      previous = (metrics, batch, workdir, step + 1, ids)
      tokens += sum(len(m["prompt_ids"]) + len(m["response_ids"]) for m in members if m)
      done = step + 1
      if done % config.log_every == 0 or done == config.total_steps:
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        metrics |= {"time/tokens_per_s": tokens / (now - since), "data/dropped": data.dropped,
                    **unusable, **{f"compile/{name}": count for name, count in compiled.items()}}
        tokens, since = 0, now
        writer.write(done, metrics)
        if not warned and (warning := given.warning(metrics, method.objective)):
          progress.note(warning)
          warned = True
        bar.update(done, {"loss": metrics["loss/total"], "tok/s": metrics["time/tokens_per_s"]})
      scores: dict[str, float] = {}
      if evaluation.due(config, done):
        jax.block_until_ready(state)  # the updates' time is not the evaluation's
        began = time.perf_counter()
        scores = evaluation.named(evaluate(state.params, f"step_{done:06d}"))
        writer.write(done, scores)
        since += time.perf_counter() - began
      stopping = stop()  # asked once: what is answered "saved" has been saved
      if done % config.checkpoint.every == 0 or done == config.total_steps or stopping:
        train_state.check_finite(*previous)  # before this save may push out a good one
        checkpoints.save(done, state, data.state(), scores)
      if stopping:
        progress.note(f"SIGTERM: saved after {done} updates; the same command goes on from here")
        return
    last = f"step_{config.total_steps:06d}"
    if not evaluation.is_there(workdir, last):  # total_steps was lowered
      writer.write(config.total_steps, evaluation.named(evaluate(state.params, last)))
  method.export(state.params)
  if distributed.is_first():
    progress.report(workdir)
    method.finish(evaluation.read(workdir, last))


def language_model(config: ml_collections.ConfigDict, student: policies.Policy, source: Any,
                   mesh: Mesh, workdir: str, stack: contextlib.ExitStack) -> Method:
  """A language model that learns as `loss.objective` says."""
  objective, asked = given.of(config), teachers.sections(config)
  whose = " or ".join(f"{name} {section.source}".strip() for name, section in asked.items())
  if asked:
    teachers.check_names(config)
    policies.check_rows("rollout.prompts x rollout.group_size",
                        config.rollout.prompts * config.rollout.group_size, mesh)
    source = teacher_samples.of(config, source, mesh, workdir)
  if asking := {**config.scores} | ({given.REFERENCE: config.reference} if config.reference.source
                                    else {}):
    given.survey(source, objective._replace(fields=()))  # a bad row is named before all are asked
    for field, section in asking.items():
      source = scoring.of(config, section, field, source, mesh, workdir)
  verify = stack.enter_context(verifiers.make(**config.verifier))
  evaluate = evaluation.make(config, student, verify, mesh, workdir)

  def export(params: Any) -> None:
    if config.export:
      hf.export_hf(params, student.model.config, f"{workdir}/export", student.tokenizer)

  def finish(scores: dict[str, float]) -> None:
    named = evaluation.named(scores)
    progress.table("result", ("", *named), [("student", *(f"{v:.3f}" for v in named.values()))])

  return Method(
      formula=given.formula(config, whose or "the data"), objective=objective, source=source,
      params=student.params,
      group=functools.partial(given.grouped, objective=objective, loss=config.loss),
      loss=functools.partial(given.loss, student.model, config.loss),
      describe=functools.partial(given.describe, config.loss), count=given.count(config),
      evaluate=sample_scores.make(config, student, verify, mesh, workdir, evaluate), export=export,
      finish=finish)


def make_update(config: ml_collections.ConfigDict, loss: Any, describe: Any, count: Any,
                optimizer: Any, state: train_state.TrainState) -> Callable[..., Any]:
  """The compiled update: (state, batch, None) -> (state, metrics); `state` may be shapes.

  Args:
    loss, describe, count: of a `Method`.
  """
  return train_state.jit_train_step(train_state.make_train_step(
      loss, describe, optimizer, count, config.loss.micro_batches, config.ema.rate), state)


def learn_tokenizer(source: Any, vocab_size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE of `vocab_size` tokens learnt from the first rows of the data."""
  def texts():
    for i in range(min(len(source), TOKENIZER_ROWS)):
      row = source[i]
      yield from (message["content"] for message in json.loads(row["messages"]))
      yield row["response"]
      yield "user\nassistant\n"  # the words of the chat template itself
  return tokenizers.train_bpe(texts(), vocab_size)


def open_batches(config: ml_collections.ConfigDict, method: Method,
                 tokenizer: tokenizers.Tokenizer) -> loader.BucketedBatches:
  """The endless, resumable stream of (bucket length, rows with their members)."""
  longest, length = max(config.batch.buckets), lambda row: row["length"]
  chunks = loader.Batches(
      method.source, config.batch.chunk,
      transform=given.encode(tokenizer, method.objective, longest),
      fits=lambda row: length(row) <= longest, seed=config.seed)
  return loader.BucketedBatches(chunks, length, config.batch.buckets,
                                config.batch.tokens // method.objective.group_size, config.seed)
