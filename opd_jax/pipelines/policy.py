"""Policy: a model, its parameters and its tokenizer, loaded from one config section."""

from collections.abc import Callable, Mapping
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from opd_jax import distributed, sharding
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import build, hf_config, source, surgery
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import engine
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.rollouts.slots import Settings


class Policy(NamedTuple):
  model: nn.Module
  params: Any  # None in an outline
  tokenizer: tokenizers.Tokenizer


def load(section: ml_collections.ConfigDict, model: ml_collections.ConfigDict, key: jax.Array,
         mesh: Mesh, tokenizer: tokenizers.Tokenizer | None = None) -> Policy:
  """Loads what a `student`, `teacher` or `reference` section names.

  Args:
    section: source, tokenizer, chat_template, drop_layers_every, base, alpha.
    model: compute_dtype, remat.
    key: draws the weights of a `random:` source.
    mesh: the parameters are born sharded on it.
    tokenizer: used instead of one from disk (a tokenizer trained in this run).
  Raises: ValueError for a source without a tokenizer, or with fewer embeddings than tokens, and
    for a base of another shape.
  """
  loaded = source.load(section.source, key, mesh, section.drop_layers_every)
  if section.base:
    base = source.load(section.base, key, mesh, section.drop_layers_every)
    loaded = loaded._replace(params=surgery.extrapolate(
        loaded.params, loaded.config, base.params, base.config, section.alpha))
  return _policy(loaded, section, model, tokenizer)


def outline(section: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> Policy:
  """What `load` gives, but for the parameters: nothing large is read."""
  return _policy(source.outline(section.source, section.drop_layers_every), section, model, None)


def fingerprint(section: ml_collections.ConfigDict, key: jax.Array) -> str:
  """A hash of everything that decides the parameters that `load` gives."""
  made = [source.fingerprint(section.source, key), section.drop_layers_every]
  if section.base:
    made += [source.fingerprint(section.base, key), section.alpha]
  return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _policy(loaded: source.Loaded, section: ml_collections.ConfigDict,
            model: ml_collections.ConfigDict, tokenizer: tokenizers.Tokenizer | None) -> Policy:
  if tokenizer is None:
    folder = section.tokenizer or loaded.tokenizer_folder
    if not folder:
      raise ValueError(f"the model source {section.source!r} brings no tokenizer; name a folder "
                       "with tokenizer.json in the section's `tokenizer`")
    tokenizer = tokenizers.load(folder, section.chat_template)
  if tokenizer.vocab_size > loaded.config.vocab_size:
    raise ValueError(f"the tokenizer in {tokenizer.name} has {tokenizer.vocab_size} tokens, the "
                     f"model {section.source!r} only {loaded.config.vocab_size} embeddings")
  module = build.build(loaded.config, jnp.dtype(model.compute_dtype), model.remat)
  return Policy(module, loaded.params, tokenizer)


def match(student: Policy,
          others: Mapping[str, Policy]) -> tuple[Policy, dict[str, Policy], list[str]]:
  """Makes sure that all policies speak of the same ids, without padding that only some have.

  A model's vocabulary is often padded beyond its tokenizer's, by another amount in each size
  of a family. All are cut to the smallest, but no model below its own tokenizer.

  Args:
    student: the policy trained.
    others: teachers and reference, under the names that messages call them by.
  Returns: the student, the others, and notices for the user.
  Raises: ValueError if tokenizers differ, or if one of the others lacks ids of the student's.
  """
  notices = []
  for name, other in others.items():
    notices += tokenizers.check_same(student.tokenizer, other.tokenizer)
    size = other.model.config.vocab_size
    if student.tokenizer.vocab_size > size:
      raise ValueError(
          f"the student's tokenizer ({student.tokenizer.name}) has {student.tokenizer.vocab_size} "
          f"tokens, the {name} only {size} embeddings, so it could not read all of them; set "
          f"student.tokenizer to the {name}'s folder, or choose another {name}")
  sizes = lambda: [policy.model.config.vocab_size for policy in (student, *others.values())]
  before = sizes()
  smallest = min(before)
  fit = lambda policy: cut(policy, max(smallest, policy.tokenizer.vocab_size))
  student, others = fit(student), {name: fit(other) for name, other in others.items()}
  if sizes() != before:
    named = (f"{size} ({name})" for size, name in zip(before, ("student", *others)))
    notices.append(f"vocabularies of {' and '.join(named)} ids are padded differently: cut to "
                   + " and ".join(map(str, sizes())))
  return student, others, list(dict.fromkeys(notices))


def cut(policy: Policy, size: int) -> Policy:
  """The policy without the ids from `size` on."""
  if size == policy.model.config.vocab_size:
    return policy
  params, config = surgery.slice_vocab(policy.params, policy.model.config, size)
  return policy._replace(model=policy.model.clone(config=config), params=params)


def describe(policy: Policy, workdir: str) -> None:
  """Leaves the model's shape and tokenizer in `workdir/model`: what a checkpoint lacks."""
  if not distributed.is_first():
    return
  folder = pathlib.Path(workdir) / "model"
  folder.mkdir(parents=True, exist_ok=True)
  policy.tokenizer.save(folder)
  raw = hf_config.to_hf(policy.model.config, "float32")
  raw["eos_token_id"] = list(policy.tokenizer.eos_ids)
  (folder / "config.json").write_text(json.dumps(raw, indent=2))


def check_lengths(policy: Policy, name: str, rollout: ml_collections.ConfigDict) -> None:
  """Refuses prompts and responses that together exceed what the model allows."""
  allowed = policy.model.config.max_positions
  total = rollout.max_prompt + rollout.max_response
  if total > allowed:
    raise ValueError(
        f"rollout.max_prompt + rollout.max_response is {rollout.max_prompt} + "
        f"{rollout.max_response} = {total} tokens, but the {name} allows {allowed}; shorten one")


def check_rows(what: str, rows: int, mesh: Mesh, parts: int = 1) -> None:
  """Refuses a batch that the mesh, or the micro-batches on it, cannot divide.

  Args:
    what: the keys that make `rows`, as the user wrote them.
    rows: of the whole batch.
    mesh: whose devices, but for its `model` axis, take equal shares of each part.
    parts: number of micro-batches.
  Raises: ValueError naming the keys, the mesh and a number that would do.
  """
  devices = sharding.ways("batch", mesh)
  named = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in sharding.axes(sharding.RULES["batch"])
                     if axis == "data" or mesh.shape[axis] > 1)
  if rows % (devices * parts):
    raise ValueError(
        f"{what} = {rows} rows cannot be spread over mesh {named} devices"
        + (f" in loss.micro_batches={parts} parts" if parts > 1 else "")
        + f"; make it a multiple of {devices * parts}")


def buckets(rollout: ml_collections.ConfigDict) -> tuple[int, ...]:
  """The lengths that prompts are padded to."""
  return (*rollout.prompt_buckets, rollout.max_prompt)


def settings(tokenizer: tokenizers.Tokenizer, rollout: ml_collections.ConfigDict,
             sampling: Sampling) -> Settings:
  """What the engine needs to know, from the `rollout` section."""
  return Settings(
      max_response=rollout.max_response, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
      vocab_size=tokenizer.vocab_size, sampling=sampling, slots=rollout.slots,
      chunk=rollout.decode_chunk, kv_dtype=rollout.kv_dtype, buckets=buckets(rollout))


def make_sampler(model: nn.Module, tokenizer: tokenizers.Tokenizer,
                 rollout: ml_collections.ConfigDict,
                 sampling: Sampling) -> Callable[..., Batch]:
  """A function (params, Batch of prompts, key, stop) -> the Batch with its responses.

  Args:
    model, tokenizer: of the policy.
    rollout: the `rollout` section: max_response, both buckets, slots, decode_chunk, kv_dtype.
    sampling: how tokens are drawn.
  Returns: the function; of its responses' columns there are as many as the smallest bucket that
    holds the longest, so that scoring and learning do not compute on padding.
  Raises: ValueError for settings that the engine does not know.
  """
  generate = engine.make(model, settings(tokenizer, rollout, sampling))
  widths = (*rollout.response_buckets, rollout.max_response)

  def sample(params: Any, batch: Batch, key: jax.Array,
             stop: Callable[[], bool] = lambda: False) -> Batch:
    found = generate(params, sharding.fetch(batch.prompt), sharding.fetch(batch.prompt_mask), key,
                     stop=stop)
    width = batches.bucket(int(found.mask.sum(axis=1).max()), widths)
    found = jax.tree.map(lambda x: x[:, :width], found)
    spread = getattr(batch.prompt, "sharding", None)  # a numpy prompt is on no mesh
    found = sharding.put(found, spread) if spread else jax.device_put(found)
    return batch.replace(**found._asdict())
  return sample


def texts(tokenizer: tokenizers.Tokenizer, batch: Batch) -> list[str]:
  """The responses of a batch as text."""
  response, mask = sharding.fetch(batch.response), sharding.fetch(batch.mask)
  return [tokenizer.decode(ids[real].tolist()) for ids, real in zip(response, mask)]
