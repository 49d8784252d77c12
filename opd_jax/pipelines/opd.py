"""On-policy distillation: the student's own responses, the teacher's word on every token.

    surrogate(logprobs, signal * weight, mask)

The sampled form learns from the tokens drawn; the distribution-level forms (forward KL,
reverse KL, JSD) compare the two models at the same states, over the whole vocabulary or over
the most likely tokens and a tail.
"""

import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import ml_collections

from opd_jax import keys
from opd_jax.losses import divergences, fused, masked, policy_gradient, signals, weights
from opd_jax.pipelines import on_policy
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch
from opd_jax.teachers import params as teacher_params

SIGNALS = {"opd": signals.opd}
SURROGATES = ("score_function", *divergences.KINDS)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains `config.student` on its own samples towards `config.teacher`."""
  on_policy.run(config, workdir, build)


def build(config: ml_collections.ConfigDict, student: policies.Policy,
          mesh: jax.sharding.Mesh) -> on_policy.Method:
  """Loads the teacher, checks that it speaks the student's language, and picks the loss."""
  check_names(config.loss)
  teacher = policies.load(config.teacher, config.model, keys.at(keys.root(config.seed), "init", 1),
                          mesh)
  policies.check_lengths(teacher, "teacher", config.rollout)
  student, teacher, notices = policies.match(student, teacher)
  check_divergence(config.loss, min(student.model.config.vocab_size,
                                    teacher.model.config.vocab_size))
  whose = teacher_params.frozen(teacher.params)
  ask = jax.jit(functools.partial(score, teacher.model, config.loss))
  gap = jax.jit(functools.partial(reverse_kl, student.model, teacher.model))
  # Of a tied teacher the head is a transposed copy: made once, in the dtype it is used in, and
  # only for a loss that reads it.
  head = (scorer.head(teacher.model, teacher.params).astype(teacher.model.dtype)
          if config.loss.surrogate in divergences.KINDS else None)
  return on_policy.Method(
      formula=formula(config.loss), notices=notices, student=student, teacher=teacher,
      score=lambda state, batch: ask(whose(state), batch),
      constants=lambda state: head,
      loss=functools.partial(loss, student.model, config.loss), describe=describe,
      reverse_kl=lambda params, batch: gap(params, teacher.params, batch),
  )


def check_names(config: ml_collections.ConfigDict) -> None:
  """Refuses a signal, aggregation or surrogate that does not exist."""
  for key, known in (("signal", tuple(SIGNALS)), ("surrogate", SURROGATES),
                     ("aggregate", tuple(masked.AGGREGATES))):
    if config[key] not in known:
      raise ValueError(f"loss.{key} is {config[key]!r}; it must be one of {', '.join(known)}")


def check_divergence(config: ml_collections.ConfigDict, vocabulary: int) -> None:
  """Refuses settings of the distribution-level losses that have no meaning, or no effect."""
  if config.surrogate in divergences.KINDS:
    divergences.check_kind(config.surrogate, config.beta)
    fused.check_top(config.top_k, config.top_of, config.tail, vocabulary)
  elif config.top_k:
    raise ValueError(
        f"loss.top_k is {config.top_k}, but loss.surrogate={config.surrogate!r} learns from "
        "sampled tokens alone; set loss.top_k=0 or another loss.surrogate: "
        + ", ".join(divergences.KINDS))


def formula(config: ml_collections.ConfigDict) -> str:
  """The objective in force, as one line of text."""
  if config.surrogate == "score_function":
    return (f"loss = {config.aggregate}(-A w log p),  A = log q - log p,  "
            f"w = min(p / mu, {config.importance_cap:g})")
  names = {"forward_kl": "KL(q || p)", "reverse_kl": "KL(p || q)",
           "jsd": f"JSD_{config.beta:g}(q, p)"}
  tokens = (f"the {config.top_of}'s top {config.top_k} tokens, tail {config.tail}" if config.top_k
            else "the vocabulary")
  return f"loss = {config.aggregate}({names[config.surrogate]} over {tokens}, w = 1)"


def score(teacher: Any, config: ml_collections.ConfigDict, params: Any, batch: Batch) -> Batch:
  """Fills in what the teacher says of the batch's responses.

  A token whose teacher log-probability is not finite (banned, or missing from the
  teacher's vocabulary) teaches nothing: it keeps its place but carries no loss.
  """
  states = scorer.hidden(teacher, params, batch)
  logprobs, _ = scorer.token_logprobs(teacher, params, states, batch.response)
  batch = batch.replace(teacher_logprobs=logprobs, learn=batch.mask & jnp.isfinite(logprobs))
  return batch.replace(teacher_hidden=states) if config.surrogate in divergences.KINDS else batch


def loss(student: Any, config: ml_collections.ConfigDict, params: Any, batch: Batch,
         teacher_head: Array | None) -> tuple[Array, dict[str, Array]]:
  """The objective of one batch, and the columns that `describe` reads."""
  mask, aggregate = batch.learn, masked.AGGREGATES[config.aggregate]
  blank = lambda x: jnp.where(mask, x, 0.0)
  states = scorer.hidden(student, params, batch)
  logprobs, entropy = scorer.token_logprobs(student, params, states, batch.response)
  now, teacher = jax.lax.stop_gradient(blank(logprobs)), blank(batch.teacher_logprobs)
  importance = weights.truncated_importance(now, blank(batch.sampler_logprobs),
                                            config.importance_cap)
  columns = {"teacher/reverse_kl": now - teacher, "student/entropy": entropy,
             "importance": importance}
  if config.surrogate in divergences.KINDS:
    total, columns["loss/divergence"] = fused.fused_divergence(
        states, scorer.head(student, params), batch.teacher_hidden, teacher_head, mask,
        config.surrogate, config.beta, aggregate=aggregate, top_k=config.top_k,
        top_of=config.top_of, tail=config.tail)
  else:
    signal = SIGNALS[config.signal](now, teacher)
    total, _ = policy_gradient.score_function_loss(logprobs, signal, mask, importance, aggregate)
    columns["loss/signal"] = signal * importance
  return total, columns


def describe(batch: Batch, columns: dict[str, Array]) -> dict[str, Array]:
  """Metrics of a whole batch: the mean over tokens of each column, and more of some.

  Args:
    batch: its `learn` says which tokens count.
    columns: f32[B, T] each: "importance", and others under the name of their metric.
  """
  mask, importance = batch.learn, columns["importance"]
  length = jnp.sum(mask, axis=1, keepdims=True)
  decile = jnp.where(mask, 10 * jnp.arange(mask.shape[1]) // jnp.maximum(length, 1), -1)
  real = mask.astype(jnp.float32)
  by_decile = {f"teacher/reverse_kl_decile_{i}":
               masked.token_mean(columns["teacher/reverse_kl"], decile == i) for i in range(10)}
  return {
      **{name: masked.token_mean(x, mask) for name, x in columns.items()
         if name != "importance"},
      "importance/max": jnp.max(jnp.where(mask, importance, 0.0)),
      "importance/effective_sample_size":
          jnp.square(jnp.sum(importance * real))
          / jnp.maximum(jnp.sum(jnp.square(importance) * real) * jnp.sum(real), 1e-9),
      "teacher/dropped_tokens": jnp.sum(batch.mask & ~mask, dtype=jnp.float32),
      **by_decile,
  }


def reverse_kl(student: Any, teacher: Any, student_params: Any, teacher_params: Any,
               batch: Batch) -> Array:
  """Exact KL(student || teacher) over the vocabulary at every response token, f32[B, T]."""
  sides = []
  for model, params in ((student, student_params), (teacher, teacher_params)):
    sides += [scorer.hidden(model, params, batch), scorer.head(model, params)]
  return fused.fused_divergence(*sides, batch.mask, "reverse_kl")[1]
