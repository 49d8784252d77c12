"""The loop of every method that samples anew at each step, top to bottom.

    prompts -> rollout -> score -> verify -> grade -> loss and update -> log, evaluate, checkpoint
"""

from collections.abc import Callable, Sequence
import contextlib
import time
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from opd_jax import (compilations, distributed, keys, preemption, progress, sharding, train_state,
                     verifiers)
from opd_jax.checkpoint import Checkpoints
from opd_jax.data import builders, loader
from opd_jax.losses import masked
from opd_jax.models import hf
from opd_jax.pipelines import evaluation
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import teachers
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import engine
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.train_state import TrainState
from opd_jax.verifiers import Verdict
from opd_jax.writer import Writer


class Verified(NamedTuple):
  """A step's rollouts, P prompts with G responses each, as the host knows them."""

  rows: Sequence[loader.Row]     # P, of the data
  texts: Sequence[str]           # P*G, the G of a prompt next to each other
  verdicts: Sequence[Verdict]    # P*G


class Method(NamedTuple):
  """What a pipeline hands to the loop."""

  formula: str                                        # the objective, printed at the start
  notices: Sequence[str]                              # what the user should know
  student: policies.Policy                            # as given, or cut to the teachers' ids
  teachers: dict[str, policies.Policy]                # by name; measured at the end
  recall: Callable[[Batch, Sequence[loader.Row]], Batch]  # adds what is cached of the data's rows
  score: Callable[[TrainState, Batch], Batch]         # adds the teachers' arrays; sees no reward
  grade: Callable[[TrainState, Batch, Verified, Array], tuple[Batch, dict[str, float]]]
                                                      # adds what verdicts teach; key; metrics
  constants: Callable[[TrainState], Any]              # arrays the loss needs whole, e.g. heads
  loss: Callable[[Any, Batch, Any], tuple[Array, dict[str, Array]]]  # see make_train_step
  describe: Callable[[Batch, dict[str, Array]], dict[str, Array]]    # (batch, columns) -> metrics
  reverse_kl: Callable[[Any, Batch], Array] | None    # (student params, rollout) -> f32[B, T]


def run(config: ml_collections.ConfigDict, workdir: str,
        build: Callable[[ml_collections.ConfigDict, policies.Policy, Mesh], Method]) -> None:
  """Trains `config.student`; everything worth keeping lands in `workdir`.

  A workdir with a checkpoint in it is resumed, with the same random draws and the same
  order of data as an unbroken run.

  Raises:
    ValueError: the config asks for something impossible.
    FloatingPointError: loss or gradient is not finite; the batch is on disk.
  """
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("rollout.prompts x rollout.group_size",
                      config.rollout.prompts * config.rollout.group_size, mesh,
                      config.loss.micro_batches)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  root, spread = keys.root(config.seed), sharding.of_batch(mesh)
  rollout, total, updates = config.rollout, config.total_steps, config.loss.updates_per_batch
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    student = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
    policies.check_lengths(student, "student", rollout)
    method = build(config, student, mesh)
    student = method.student
    policies.describe(student, workdir)
    for line in (f"objective: {method.formula}", *method.notices):
      progress.note(line)

    tokenizer = student.tokenizer
    prompts = open_prompts(config, tokenizer)
    verify = stack.enter_context(verifiers.make(**config.verifier))
    evaluate = evaluation.make(config, student, verify, mesh, workdir, method.reverse_kl)
    sample = policies.make_sampler(student.model, tokenizer, rollout, Sampling(
        rollout.temperature, rollout.top_k, rollout.top_p))
    optimizer = train_state.make_optimizer(config.optimizer, total * updates)
    state = train_state.create(student.params, optimizer, config.ema.rate > 0, mesh)
    train_step = make_update(config, method.loss, method.describe, optimizer, state)

    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    first_step, rewards = 0, []  # rewards: of the updates since the last line of metrics
    solved: set[str] = set()     # ids of prompts that ever had a reward of 1
    if found := checkpoints.restore(state, total):
      first_step, state, seen = found
      prompts.restore(seen["prompts"])
      rewards, solved = seen["rewards"], set(seen["solved"])
      progress.note(f"resuming after {first_step} steps")
    writer = stack.enter_context(Writer(workdir, config, first_step))
    bar = stack.enter_context(progress.Bar(total, first_step))
    stop = stack.enter_context(preemption.guard())
    compiled = stack.enter_context(compilations.counted())
    if first_step == 0:
      writer.write(0, evaluation.named(evaluate(state.params, "step_000000")))
    previous, saved = None, first_step
    guarded = builders.is_guarded(config.data)

    def save(done: int, seen: dict[str, Any], scores: dict[str, float]) -> None:
      nonlocal saved
      train_state.check_finite(*previous)  # before this save may push out a good one
      checkpoints.save(done, state, {"prompts": seen, "rewards": rewards,
                                     "solved": sorted(solved)}, scores)
      saved = done

    for step in range(first_step, total):
      done = step + 1
      log = done % config.log_every == 0 or done == total
      clock = Clock(log, state)

      before = prompts.state()
      rows = next(prompts)
      batch = sharding.put(batches.prompts(
          [row["prompt_ids"] for row in rows], rollout.group_size, policies.buckets(rollout),
          tokenizer.pad_id, [row["teacher_id"] for row in rows]), spread)
      own = from_student(config, keys.at(root, "source", step))
      try:
        if own:
          batch = sample(state.params, batch, keys.at(root, "rollout", step), stop)
        elif stop():
          raise engine.Stopped
        else:
          given = batches.answered(batch, [row["response_ids"] for row in rows],
                                   (*rollout.response_buckets, rollout.max_response),
                                   tokenizer.pad_id)
          batch = sharding.put(method.recall(given, rows), spread)
      except engine.Stopped:
        if step > saved:
          save(step, before, {})
        break
      clock.lap("rollout", batch.mask)
      # Here, since what is fetched from other hosts waits for all that devices were asked before.
      drawn = Batch(*jax.tree.map(sharding.fetch, (batch.prompt, batch.prompt_mask, batch.response,
                                                   batch.mask)))

      graded: dict[str, float] = {}
      scored = method.score(state, batch)  # on the device, while the host verifies
      clock.lap("score", scored.learn)
      if own:
        texts, verdicts = judged(drawn, rows, rollout.group_size, tokenizer, verify)
        clock.lap("verify")
        reward = np.array([v.reward for v in verdicts], np.float32)
        scored, graded = method.grade(
            state, scored.replace(reward=sharding.put(reward, spread)),
            Verified(rows, texts, verdicts), keys.at(root, "context", step))
        rewards.append(float(reward.mean()))
        solved |= {row["id"] for row, best in zip(rows, reward.reshape(len(rows), -1).max(axis=1))
                   if best >= 1.0}
      batch = scored
      clock.lap("grade", batch)

      if previous:  # finished by now: looking at it holds nothing up
        train_state.check_finite(*previous)
      constants = method.constants(state)  # of the state that the batch was scored with
      for _ in range(updates):  # one that is refused leaves the next the same fault
        state, metrics = train_step(state, batch, constants)
      previous = (metrics, batch, workdir, done, [row["id"] for row in rows] if guarded else None)
      clock.lap("update", metrics)

      bar.update(done)
      if log:
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        metrics |= {**graded, **about_rollout(drawn, tokenizer),
                    **clock.metrics(int(drawn.mask.sum())), "data/dropped": prompts.dropped,
                    **{f"compile/{name}": count for name, count in compiled.items()}}
        if rewards:
          metrics["rollout/reward"] = float(np.mean(rewards))
        metrics["rollout/ever_solved"] = len(solved)
        if config.student_share < 1.0:
          metrics["rollout/own"] = float(own)
        rewards = []
        writer.write(done, metrics)
        shown = {"reward": "rollout/reward", "reverse KL": "teacher/reverse_kl",
                 "tok/s": "time/tokens_per_s"}
        bar.update(done, {name: metrics[key] for name, key in shown.items() if key in metrics})
      scores: dict[str, float] = {}
      if evaluation.due(config, done):
        scores = evaluation.named(evaluate(state.params, f"step_{done:06d}"))
        writer.write(done, scores)
      if done % config.checkpoint.every == 0 or done == total:
        save(done, prompts.state(), scores)
    if stop():
      progress.note(f"SIGTERM: saved after {saved} updates; the same command goes on from here")
      return
    last = f"step_{total:06d}"
    if not evaluation.is_there(workdir, last):  # total_steps was lowered
      writer.write(total, evaluation.named(evaluate(state.params, last)))
    finish(config, workdir, student, method, state, verify, mesh)


def make_update(config: ml_collections.ConfigDict, loss: Callable[..., Any],
                describe: Callable[..., Any], optimizer: optax.GradientTransformation,
                state: TrainState) -> Callable[..., Any]:
  """The compiled update: (state, batch, constants) -> (state, metrics).

  Args:
    loss, describe: of a `Method`.
    state: to lay out the new state by; its leaves may be shapes with shardings.
  """
  return train_state.jit_train_step(train_state.make_train_step(
      loss, describe, optimizer, masked.COUNTS[config.loss.aggregate], config.loss.micro_batches,
      config.ema.rate), state)


def open_prompts(config: ml_collections.ConfigDict, tokenizer: Any) -> loader.Batches:
  """The endless, resumable stream of prompts, the same in all processes."""
  source = builders.open_source(config.data.builder, config.data.builder_kw,
                                config.data.train_split, config.data.cache)
  if config.teacher_cache:  # whose arrays are in the order of the source
    source = loader.Numbered(source)
  asked, rollout = tuple(teachers.sections(config)), config.rollout
  encode, fits = loader.encode, lambda row: len(row["prompt_ids"]) <= rollout.max_prompt
  if config.student_share < 1.0:  # every row may have to bring its response
    encode, fits = loader.encode_answered, lambda row: (
        len(row["prompt_ids"]) <= rollout.max_prompt
        and len(row["response_ids"]) <= rollout.max_response)
  return loader.Batches(
      source, config.rollout.prompts, transform=encode(tokenizer, asked), fits=fits,
      seed=config.seed)


def judged(batch: Batch, rows: Sequence[loader.Row], group_size: int, tokenizer: Any,
           verify: verifiers.Verify) -> tuple[list[str], list[Verdict]]:
  """The text of each response, and its verdict: the processes share the groups out.

  Args:
    batch: a rollout, P*G rows; numpy.
    rows: P, of the data.
    group_size: G.
  """
  response, mask = batch.response, batch.mask

  def of_groups(groups: Sequence[int]) -> list[tuple[list[str], list[Verdict]]]:
    members = [range(g * group_size, (g + 1) * group_size) for g in groups]
    texts = [[tokenizer.decode(response[i][mask[i]].tolist()) for i in group] for group in members]
    verdicts = iter(verify([text for group in texts for text in group],
                           [rows[g]["answer"] for g in groups for _ in range(group_size)]))
    return [(group, [next(verdicts) for _ in group]) for group in texts]

  found = distributed.each(of_groups, range(len(rows)))
  return [x for texts, _ in found for x in texts], [x for _, verdicts in found for x in verdicts]


def from_student(config: ml_collections.ConfigDict, key: Array) -> bool:
  """Whether a batch has the student's responses, rather than the data's: GKD's mixture."""
  return config.student_share == 1.0 or bool(jax.random.uniform(key) < config.student_share)


class Clock:
  """Splits a step's time into its parts. Only a step that is logged waits for the device.

  Args:
    on: whether this step is logged.
    before: what the steps before may still be computing; their time is not this step's.
  """

  def __init__(self, on: bool, before: Any):
    if on:
      jax.block_until_ready(before)
    self._on, self._start, self._laps = on, time.perf_counter(), {}

  def lap(self, name: str, result: Any = None) -> None:
    """Ends a part; `result` is what it has computed."""
    if self._on:
      jax.block_until_ready(result)
      now = time.perf_counter()
      self._laps[f"time/{name}_s"], self._start = now - self._start, now

  def metrics(self, tokens: int) -> dict[str, float]:
    """Seconds of each part, of the step, and response tokens per second."""
    total = sum(self._laps.values())
    return {**self._laps, "time/step_s": total, "time/tokens_per_s": tokens / total}


def about_rollout(batch: Batch, tokenizer: Any) -> dict[str, float]:
  """Length of the responses, the share that never ended, and what is not padding; of numpy."""
  mask = batch.mask
  real = np.concatenate([batch.prompt_mask, mask], axis=1)
  ended = np.any(mask & np.isin(batch.response, tokenizer.eos_ids), axis=1)
  return {"rollout/length": float(mask.sum(axis=1).mean()),
          "rollout/truncated": float(1.0 - ended.mean()),
          "rollout/useful": float(real.mean())}


def finish(config: ml_collections.ConfigDict, workdir: str, student: policies.Policy,
           method: Method, state: TrainState, verify: Any, mesh: Mesh) -> None:
  """Evaluates the teachers, and concludes the run."""
  named = {"student before": "step_000000", "student after": f"step_{config.total_steps:06d}"}
  for name, teacher in method.teachers.items() if config.evaluate_teachers else ():
    label = teachers.label(name)
    named[label] = label.replace(" ", "_")
    evaluation.make(config, teacher, verify, mesh, workdir)(
        sharding.to_device(teacher.params), named[label])
  conclude(config, workdir, student, state.params, named)


def conclude(config: ml_collections.ConfigDict, workdir: str, student: policies.Policy,
             params: Any, named: dict[str, str]) -> None:
  """The table of some evaluations, by who was evaluated; the report; the exported student.

  Of `named`, "student before" and "student after" are compared prompt by prompt.
  """
  if config.export:
    hf.export_hf(params, student.model.config, f"{workdir}/export", student.tokenizer)
  if not distributed.is_first():
    return
  results = {who: evaluation.read(workdir, name) for who, name in named.items()}
  columns = list(results["student after"])
  progress.table("held-out prompts", ["", *columns], [
      [who, *(f"{found[c]:.3f}" if c in found else "" for c in columns)]
      for who, found in results.items()])
  progress.note(evaluation.paired(workdir, named["student before"], named["student after"]))
  progress.report(workdir)
  progress.note(f"everything is in {workdir}: report.png, samples/, metrics.jsonl, export/")
