"""Objectives of given responses: likelihood (SFT), preference (DPO), weighted likelihood (EVE).

A row of the data brings a group, the G responses to its prompt that are learned together: for SFT
its one response, for DPO the chosen and the rejected one, for EVE the K samples of a prompt. A
group is never parted: in its row of the data, in a batch [P, G, ...], or by micro-batches.
"""

from collections.abc import Callable, Sequence
import json
import math
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import ml_collections
import numpy as np

from opd_jax import config as configs
from opd_jax.data import loader
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.losses import masked, preference, supervised, weights
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch

Member = dict[str, Any]  # one response of a group: `response`, and what is known of it
REFERENCE = "reference_logprob"
# A group whose weights leave less than this share of its responses learns from a few of them.
FEW = 0.1
ALONE = 1.2  # and so does one of which a single response has nearly all of the weight


class Given(struct.PyTreeNode):
  """P groups of G responses. Every array is [P, G, ...], and micro-batches take whole groups."""

  batch: Batch
  reference: Array | None = None  # f32[P, G], log-probability of each response under the reference
  weight: Array | None = None     # f32[P, G], how much each response counts

  @property
  def learn(self) -> Array:
    """bool[P, G, T], the tokens that carry loss."""
    return self.batch.learn


class Objective(NamedTuple):
  name: str                # "sft", "dpo", "eve", or "bradley_terry" of a reward model
  group_size: int          # G
  fields: tuple[str, ...]  # numbers that each response must bring; without one finite it is dropped
  whole: bool              # whether a group that lacks a response is no group


def of(config: ml_collections.ConfigDict) -> Objective:
  """The objective of an offline config.

  Raises: ValueError for a name that does not exist, choices that do not go together, and keys
    without effect.
  """
  loss, name = config.loss, config.loss.objective
  known = {
      "sft": Objective("sft", 1, (), True),
      "dpo": Objective("dpo", 2, (REFERENCE,), True),
      "eve": Objective("eve", config.rollout.group_size, tuple(
          filter(None, loss.eve.fields)) if loss.eve.ratio else (), False),
  }
  if name not in known:
    raise ValueError(f"loss.objective is {name!r}; it must be one of {', '.join(known)}")
  default = configs.offline().loss
  for key, wanted in (("aggregate", "sft"), ("dpo", "dpo"), ("eve", "eve")):
    if name != wanted and _plain(loss[key]) != _plain(default[key]):
      raise ValueError(f"loss.{key} is {_plain(loss[key])!r}, which has no effect without "
                       f"loss.objective={wanted!r}; set that, or leave loss.{key} at "
                       f"{_plain(default[key])!r}")
  if bool(config.reference.source) != (name == "dpo"):
    raise ValueError(f"loss.objective is {name!r} and reference.source {config.reference.source!r};"
                     " DPO needs a reference (mostly what the student starts from), and the others "
                     "have no use for one; set or empty reference.source")
  if name != "sft" and (config.teacher.source or config.teachers):
    raise ValueError(f"loss.objective is {name!r}, which learns the data's own groups of "
                     "responses; a teacher's samples are learned by 'sft' alone: set "
                     "teacher.source='' and no `teachers`")
  if unread := set(config.scores) - set(known[name].fields):
    raise ValueError(f"scores names {', '.join(sorted(unread))}, which loss.objective={name!r} "
                     f"does not read; it reads {', '.join(known[name].fields) or 'no numbers'}")
  if name == "dpo" and not loss.dpo.beta > 0.0:
    raise ValueError(f"loss.dpo.beta is {loss.dpo.beta}; it must be above 0")
  if name == "eve" and (len(loss.eve.fields) != 2 or not loss.eve.fields[0]
                        or loss.eve.fields[0] == loss.eve.fields[1]):
    raise ValueError(f"loss.eve.fields is {loss.eve.fields}; it must name two fields of a response:"
                     " the log-probability wanted and the one it is compared with ('': none)")
  return known[name]


def _plain(value: Any) -> Any:
  """A section as a dict: two that hold the same may differ in what they are locked against."""
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def formula(config: ml_collections.ConfigDict, whose: str) -> str:
  """The objective in one line; `whose` responses are learned."""
  loss = config.loss
  if loss.objective == "dpo":
    smooth = loss.dpo.label_smoothing
    flipped = f" - {smooth:g} log sigmoid(-h)" if smooth else ""
    return (f"loss = mean over pairs of -{f'{1 - smooth:g} ' if smooth else ''}log sigmoid(h)"
            f"{flipped},  h = {loss.dpo.beta:g} (log(p / b)(chosen) - log(p / b)(rejected));  b: "
            f"{config.reference.source}")
  if loss.objective == "eve":
    if not loss.eve.ratio:
      return f"loss = mean over responses of -log p, of a prompt's K = {config.rollout.group_size}"
    over = " - ".join(filter(None, loss.eve.fields))
    return (f"loss = mean over responses of -F log p,  F = K softmax over a prompt's "
            f"K = {config.rollout.group_size} responses of {loss.eve.ratio:g} ({over})")
  return f"loss = {loss.aggregate}(-log p) of the responses of {whose}"


def members(row: loader.Row, objective: Objective) -> list[Member]:
  """The responses that a row brings, in the order of its data.

  Raises: ValueError naming the row if they are too few, too many, or lack what the objective
    needs to know of them.
  """
  size, who = objective.group_size, f"row {row['id']!r}"
  if not row["group"]:
    raise ValueError(f"{who} brings no `group` of responses, from which {objective.name} learns; "
                     "choose data that has them (for JSONL name their fields in data.builder_kw: "
                     "chosen and rejected, or group)")
  found = json.loads(row["group"])
  if len(found) > size or objective.whole and len(found) != size:
    wanted = (f"exactly {size}, the better one first" if objective.whole else
              f"at most rollout.group_size={size}")
    raise ValueError(f"{who} has {len(found)} responses in its `group`; {objective.name} wants "
                     f"{wanted}")
  for member in found:
    for field in objective.fields:
      if not isinstance(member.get(field), (int, float)):
        raise ValueError(f"{who}: a response of its `group` has {sorted(member)}, and "
                         f"{objective.name} needs a number in {field!r}")
  return found


def usable(member: Member, objective: Objective) -> bool:
  """Whether a response has text, and all that must be known of it is finite."""
  return bool(member["response"]) and all(math.isfinite(member[x]) for x in objective.fields)


def survey(source: Any, objective: Objective) -> dict[str, float]:
  """Reads all rows once, and counts what cannot be learned from.

  Returns: metrics "data/unusable_responses" (empty, or with a log-probability that is not finite)
    and "data/unusable_groups" (rows that they leave nothing to learn of).
  Raises: ValueError as `members`, and if there is nothing to learn from in any row.
  """
  bad, lost = 0, 0
  for i in range(len(source)):
    good = [usable(member, objective) for member in members(source[i], objective)]
    bad += good.count(False)
    lost += not (all(good) if objective.whole else any(good))
  if lost == len(source):
    raise ValueError(f"none of {lost} rows brings responses to learn from: {bad} of them are empty "
                     f"or have a {' or '.join(objective.fields) or 'number'} that is not finite")
  return {"data/unusable_responses": bad, "data/unusable_groups": lost}


def encode(tokenizer: Tokenizer, objective: Objective,
           longest: int) -> Callable[[loader.Row], loader.Row]:
  """Row -> the row with its `members`, G in number, and their greatest `length` in tokens.

  Each has prompt_ids and response_ids. In the place of one that is not usable, or longer than
  `longest`, or not there, is None; a row that has none left is as long as its prompt and `longest`.
  """
  answered, asked = loader.encode_answered(tokenizer), loader.encode(tokenizer)
  size = lambda member: len(member["prompt_ids"]) + len(member["response_ids"])

  def one(row):
    if objective.name == "sft":  # an empty response is an error there
      row = answered(row)
      return {**row, "members": [row], "length": size(row)}
    row = asked(row)
    found = [{**member, "prompt_ids": row["prompt_ids"],
              "response_ids": [*tokenizer.encode(member["response"]), tokenizer.end_id]}
             if usable(member, objective) else None for member in members(row, objective)]
    found = [member if member and size(member) <= longest else None for member in found]
    found += [None] * (objective.group_size - len(found))
    if objective.whole and None in found or not any(found):
      return {**row, "members": [], "length": longest + len(row["prompt_ids"])}
    return {**row, "members": found, "length": max(map(size, filter(None, found)))}

  return one


def as_batch(rows: Sequence[Member | None], length: int, pad_id: int) -> Batch:
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


def grouped(batch: Batch, group: Sequence[Member | None], objective: Objective,
            loss: ml_collections.ConfigDict) -> Given:
  """A batch of members as groups, with the numbers that their loss reads.

  Args:
    batch: B = P*G rows.
    group: the member behind each row, or None.
    objective: its `group_size` is G.
    loss: the `loss` section.
  """
  size = objective.group_size
  fold = lambda x: x.reshape(-1, size, *x.shape[1:])
  column = lambda field: fold(np.array([m[field] if m else 0.0 for m in group], np.float32))
  given = Given(jax.tree.map(fold, batch))
  if objective.name == "dpo":
    return given.replace(reference=column(REFERENCE))
  if objective.name == "eve":
    wanted, anchor = (column(x) if x in objective.fields else
                      np.zeros((len(group) // size, size), np.float32) for x in loss.eve.fields)
    real = fold(np.array([m is not None for m in group]))
    return given.replace(weight=weigh(wanted, anchor, real, loss.eve.ratio))
  return given


def weigh(wanted: np.ndarray, anchor: np.ndarray, real: np.ndarray, ratio: float) -> np.ndarray:
  """EVE's weights among the responses that are there.

  Args:
    wanted, anchor, ratio: as in `weights.self_normalized`, f32[P, G].
    real: bool[P, G], which responses are there.
  Returns: f32[P, G], with mean 1 over the real ones of a group, and 0 for the others.
  """
  gap = np.where(real, wanted - anchor, np.inf)
  least = gap.min(axis=1, keepdims=True)  # so none that is missing outweighs those that are there
  gap = np.where(real, gap, np.where(np.isfinite(least), least, 0.0))
  weight = np.asarray(weights.self_normalized(gap, np.zeros_like(gap), ratio)) * real
  total = weight.sum(axis=1, keepdims=True)  # 0 of a group without any
  return weight * real.sum(axis=1, keepdims=True) / np.where(total > 0.0, total, 1.0)


def flat(tree: Any) -> Any:
  """[P, G, ...] leaves -> [B, ...]."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def count(config: ml_collections.ConfigDict) -> Callable[[Array], Array]:
  """learn [P, G, T] -> the loss's denominator: of DPO too, where every response has its pair."""
  over = (masked.COUNTS[config.loss.aggregate] if config.loss.objective == "sft"
          else masked.responses)
  return lambda learn: over(flat(learn))


def loss(model: Any, config: ml_collections.ConfigDict, params: Any, given: Given,
         constants: None) -> tuple[Array, dict[str, Array]]:
  """The objective of the groups, and the columns [P, G, ...] that `describe` reads.

  Args:
    model, params: who learns.
    config: the `loss` section.
  """
  batch, shape = flat(given.batch), given.learn.shape
  logprobs, entropy = scorer.logprobs(model, params, batch)
  if config.objective == "sft":
    total, _ = supervised.sft(logprobs, batch.learn, masked.AGGREGATES[config.aggregate])
  else:
    total, _ = _of_groups(config, logprobs.reshape(shape), given)
  return total, {"loss/nll": -logprobs.reshape(shape), "student/entropy": entropy.reshape(shape)}


def _of_groups(config: ml_collections.ConfigDict, logprobs: Array,
               given: Given) -> tuple[Array, dict[str, Array]]:
  """Loss and metrics of DPO and EVE; logprobs f32[P, G, T]."""
  if config.objective == "eve":
    return supervised.weighted_sft(logprobs, given.learn, given.weight)
  sums = jax.vmap(masked.row_sum)(logprobs, given.learn)
  real = jnp.any(given.learn, axis=(1, 2))
  return preference.dpo(sums[:, 0], sums[:, 1], given.reference[:, 0], given.reference[:, 1],
                        config.dpo.beta, config.dpo.label_smoothing, real)


def describe(config: ml_collections.ConfigDict, given: Given,
             columns: dict[str, Array]) -> dict[str, Array]:
  """Metrics of a whole batch: the mean over tokens of each column, and those of the objective."""
  metrics = {name: masked.token_mean(flat(values), flat(given.learn))
             for name, values in columns.items()}
  if config.objective != "sft":
    metrics |= _of_groups(config, -columns["loss/nll"], given)[1]
  return metrics


def warning(metrics: dict[str, float], objective: Objective) -> str:
  """What a person should be told of a batch's weights, "" if nothing."""
  effective = metrics.get("loss/effective_responses", math.inf)
  if objective.group_size == 1 or effective >= max(FEW * objective.group_size, ALONE):
    return ""
  return (f"warning: EVE's weights leave {effective:.2g} effective responses of the "
          f"{objective.group_size} of a prompt: nearly all of the weight is on a few; lower "
          "loss.eve.ratio, or look at the log-probabilities in the data")
