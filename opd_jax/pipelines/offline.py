"""The loop over a fixed data set: supervised fine-tuning on given responses, top to bottom."""

from collections.abc import Callable
import contextlib
import functools
import json
import pathlib
import time
from typing import Any

import jax
from jax import Array
import ml_collections
import numpy as np

from opd_jax import compilations, keys, preemption, progress, sharding, train_state, verifiers
from opd_jax.checkpoint import Checkpoints
from opd_jax.data import builders, loader
from opd_jax.data import tokenizer as tokenizers
from opd_jax.losses import masked, supervised
from opd_jax.models import hf
from opd_jax.pipelines import evaluation
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import teacher_samples, teachers
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.writer import Writer

# Enough rows to learn the words of a data set from.
TOKENIZER_ROWS = 2000


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Fits `config.student` to the responses of `config.data`; resumes if it can."""
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  for size in config.batch.buckets:
    policies.check_rows(f"batch.tokens // bucket = {config.batch.tokens} // {size}",
                        loader.rows_in(size, config.batch.tokens), mesh, config.loss.micro_batches)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  root = keys.root(config.seed)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    source = builders.open_source(config.data.builder, config.data.builder_kw,
                                  config.data.train_split, config.data.cache)
    guarded = builders.is_guarded(config.data.builder, config.data.builder_kw)
    if guarded and config.tokenizer_vocab:
      raise ValueError(f"tokenizer_vocab is {config.tokenizer_vocab}, but the words of the guarded "
                       f"data set {config.data.builder!r} must not reach the disk; set it to 0")
    tokenizer = learn_tokenizer(source, config.tokenizer_vocab) if config.tokenizer_vocab else None
    student = policies.load(config.student, config.model, keys.at(root, "init"), mesh, tokenizer)
    policies.describe(student, workdir)
    asked = teachers.sections(config)
    whose = " or ".join(f"{name} {section.source}".strip() for name, section in asked.items())
    progress.note(f"objective: loss = {config.loss.aggregate}(-log p) of the responses of "
                  + (whose or "the data"))
    if asked:
      teachers.check_names(config)
      policies.check_rows("rollout.prompts x rollout.group_size",
                          config.rollout.prompts * config.rollout.group_size, mesh)
      source = teacher_samples.of(config, source, mesh, workdir)
    data = open_batches(config, source, student.tokenizer)

    verify = stack.enter_context(verifiers.make(**config.verifier))
    evaluate = evaluation.make(config, student, verify, mesh, workdir)
    optimizer = train_state.make_optimizer(config.optimizer, config.total_steps)
    state = train_state.create(student.params, optimizer, config.ema.rate > 0, mesh)
    train_step = make_update(config, student, optimizer, state)
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
    previous = None

    for step in range(first_step, config.total_steps):
      length, rows = next(data)
      batch = jax.device_put(as_batch(rows, length, student.tokenizer.pad_id),
                             sharding.of_batch(mesh))
      state, metrics = train_step(state, batch, None)
      if previous:  # finished by now: looking at it holds nothing up
        train_state.check_finite(*previous)
      ids = [row["id"] for row in rows if row] if guarded else None
      previous = (metrics, batch, workdir, step + 1, ids)
      tokens += sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows if row)
      done = step + 1
      if done % config.log_every == 0 or done == config.total_steps:
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        metrics |= {"time/tokens_per_s": tokens / (now - since), "data/dropped": data.dropped,
                    **{f"compile/{name}": count for name, count in compiled.items()}}
        tokens, since = 0, now
        writer.write(done, metrics)
        bar.update(done, {"loss": metrics["loss/total"], "tok/s": metrics["time/tokens_per_s"]})
      scores: dict[str, float] = {}
      if config.eval.every and done % config.eval.every == 0 or done == config.total_steps:
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
    if not pathlib.Path(workdir, "eval", f"{last}.json").is_file():  # total_steps was lowered
      writer.write(config.total_steps, evaluation.named(evaluate(state.params, last)))
  progress.report(workdir)
  if config.export:
    hf.export_hf(state.params, student.model.config, f"{workdir}/export", student.tokenizer)
  scores = evaluation.read(workdir, last)
  progress.table("result", ("", *scores), [("student", *(f"{v:.3f}" for v in scores.values()))])


def make_update(config: ml_collections.ConfigDict, student: policies.Policy, optimizer: Any,
                state: train_state.TrainState) -> Callable[..., Any]:
  """The compiled update: (state, batch, None) -> (state, metrics); `state` may be shapes."""
  return train_state.jit_train_step(train_state.make_train_step(
      functools.partial(loss, student.model, config.loss), describe, optimizer,
      masked.COUNTS[config.loss.aggregate], config.loss.micro_batches, config.ema.rate), state)


def learn_tokenizer(source: Any, vocab_size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE of `vocab_size` tokens learnt from the first rows of the data."""
  def texts():
    for i in range(min(len(source), TOKENIZER_ROWS)):
      row = source[i]
      yield from (message["content"] for message in json.loads(row["messages"]))
      yield row["response"]
      yield "user\nassistant\n"  # the words of the chat template itself
  return tokenizers.train_bpe(texts(), vocab_size)


def open_batches(config: ml_collections.ConfigDict, source: Any,
                 tokenizer: tokenizers.Tokenizer) -> loader.BucketedBatches:
  """The endless, resumable stream of (bucket length, rows)."""
  length = lambda row: len(row["prompt_ids"]) + len(row["response_ids"])
  chunks = loader.Batches(
      source, config.batch.chunk, transform=loader.encode_answered(tokenizer),
      fits=lambda row: length(row) <= max(config.batch.buckets), seed=config.seed,
      process_index=jax.process_index(), process_count=jax.process_count())
  return loader.BucketedBatches(chunks, length, config.batch.buckets, config.batch.tokens,
                                config.seed)


def as_batch(rows: list[dict[str, Any] | None], length: int, pad_id: int) -> Batch:
  """Rows of one bucket as a Batch whose "response" is the whole row behind its first token.

  The prompt is that one token and only the response is learnt, so one shape a bucket
  serves every split of a row into prompt and response.
  """
  ids = [row["prompt_ids"] + row["response_ids"] if row else [pad_id] for row in rows]
  tokens, real = batches.pad(ids, length, pad_id)
  first = np.array([len(row["prompt_ids"]) if row else length for row in rows])
  learn = real & (np.arange(length) >= first[:, None])
  return Batch(prompt=tokens[:, :1], prompt_mask=real[:, :1], response=tokens[:, 1:],
               mask=real[:, 1:], learn=learn[:, 1:])


def loss(model: Any, config: ml_collections.ConfigDict, params: Any, batch: Batch,
         constants: None) -> tuple[Array, dict[str, Array]]:
  """Cross-entropy of the responses, and the column that `describe` reads."""
  logprobs, entropy = scorer.logprobs(model, params, batch)
  total, _ = supervised.sft(logprobs, batch.learn, masked.AGGREGATES[config.aggregate])
  return total, {"loss/nll": -logprobs, "student/entropy": entropy}


def describe(batch: Batch, columns: dict[str, Array]) -> dict[str, Array]:
  """Metrics of a whole batch: the mean over tokens of each column f32[B, T]."""
  return {name: masked.token_mean(values, batch.learn) for name, values in columns.items()}
