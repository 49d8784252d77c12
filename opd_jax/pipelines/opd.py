"""The OPD family: the student's own responses, and a word on every token.

    surrogate(logprobs, signal * weight, mask)

The word is a teacher's (OPD), a teacher's beyond a reference (G-OPD), or a verifier's on the whole
response (GRPO). The sampled forms learn from the tokens drawn; the distribution-level forms
(forward KL, reverse KL, JSD) compare two models at the same states, over the whole vocabulary or
over the most likely tokens and a tail. `objective` has the choices, `teachers` who is asked.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import ml_collections

from opd_jax import sharding
from opd_jax.losses import (divergences, fused, masked, policy_gradient, preference, signals,
                            weights)
from opd_jax.pipelines import objective, on_policy, teacher_cache, teachers
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.teachers import params as teacher_params


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains `config.student` on its own samples towards `config.loss`."""
  on_policy.run(config, workdir, build)


def build(config: ml_collections.ConfigDict, student: policies.Policy,
          mesh: jax.sharding.Mesh) -> on_policy.Method:
  """Loads who is asked, checks that they speak the student's language, and picks the loss."""
  objective.check(config)
  teachers.check_names(config)
  asked = teachers.outline(config, student, objective.asks_reference(config.loss))
  objective.check_divergence(config.loss, min(
      policy.model.config.vocab_size for policy in (asked.student, *asked.teachers.values())))
  ahead = teacher_cache.prepare(config, asked, mesh) if config.teacher_cache else None
  if ahead and config.student_share == 0.0:
    asked = asked._replace(teachers={}, notices=[*asked.notices, (
        f"no teacher is loaded: all that is learned is in {ahead.folder}; evaluations say nothing "
        "of a reverse KL")])
  else:
    asked = teachers.load(config, asked, mesh)
  student, named, reference, notices = asked
  models = tuple(teacher.model for teacher in named.values())
  whose = teacher_params.frozen(tuple(teacher.params for teacher in named.values()))
  ask = make_score(config, asked)
  gap = make_gap(config, student, models)
  each = teachers.MEMORY[config.teacher_memory]

  def scored(state, batch):
    asks = objective.asks_teacher(config.loss) and batch.teacher_logprobs is None
    learned = whose(state) if asks else [None] * len(models)
    return each(lambda batch, params: ask(state.params, params[:-1], params[-1], batch),
                (*learned, reference and reference.params), batch)

  # Of a tied teacher the head is a transposed copy: made once, in the dtype it is used in, and
  # only for a loss that reads it. Heads stay on the device whatever teacher_memory says.
  heads = (tuple(jax.block_until_ready(head(t.model, sharding.to_device(t.params)))
                 for t in named.values())
           if config.loss.surrogate in divergences.KINDS else None)
  return on_policy.Method(
      formula=objective.formula(config), notices=notices, student=student, teachers=named,
      recall=(functools.partial(teacher_cache.recall, ahead, config.loss.top_k) if ahead
              else lambda batch, rows: batch),
      score=scored,
      grade=rewarded(config),
      constants=lambda state: heads,
      loss=make_loss(config, student), describe=describe,
      reverse_kl=(lambda students, batch: each(
          lambda kl, params: kl + gap(students, params, batch), whose(None), 0.0))
      if named else None,
  )


def make_score(config: ml_collections.ConfigDict, asked: teachers.Asked) -> Callable[..., Batch]:
  """The compiled `score` of a run: (student's params, teachers', reference's, batch) -> batch."""
  models = tuple(teacher.model for teacher in asked.teachers.values())
  return jax.jit(functools.partial(score, asked.student.model, models,
                                   asked.reference and asked.reference.model, config.loss))


def make_loss(config: ml_collections.ConfigDict, student: policies.Policy) -> Callable[..., Any]:
  """(params, batch, teachers' heads) -> (loss, columns)."""
  return functools.partial(loss, student.model, config.loss)


def make_gap(config: ml_collections.ConfigDict, student: policies.Policy,
             models: Sequence[Any]) -> Callable[..., Array]:
  """The compiled `reverse_kl` of an evaluation: (student's params, teachers', batch) -> f32[B, T].

  At a time of no more rows than a micro-batch of an update has.
  """
  most = config.rollout.prompts * config.rollout.group_size // config.loss.micro_batches

  def reverse_kl_in_parts(student_params: Any, params: Sequence[Any], batch: Batch) -> Array:
    return batches.in_parts(
        lambda part: reverse_kl(student.model, models, student_params, params, part),
        batches.parts(batch.mask.shape[0], most), batch)

  return jax.jit(reverse_kl_in_parts)


def head(model: Any, params: Any) -> Array:
  """A teacher's head [D, V] as a distribution-level loss wants it."""
  return scorer.head(model, params).astype(model.dtype)


def score(student: Any, models: Sequence[Any], anchor: Any, config: ml_collections.ConfigDict,
          student_params: Any, params: Sequence[Any], anchor_params: Any, batch: Batch) -> Batch:
  """Fills in what the loss needs of teachers and reference; no gradient.

  A token whose log-probability is not finite under its teacher or the reference (banned, or
  missing from the vocabulary) teaches nothing: it keeps its place but carries no loss. All are
  asked in loss.micro_batches parts, as the student is updated: the activations of one part exist
  at a time.

  Args:
    student, student_params: the student before the updates that this batch serves.
    models, params: every teacher's; each scores its own rows. None in the place of parameters:
      this call does not ask that teacher.
    anchor, anchor_params: the reference's, or None.
    config: the `loss` section.
    batch: a rollout, with what other calls or a cache have filled in.
  """
  def part(batch):
    if any(held is not None for held in params):
      found = answered(models, params, config.surrogate in divergences.KINDS, batch)
      if batch.teacher_logprobs is not None:  # of other teachers' rows, and 0 in these
        found = {name: getattr(batch, name) + x for name, x in found.items()}
      batch = batch.replace(**found)
    if anchor_params is not None:
      batch = batch.replace(reference_logprobs=scorer.logprobs(anchor, anchor_params, batch)[0])
    if objective.asks_old(config) and batch.old_logprobs is None:
      batch = batch.replace(old_logprobs=scorer.logprobs(student, student_params, batch)[0])
    learn = batch.mask
    for logprobs in (batch.teacher_logprobs, batch.reference_logprobs):
      learn = learn if logprobs is None else learn & jnp.isfinite(logprobs)
    return batch.replace(learn=learn)

  return batches.in_parts(part, config.micro_batches, batch)


def rewarded(config: ml_collections.ConfigDict) -> Callable[..., tuple[Batch, dict[str, float]]]:
  """The loop's `grade` of a loss that learns from rewards, or from none."""
  if config.loss.signal not in objective.REWARDED:
    return lambda state, batch, verified, key: (batch, {})
  compiled = jax.jit(functools.partial(grade, config))
  return lambda state, batch, verified, key: (compiled(batch), {})


def grade(config: ml_collections.ConfigDict, batch: Batch) -> Batch:
  """What the rewards of a verified batch say of every row.

  Where there is nothing to tell apart (every group agrees about its rewards) or no success, no
  token is learned from, and the update is skipped; a KL to the reference is learned nevertheless.
  """
  loss, learn = config.loss, batch.learn
  grouped = lambda x: x.reshape(-1, config.rollout.group_size)
  reward, real = grouped(batch.reward), grouped(jnp.any(learn, axis=1))
  rows = lambda x, over: grouped(over(jnp.where(learn, x, 0.0), learn))
  if loss.signal == "group_advantage":
    advantage = signals.group_advantage(reward, loss.normalize_std)
  elif loss.signal == "dpo":
    advantage = preference.dpo_signal(
        rows(batch.old_logprobs, masked.row_sum), rows(batch.reference_logprobs, masked.row_sum),
        reward, real, **loss.dpo)
  elif loss.signal == "simpo":
    advantage = preference.simpo_signal(
        rows(batch.old_logprobs, masked.row_mean), reward, real, **loss.simpo)
  else:
    advantage = signals.verified(reward, loss.success_at)
    learn &= (advantage > 0.0).reshape(-1, 1)  # the others do not count in the mean either
  advantage = advantage.reshape(-1)
  anything = jnp.any(advantage != 0.0) | (loss.reference_kl > 0.0)
  return batch.replace(advantage=advantage, learn=learn & anything)


def answered(models: Sequence[Any], params: Sequence[Any], states: bool,
             batch: Batch) -> dict[str, Array]:
  """Each row's words from its own teacher: `teacher_logprobs`, with `states` `teacher_hidden`.

  Rows of a teacher whose `params` are None have zeros.
  """
  width = max(model.config.embed_dim for model in models)

  def one(model, params):
    def ask(batch, real):
      hidden = scorer.hidden(model, params, batch)
      logprobs, _ = scorer.token_logprobs(model, params, hidden, batch.response)
      found = {"teacher_logprobs": logprobs}
      if states:  # of teachers of different widths the narrower are filled up
        wider = width - hidden.shape[2]
        found["teacher_hidden"] = jnp.pad(hidden, ((0, 0), (0, 0), (0, wider))) if wider else hidden
      return found, ()

    def silent(batch, real):
      shape = batch.response.shape
      found = {"teacher_logprobs": jnp.zeros(shape, jnp.float32)}
      if states:
        found["teacher_hidden"] = jnp.zeros((*shape, width), model.dtype)
      return found, ()

    return silent if params is None else ask

  return batches.routed(list(map(one, models, params)), batch.teacher_id, batch)[0]


def loss(student: Any, config: ml_collections.ConfigDict, params: Any, batch: Batch,
         teacher_heads: Sequence[Array] | None) -> tuple[Array, dict[str, Array]]:
  """The objective of one batch, and the columns that `describe` reads."""
  mask, aggregate = batch.learn, masked.AGGREGATES[config.aggregate]
  blank = lambda x: None if x is None else jnp.where(mask, x, 0.0)
  states = scorer.hidden(student, params, batch)
  logprobs, entropy = scorer.token_logprobs(student, params, states, batch.response)
  now = jax.lax.stop_gradient(blank(logprobs))
  batch = batch.replace(sampler_logprobs=blank(batch.sampler_logprobs),
                        teacher_logprobs=blank(batch.teacher_logprobs),
                        reference_logprobs=blank(batch.reference_logprobs))
  # In a batch's only update the student is as old as it was.
  old = now if batch.old_logprobs is None else blank(batch.old_logprobs)
  weight = objective.WEIGHTS[config.weight](now, batch, config)
  columns = {"student/entropy": entropy}
  if config.weight != "uniform":  # its mean is what it does to the learning rate
    columns["loss/weight"] = weight
  if batch.teacher_logprobs is not None:
    columns["teacher/reverse_kl"] = now - batch.teacher_logprobs
  if batch.sampler_logprobs is not None:  # the student's own responses, not the data's
    columns["importance"] = weights.truncated_importance(
        old, batch.sampler_logprobs, config.importance_cap)
  if config.surrogate in divergences.KINDS:
    if objective.weighs_importance(config) and "importance" in columns:
      weight = weight * columns["importance"]
    total, columns["loss/divergence"] = divergence(
        states, scorer.head(student, params), batch, teacher_heads, weight, config)
  else:
    signal = objective.SIGNALS[config.signal](now, batch, config)
    if objective.weighs_importance(config):
      weight = weight * columns["importance"]
    if config.surrogate == "clipped":
      total, _ = policy_gradient.clipped_surrogate_loss(
          logprobs, old, signal, mask, weight, config.clipped.low, config.clipped.high,
          config.clipped.dual or None, aggregate)
    else:
      total, _ = policy_gradient.score_function_loss(logprobs, signal, mask, weight, aggregate)
    columns["loss/signal"] = signal * weight
  if batch.old_logprobs is not None:  # 1 in a batch's first update
    columns["ratio"] = jnp.exp(now - old)
  if batch.reference_logprobs is not None:
    kl = divergences.kl_estimate(blank(logprobs), batch.reference_logprobs, "k3")
    columns["reference/kl"] = jax.lax.stop_gradient(kl)
    if config.reference_kl:
      total += config.reference_kl * aggregate(kl, mask)
  return total, columns


def divergence(states: Array, head: Array, batch: Batch, teacher_heads: Sequence[Array],
               weight: Array, config: ml_collections.ConfigDict) -> tuple[Array, Array]:
  """Each row's divergence from its own teacher's distributions: their mean, and f32[B, T]."""
  compare = functools.partial(
      fused.fused_divergence, kind=config.surrogate, beta=config.beta, top_k=config.top_k,
      top_of=config.top_of, tail=config.tail)
  aggregate = masked.AGGREGATES[config.aggregate]
  if batch.teacher_top_logprobs is not None:
    return fused.fused_given_divergence(
        states, head, batch.teacher_top_ids, batch.teacher_top_logprobs, batch.learn,
        config.surrogate, config.beta, weight=weight, aggregate=aggregate, tail=config.tail)
  if len(teacher_heads) == 1:
    return compare(states, head, batch.teacher_hidden, teacher_heads[0], batch.learn,
                   weight=weight, aggregate=aggregate)
  still = jax.lax.stop_gradient
  share = jax.grad(lambda x: aggregate(x * weight, batch.learn))(jnp.zeros(weight.shape))

  def one(teacher_head):
    def against(rows, real):
      states, teacher_states, learn, share = rows

      def part(states, head):
        return compare(states, head, teacher_states[..., :teacher_head.shape[0]], teacher_head,
                       learn & real[:, None], weight=share,
                       aggregate=lambda x, mask: jnp.sum(masked.row_sum(x, mask)))

      # The gradient at once: left to autodiff, every block would keep its head's to the end.
      (total, values), gradient = jax.value_and_grad(part, (0, 1), has_aux=True)(
          states, still(head))
      return (values, gradient[0]), (total, gradient[1].astype(jnp.float32))
    return against

  (values, of_states), (total, of_head) = batches.routed(
      list(map(one, teacher_heads)), batch.teacher_id,
      still((states, batch.teacher_hidden, batch.learn, share)))
  return _with_gradient(total, (states, head), (of_states, of_head.astype(head.dtype))), values


@jax.custom_vjp
def _with_gradient(total: Array, operands: Any, gradient: Any) -> Array:
  """`total`, whose `gradient` in `operands` is known already."""
  return total


_with_gradient.defvjp(
    lambda total, operands, gradient: (total, gradient),
    lambda gradient, outer: (
        None, jax.tree.map(lambda x: (outer * x).astype(x.dtype), gradient), None))


def describe(batch: Batch, columns: dict[str, Array]) -> dict[str, Array]:
  """Metrics of a whole batch: the mean over tokens of each column, and more of some.

  Args:
    batch: its `learn` says which tokens count.
    columns: f32[B, T] each, under the name of their metric; of the ratios "importance" and
      "ratio" the maximum, and the share of the tokens that they are worth.
  """
  mask = batch.learn
  length = jnp.sum(mask, axis=1, keepdims=True)
  decile = jnp.where(mask, 10 * jnp.arange(mask.shape[1]) // jnp.maximum(length, 1), -1)
  columns = dict(columns)
  ratios = {name: columns.pop(name) for name in ("importance", "ratio") if name in columns}
  metrics = {name: masked.token_mean(x, mask) for name, x in columns.items()}
  for name, ratio in ratios.items():
    real = jnp.where(mask, ratio, 0.0)
    metrics[f"{name}/max"] = jnp.max(real)
    metrics[f"{name}/effective_sample_size"] = jnp.square(jnp.sum(real)) / jnp.maximum(
        jnp.sum(jnp.square(real)) * masked.tokens(mask), 1e-9)
  if batch.teacher_logprobs is not None:
    said = jnp.isfinite(batch.teacher_logprobs)
    if batch.reference_logprobs is not None:
      said &= jnp.isfinite(batch.reference_logprobs)
    metrics["teacher/dropped_tokens"] = masked.tokens(batch.mask & ~said)
    metrics |= {f"teacher/reverse_kl_decile_{i}": masked.token_mean(
        columns["teacher/reverse_kl"], decile == i) for i in range(10)}
  return metrics


def reverse_kl(student: Any, models: Sequence[Any], student_params: Any,
               params: Sequence[Any], batch: Batch) -> Array:
  """Exact KL(student || teacher) over the vocabulary at every response token, f32[B, T].

  Of several teachers (`models`, `params`) it is the one that `batch.teacher_id` says; rows of one
  whose parameters are None have 0.
  """
  states, head = scorer.hidden(student, student_params, batch), scorer.head(student, student_params)

  def one(model, params):
    def against(rows, real):
      states, batch = rows
      if params is None:
        return jnp.zeros(batch.mask.shape), ()
      return fused.fused_divergence(states, head, scorer.hidden(model, params, batch),
                                    scorer.head(model, params), batch.mask, "reverse_kl")[1], ()
    return against

  return batches.routed(list(map(one, models, params)), batch.teacher_id, (states, batch))[0]
