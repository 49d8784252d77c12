"""What a run descends: a signal, a weight and a surrogate, each chosen by its name in `loss`.

    surrogate(logprobs, signal * weight, mask)

Signals and weights are functions (p, batch, loss) -> f32[B, T] of the student's own
log-probabilities p (stopped, and 0 where nothing is learned), the scored batch and the section.
"""

from typing import Any

import jax.numpy as jnp
import ml_collections

from opd_jax import config as configs
from opd_jax.losses import divergences, fused, masked, signals, weights
from opd_jax.pipelines import teachers


def _g_opd(p, batch, loss):
  if loss.lam == 1.0:  # the reference cancels, and is not asked
    return signals.opd(p, batch.teacher_logprobs)
  return signals.g_opd(p, batch.teacher_logprobs, batch.reference_logprobs, loss.lam)


# Learn from a verifier's rewards, and from no teacher: of responses compared, or of each.
COMPARED = ("group_advantage", "dpo", "simpo")
REWARDED = (*COMPARED, "verified")
SIGNALS = {
    "opd": lambda p, batch, loss: signals.opd(p, batch.teacher_logprobs),
    "g_opd": _g_opd,
    **{name: lambda p, batch, loss: jnp.broadcast_to(batch.advantage[:, None], p.shape)
       for name in REWARDED},
}
# Are losses of given responses, with the aggregate that makes them so: not of what the student
# would sample, so no importance weight belongs to them.
GIVEN = {"dpo": "sequence_sum", "simpo": "sequence_mean", "verified": ""}
WEIGHTS = {
    "uniform": lambda p, batch, loss: jnp.ones_like(p),
    "iw_opd": lambda p, batch, loss: weights.iw_opd(p, batch.teacher_logprobs, batch.learn,
                                                    **loss.iw_opd),
    "position": lambda p, batch, loss: jnp.where(
        weights.position(batch.mask, **loss.position), 1.0, 0.0),
}
SURROGATES = ("score_function", "clipped", *divergences.KINDS)


def asks_teacher(loss: ml_collections.ConfigDict) -> bool:
  """Whether learning needs a teacher's log-probabilities; a verifier's rewards do not."""
  return loss.signal not in REWARDED or loss.weight == "iw_opd"


def asks_reference(loss: ml_collections.ConfigDict) -> bool:
  """Whether learning needs the reference's log-probabilities."""
  return ((loss.signal == "g_opd" and loss.lam != 1.0) or loss.signal == "dpo"
          or loss.reference_kl > 0.0)


def has_ratio(loss: ml_collections.ConfigDict) -> bool:
  """Whether a ratio to the student before a batch's first update can be anything but 1."""
  return loss.surrogate == "clipped" and loss.updates_per_batch > 1


def asks_old(loss: ml_collections.ConfigDict) -> bool:
  """Whether learning needs the log-probabilities of the student before a batch's first update."""
  return has_ratio(loss) or loss.signal in ("dpo", "simpo")


def weighs_importance(loss: ml_collections.ConfigDict) -> bool:
  """Whether tokens weigh what they are worth to the present student, of what was sampled."""
  if loss.surrogate in divergences.KINDS:
    return loss.divergence_importance
  return loss.signal not in GIVEN


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses names that do not exist, choices that do not go together, and keys without effect.

  Raises: ValueError naming the keys, what they are and what to do.
  """
  loss = config.loss
  for key, value, known in (
      ("signal", loss.signal, SIGNALS), ("weight", loss.weight, WEIGHTS),
      ("surrogate", loss.surrogate, SURROGATES), ("aggregate", loss.aggregate, masked.AGGREGATES),
      ("position.side", loss.position.side, ("prefix", "suffix"))):
    if value not in known:
      raise ValueError(f"loss.{key} is {value!r}; it must be one of {', '.join(known)}")
  for key, (counts, wanted) in _conditions(config).items():
    value, default = _plain(config, key), _plain(configs.on_policy(), key)
    if not counts and value != default:
      raise ValueError(f"{key} is {value!r}, which has no effect without {wanted}; set that, or "
                       f"leave {key} at {default!r}")
  if asks_reference(loss) and not config.reference.source:
    key, without = next((key, without) for key, needed, without in (
        ("reference_kl", loss.reference_kl, 0), ("signal", loss.signal == "dpo", "simpo"),
        ("lam", True, 1)) if needed)
    raise ValueError(f"loss.{key} is {loss[key]}, which needs a reference, and reference.source "
                     "is ''; name one (the student's own source: its initial weights), or set "
                     f"loss.{key}={without}")
  if asks_teacher(loss) and not teachers.sections(config) and "context" not in config:
    raise ValueError(f"loss.signal={loss.signal!r}, loss.weight={loss.weight!r} learn from a "
                     "teacher, and there is none; set teacher.source, or `teachers` by name")
  if loss.signal in COMPARED and config.rollout.group_size == 1:
    raise ValueError(f"loss.signal={loss.signal!r} compares the responses of a prompt, and "
                     "rollout.group_size is 1: nothing would be learned; set it to 2 or more")
  if loss.signal in GIVEN and loss.surrogate not in divergences.KINDS:
    _check_given(loss)
  if config.student_share < 1.0 and loss.surrogate not in divergences.KINDS:
    raise ValueError(f"student_share is {config.student_share:g}, but loss.surrogate="
                     f"{loss.surrogate!r} learns from the student's own samples alone; set "
                     f"student_share=1, or loss.surrogate to one of {', '.join(divergences.KINDS)}")
  if config.student_share < 1.0 and loss.reference_kl:
    raise ValueError(f"student_share is {config.student_share:g} and loss.reference_kl "
                     f"{loss.reference_kl:g}, but that KL is estimated from the student's own "
                     "samples alone; set student_share=1 or loss.reference_kl=0")
  if config.student_share < 1.0 and config.rollout.group_size > 1:
    raise ValueError(f"student_share is {config.student_share:g}, but the data have one response "
                     f"a prompt and rollout.group_size is {config.rollout.group_size}; set it to 1")
  if config.teacher_cache:
    _check_cache(config)


def _check_given(loss: ml_collections.ConfigDict) -> None:
  """Refuses what would make a loss of given responses another one."""
  for key, found, wanted in (
      ("surrogate", loss.surrogate, "score_function"),
      ("aggregate", loss.aggregate, GIVEN[loss.signal] or loss.aggregate),
      ("weight", loss.weight, "uniform"),
      ("updates_per_batch", loss.updates_per_batch, 1)):
    if found != wanted:
      raise ValueError(f"loss.signal={loss.signal!r} is a loss of whole responses only with "
                       f"loss.{key}={wanted!r}, found {found!r}; set that")


def _check_cache(config: ml_collections.ConfigDict) -> None:
  """Refuses a cache of what cannot be known ahead."""
  loss, cache = config.loss, f"teacher_cache is {config.teacher_cache!r}"
  if config.student_share == 1.0:
    raise ValueError(f"{cache} and student_share is 1, but only of the data's responses can a "
                     "teacher be asked ahead; set student_share below 1, or teacher_cache=''")
  if loss.top_k == 0 or loss.top_of != "teacher":
    raise ValueError(f"{cache}, which keeps a teacher's K most likely tokens, but loss.top_k is "
                     f"{loss.top_k} and loss.top_of {loss.top_of!r}; set loss.top_k=K (not 0, the "
                     "whole vocabulary) and loss.top_of='teacher', or teacher_cache=''")


def _conditions(config: ml_collections.ConfigDict) -> dict[str, tuple[bool, str]]:
  """For keys that do not always count: whether they do, and what they would need."""
  loss = config.loss
  over_vocabulary = loss.surrogate in divergences.KINDS
  sampled = (not over_vocabulary, "loss.surrogate='score_function' or 'clipped'")
  vocabulary = over_vocabulary, "loss.surrogate=" + " or ".join(map(repr, divergences.KINDS))
  top = (over_vocabulary and loss.top_k > 0, "loss.top_k > 0")
  return {
      "loss.signal": sampled,
      "loss.importance_cap": (weighs_importance(loss), "a loss that weighs by importance: "
                              f"{sampled[1]}, or loss.divergence_importance"),
      "loss.divergence_importance": vocabulary,
      "loss.lam": (loss.signal == "g_opd", "loss.signal='g_opd'"),
      "loss.normalize_std": (loss.signal == "group_advantage", "loss.signal='group_advantage'"),
      "loss.dpo": (loss.signal == "dpo", "loss.signal='dpo'"),
      "loss.simpo": (loss.signal == "simpo", "loss.signal='simpo'"),
      "loss.success_at": (loss.signal == "verified", "loss.signal='verified'"),
      "loss.iw_opd": (loss.weight == "iw_opd", "loss.weight='iw_opd'"),
      "loss.position": (loss.weight == "position", "loss.weight='position'"),
      "loss.clipped": (has_ratio(loss), "loss.surrogate='clipped' and loss.updates_per_batch > 1"),
      "loss.beta": (loss.surrogate == "jsd", "loss.surrogate='jsd'"),
      "loss.top_k": vocabulary,
      "loss.top_of": top,
      "loss.tail": top,
      # At lam = 1 it cancels; a sweep over lam may pass there.
      "reference.source": (asks_reference(loss) or loss.signal == "g_opd",
                           "loss.signal='g_opd' or 'dpo', or loss.reference_kl > 0"),
  }


def _plain(config: ml_collections.ConfigDict, key: str) -> Any:
  for name in key.split("."):
    config = config[name]
  return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config


def check_divergence(loss: ml_collections.ConfigDict, vocabulary: int) -> None:
  """Refuses settings of the distribution-level losses that have no meaning."""
  if loss.surrogate in divergences.KINDS:
    divergences.check_kind(loss.surrogate, loss.beta)
    fused.check_top(loss.top_k, loss.top_of, loss.tail, vocabulary)


def formula(config: ml_collections.ConfigDict) -> str:
  """Everything in force, as one line.

  p is the student as it is now, p_old as it was before a batch's first update, mu as it sampled;
  q its teacher, b the reference.
  """
  loss = config.loss
  terms, where = _surrogate(loss)
  if loss.surrogate not in divergences.KINDS:
    where.append("A = " + _signal(loss, config.rollout.group_size))
  factors = ["g"] * (loss.weight != "uniform")
  if weighs_importance(loss):
    then = "p_old" if has_ratio(loss) else "p"
    factors.append(f"min({then} / mu, {loss.importance_cap:g})")
  where.append("w = " + (" ".join(factors) or "1"))
  if loss.weight != "uniform":
    where.append("g = " + _weight(loss))
  if loss.reference_kl:
    terms += f" + {loss.reference_kl:g} k3"
    where.append("k3 = b / p - 1 - log(b / p)")
  if loss.updates_per_batch > 1:
    where.append(f"{loss.updates_per_batch} updates a batch")
  if config.student_share < 1.0:
    where.append(f"{100 * config.student_share:g}% of the batches the student's own, the others "
                 "the data's")
  asked = [f"{name} {section.source}".strip()
           for name, section in teachers.sections(config).items() if asks_teacher(loss)]
  who = [f"q: {' or '.join(asked)}"] * bool(asked)
  who += [f"b: {config.reference.source}"] * asks_reference(loss)
  return ",  ".join([f"loss = {loss.aggregate}({terms})", *where]) + "".join(f";  {x}" for x in who)


def _surrogate(loss: ml_collections.ConfigDict) -> tuple[str, list[str]]:
  if loss.surrogate == "score_function":
    return "-A w log p", []
  if loss.surrogate == "clipped" and not has_ratio(loss):
    return "-r A w", ["r = p / sg(p)"]
  if loss.surrogate == "clipped":
    low, high, dual = 1 - loss.clipped.low, 1 + loss.clipped.high, loss.clipped.dual
    bound = f"; at most -{dual:g} A w where A < 0" if dual else ""
    return f"max(-r A w, -clip(r, {low:g}, {high:g}) A w){bound}", ["r = p / p_old"]
  names = {"forward_kl": "KL(q || p)", "reverse_kl": "KL(p || q)",
           "jsd": f"JSD_{loss.beta:g}(q, p)"}
  tokens = (f"the {loss.top_of}'s top {loss.top_k} tokens, tail {loss.tail}" if loss.top_k
            else "the vocabulary")
  return f"w {names[loss.surrogate]} over {tokens}", []


def _signal(loss: ml_collections.ConfigDict, group_size: int) -> str:
  if loss.signal == "group_advantage":
    scale = " / (std R + 1e-6)" if loss.normalize_std else ""
    return f"(R - mean R){scale} over a prompt's {group_size} responses"
  if loss.signal in ("dpo", "simpo"):
    h, over = ((f"{loss.dpo.beta:g} log(p / b)", "") if loss.signal == "dpo" else
               (f"{loss.simpo.beta:g} log p", f" - {loss.simpo.margin:g}"))
    each = "" if loss.signal == "dpo" else " a token"
    return (f"-d/d(log p) of mean -log sigmoid(h(better) - h(worse){over}), h = {h}{each}, over "
            f"all pairs of a prompt's {group_size} responses")
  if loss.signal == "verified":
    return f"1 where R >= {loss.success_at:g}, nothing elsewhere"
  if loss.signal == "g_opd" and loss.lam != 1.0:
    return f"{loss.lam:g} (log q - log b) - (log p - log b)"
  return "log q - log p"


def _weight(loss: ml_collections.ConfigDict) -> str:
  if loss.weight == "position":
    part = "first" if loss.position.side == "prefix" else "last"
    return f"1 in the {part} {100 * loss.position.fraction:g}% of a response, 0 elsewhere"
  gap = "log q - log p" if loss.iw_opd.signed else "|log q - log p|"
  mean = " over its mean in the response" if loss.iw_opd.unit_mean else ""
  return (f"1 + {loss.iw_opd.max_weight - 1:g} clip(1 - F, 0, 1){mean},  "
          f"F_t = sum_(k<t) d_k / sum_k d_k,  d = {gap}")
