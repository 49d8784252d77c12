"""A reward model: a language model's trunk and a scalar head, fitted to pairs by Bradley and Terry.

    reward = score . (final hidden state of the token that ends the response)

`run` trains one; `load` gives it to the stages that are judged by it.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
import pathlib
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import checkpoint, progress, sharding
from opd_jax.data import builders, chat
from opd_jax.losses import masked, preference
from opd_jax.models import build as models
from opd_jax.pipelines import evaluation, given, offline, scoring
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts.batch import Batch

PAIRS = given.Objective("bradley_terry", 2, (), True)

Rewards = Callable[[Sequence[chat.Messages], Sequence[str]], np.ndarray]


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Fits the trunk `config.student` and a new head to the pairs of `config.data`.

  Raises: ValueError at the end, with everything saved, if the accuracy on held-out pairs is below
    min_accuracy.
  """
  offline.train(config, workdir, PAIRS.group_size, build)


def build(config: ml_collections.ConfigDict, student: policies.Policy, source: Any, mesh: Mesh,
          workdir: str, stack: contextlib.ExitStack) -> offline.Method:
  """What `run` hands to the loop."""
  def finish(scores: dict[str, float]) -> None:
    progress.table("result", ("", *scores), [("reward model",
                                              *(f"{v:.3f}" for v in scores.values()))])
    check_accuracy(workdir, scores["accuracy"], config.min_accuracy)

  return offline.Method(
      formula="loss = mean over pairs of -log sigmoid(r(chosen) - r(rejected))", objective=PAIRS,
      source=source, params=with_head(student.params, student.model.config.embed_dim),
      group=lambda batch, members: given.Given(
          jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), batch)),
      loss=functools.partial(loss, student.model), describe=describe,
      count=lambda learn: masked.responses(given.flat(learn)),
      evaluate=make_evaluate(config, student, mesh, workdir), export=lambda params: None,
      finish=finish)


def with_head(trunk: Any, width: int) -> Any:
  """A language model's parameters and a head f32[width] of zeros: all rewards are 0 at first."""
  return {"trunk": trunk, "score": jnp.zeros(width, jnp.float32)}


def rewards(model: Any, params: Any, batch: Batch) -> Array:
  """The reward of each response, f32[B], in nats; of rows as `given.as_batch` makes them."""
  tokens = jnp.concatenate([batch.prompt, batch.response], axis=1)
  real = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
  positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
  states, _ = model.apply({"params": params["trunk"]}, tokens, positions, real.astype(jnp.int32))
  last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
  ends = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
  return ends.astype(jnp.float32) @ params["score"]


def loss(model: Any, params: Any, pairs: given.Given,
         constants: None) -> tuple[Array, dict[str, Array]]:
  """Bradley and Terry's loss of pairs, the better response first, and the column of rewards."""
  found = rewards(model, params, given.flat(pairs.batch)).reshape(-1, 2)
  return _fit(found, pairs)[0], {"reward": found}


def _fit(found: Array, pairs: given.Given) -> tuple[Array, dict[str, Array]]:
  return preference.bradley_terry(found[:, 0], found[:, 1], jnp.any(pairs.learn, axis=(1, 2)))


def describe(pairs: given.Given, columns: dict[str, Array]) -> dict[str, Array]:
  """Metrics of a whole batch: the margin, and how often the better response leads."""
  return _fit(columns["reward"], pairs)[1]


def check_accuracy(workdir: str, accuracy: float, least: float) -> None:
  """Refuses a reward model that hardly tells the better response.

  Raises: ValueError naming the accuracy and what to do.
  """
  if accuracy < least:
    raise ValueError(f"the reward model in {workdir} is right about {accuracy:.1%} of the held-out "
                     f"pairs, and min_accuracy is {least:.1%}: its rewards say next to nothing. "
                     "Train it longer or on other pairs, or set min_accuracy=0 to go on regardless")


def last_evaluation(folder: str) -> pathlib.Path:
  """The file of a reward model's last evaluation.

  Its records have the reward of every held-out response, so that its contents tell one reward model
  from another.

  Raises: ValueError if there is none, or it is not of the last checkpoint.
  """
  found = sorted(pathlib.Path(folder, "eval").glob("step_*.json"))
  if not found:
    raise ValueError(f"{folder} is no workdir of a finished reward model: it has no evaluation")
  step, saved = int(found[-1].stem.removeprefix("step_")), checkpoint.latest(folder)
  if step != saved:
    raise ValueError(f"the reward model in {folder} was broken off: it was saved after {saved} "
                     f"updates, and evaluated after {step}; finish it with its own command")
  return found[-1]


def make_evaluate(config: ml_collections.ConfigDict, student: policies.Policy, mesh: Mesh,
                  workdir: str) -> Callable[[Any, str], dict[str, float]]:
  """(params, name) -> accuracy and margin on the first `eval.prompts` pairs of the held-out split.

  Each call leaves WORKDIR/eval/NAME.json. A pair whose rewards are equal is half right.

  Raises: ValueError if the split has too few pairs.
  """
  source = builders.open_eval(config.data)
  encode = given.encode(student.tokenizer, PAIRS, max(config.batch.buckets))
  rows = []
  for row in (encode(source[i]) for i in range(len(source))):
    if row["members"] and len(rows) < config.eval.prompts:
      rows.append(row)
  if len(rows) < config.eval.prompts:
    raise ValueError(f"the split {config.data.eval_split!r} has {len(rows)} whole pairs of at most "
                     f"{max(config.batch.buckets)} tokens (of {len(source)} rows), eval.prompts "
                     f"asks for {config.eval.prompts}")
  ask = asker(config, student, mesh)

  def evaluate(params: Any, name: str) -> dict[str, float]:
    found = ask(params, [member for row in rows for member in row["members"]]).reshape(-1, 2)
    margin = found[:, 0] - found[:, 1]
    metrics = {"accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))),
               "margin": float(margin.mean())}
    records = [{"id": row["id"], "rewards": pair.tolist()} for row, pair in zip(rows, found)]
    path = pathlib.Path(workdir, "eval", f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics, "records": records}, indent=1))
    return metrics

  return evaluate


def asker(config: ml_collections.ConfigDict, policy: policies.Policy,
          mesh: Mesh) -> Callable[[Any, Sequence[given.Member]], np.ndarray]:
  """A function (params, members) -> their rewards f32[N]; batch.tokens at a time, by bucket."""
  compiled = jax.jit(lambda params, batch: batches.in_parts(
      functools.partial(rewards, policy.model, params), config.loss.micro_batches, batch))

  def ask(params: Any, members: Sequence[given.Member]) -> np.ndarray:
    found, waiting = np.zeros(len(members), np.float32), {}
    for i, member in enumerate(members):
      length = len(member["prompt_ids"]) + len(member["response_ids"])
      waiting.setdefault(batches.bucket(length, config.batch.buckets), []).append(i)
    for length, places in sorted(waiting.items()):
      size = scoring.batch_rows(length, config, mesh)
      for start in range(0, len(places), size):
        part = places[start:start + size]
        rows = [members[i] for i in part] + [None] * (size - len(part))
        batch = given.as_batch(rows, length, policy.tokenizer.pad_id)
        values = sharding.fetch(compiled(params, sharding.put(batch, sharding.of_batch(mesh))))
        found[part] = values[:len(part)]
    return found

  return ask


def load(folder: str, config: ml_collections.ConfigDict, mesh: Mesh,
         min_accuracy: float) -> Rewards:
  """A trained reward model as a function (conversations, texts) -> rewards f32[N], in nats.

  Args:
    folder: the workdir of a run of this pipeline.
    config: of whoever asks: its `model`, `batch` and loss.micro_batches.
    mesh: where the parameters go.
    min_accuracy: on held-out pairs, below which it is refused; 0: any.
  Returns: the function; of a response longer than the largest bucket it says NaN.
  Raises: ValueError for an unfinished run, and as `check_accuracy`.
  """
  check_accuracy(folder, evaluation.read(folder, last_evaluation(folder).stem)["accuracy"],
                 min_accuracy)
  section = ml_collections.ConfigDict(dict(
      source=f"workdir:{folder}", tokenizer="", chat_template="", drop_layers_every=0, base=""))
  policy = policies.outline(section, config.model)
  boxed = models.abstract_params(policy.model.config)
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      sharding.unboxed(boxed), sharding.of_params(boxed, mesh))
  head = jax.ShapeDtypeStruct((policy.model.config.embed_dim,), jnp.float32,
                              sharding=sharding.replicated(mesh))
  params = checkpoint.restore_params(folder, {"trunk": like, "score": head})
  ask, tokenizer = asker(config, policy, mesh), policy.tokenizer

  def judge(conversations: Sequence[chat.Messages], texts: Sequence[str]) -> np.ndarray:
    members = [dict(prompt_ids=tokenizer.encode_chat(messages),
                    response_ids=[*tokenizer.encode(text), tokenizer.end_id])
               for messages, text in zip(conversations, texts, strict=True)]
    fits = np.array([len(member["prompt_ids"]) + len(member["response_ids"])
                     <= max(config.batch.buckets) for member in members], bool)
    found = np.full(len(members), np.nan, np.float32)
    found[fits] = ask(params, [member for member, fit in zip(members, fits) if fit])
    return found

  return judge
