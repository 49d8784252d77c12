"""The functions of a run, built from shapes: one function a pipeline, in the order of a step."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from opd_jax import keys, train_state
from opd_jax.aot.report import Report, shape
from opd_jax.data import loader
from opd_jax.losses import divergences
from opd_jax.models import build, decoding, surgery
from opd_jax.models.configs import NAMED, REPOSITORIES, of_repository
from opd_jax.models.layers import KVCache
from opd_jax.pipelines import given, in_context, objective, offline, on_policy, opd, scoring
from opd_jax.pipelines import teachers
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.policy import Policy
from opd_jax.rollouts import engine, slots
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.teachers import contexts


class Tokens(NamedTuple):
  """What a run asks of a tokenizer that is not here, as far as shapes depend on it."""

  vocab_size: int
  eos_ids: tuple[int, ...] = (0,)
  pad_id: int = 0


def outline(section: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> Policy:
  """Who a section names, without parameters; of a model that is not here, its shape by its name.

  Raises: ValueError for one that is neither here nor known.
  """
  kind, _, name = section.source.partition(":")
  known = NAMED.get(name) if kind == "random" else of_repository(name) if kind == "hf" else None
  try:
    return policies.outline(section, model)
  except (ValueError, OSError) as error:
    if known is None:
      raise ValueError(
          f"{section.source!r} is not here ({error}), and its shape is not known by that name. "
          f"Name one that is: hf: with {', '.join(REPOSITORIES)}; or random: with a key of "
          "models/configs.py NAMED") from None
  if section.drop_layers_every:
    _, known = surgery.drop_layers(None, known, section.drop_layers_every)
  module = build.build(known, jnp.dtype(model.compute_dtype), model.remat)
  return Policy(module, None, Tokens(known.vocab_size))


def asked(config: ml_collections.ConfigDict) -> teachers.Asked:
  """Student, teachers and reference, with the ids that all share, as by `teachers.outline`."""
  student = outline(config.student, config.model)
  others = {teachers.label(name): outline(section, config.model)
            for name, section in teachers.sections(config).items()}
  if objective.asks_reference(config.loss):
    others["reference"] = outline(config.reference, config.model)
  if any(isinstance(policy.tokenizer, Tokens) for policy in (student, *others.values())):
    least = min(policy.model.config.vocab_size for policy in (student, *others.values()))
    student = policies.cut(student, least)
    others = {name: policies.cut(policy, least) for name, policy in others.items()}
  else:
    student, others, _ = policies.match(student, others)
  for name, policy in {"student": student, **others}.items():
    policies.check_lengths(policy, name, config.rollout)
  anchor = others.pop("reference", None)
  named = dict(zip(teachers.sections(config), others.values()))
  return teachers.Asked(student, named, anchor, [])


def parameters(policy: Policy, report: Report) -> Any:
  return build.shapes(policy.model.config, report.mesh)


def hold_state(config: ml_collections.ConfigDict, student: Policy, report: Report,
               updates: int) -> tuple[train_state.TrainState, Any]:
  """The state of training, held from now on, and its optimizer."""
  optimizer = train_state.make_optimizer(config.optimizer, updates)
  state = train_state.shapes(parameters(student, report), optimizer, config.ema.rate > 0,
                             report.mesh)
  report.held |= {"student": state.params, "optimizer": state.opt_state}
  if state.ema is not None:
    report.held["EMA"] = jax.tree.map(lambda x: x, state.ema)
  return state, optimizer


def rollout(report: Report, who: str, policy: Policy, params: Any,
            section: ml_collections.ConfigDict, sampling: Any, rows: int, calls: float) -> None:
  """The engine's functions: read prompts, fill slots, decode, and make the cache wider.

  Responses are taken to be as long as they may, so that all slots and columns are in use.

  Args:
    who: speaks.
    params: its parameters.
    section: the `rollout` section.
    rows: of a call of the engine.
    calls: of these in a step.
  """
  model, group = policy.model, section.group_size
  settings = policies.settings(policy.tokenizer, section, Sampling(
      sampling.temperature, sampling.top_k, sampling.top_p))
  steps = slots.compiled(model, settings)
  count, length, widest = engine.extent(settings, rows, section.max_prompt)
  prompts = -(-count // group)  # read at a time
  turns = math.ceil(rows / count)  # how often a slot is filled
  chunks = calls * turns * math.ceil((settings.max_response - 1) / settings.chunk)
  layer, head = decoding.compiled(model)

  copied = report.add(f"{who}: weights of a layer", layer, params["blocks"], 0,
                      times=calls * model.config.num_layers)
  top = report.add(f"{who}: weights of the head", head, params, times=calls)
  blocks = {f"layer_{i}": copied for i in range(model.config.num_layers)}
  report.held["decoding weights"] = blocks, top
  weights = params | {"blocks": blocks, "head": top}

  ids = np.zeros((prompts, section.max_prompt), np.int32)

  def read() -> slots.Block:
    return report.add(f"{who}: prefill of {prompts} prompts", steps.prefill, params, ids, ids > 0,
                      length=length, times=calls * turns)

  def empty() -> KVCache:
    return report.add(f"{who}: empty cache of {count} slots", steps.empty, rows=count,
                      width=widest, times=calls)

  if turns > 1:  # all prompts but the first ones are read while the cache lies there
    report.held["KV cache"] = cache = empty()
    report.held["read prompts"] = block = read()
  else:
    report.held["read prompts"] = block = read()
    report.held["KV cache"] = cache = empty()
  state = lambda dtype=np.int32: np.zeros(count, dtype)
  held = slots.Rows(state(), state(), state(), state(), state(bool))
  key = jax.eval_shape(lambda: keys.root(0))
  token = jax.ShapeDtypeStruct((count,), np.int32)
  layer = report.add(f"{who}: fill slots, a layer", slots.placed, cache.layers[0], block.layers[0],
                     state(), state(bool), section.max_prompt,
                     times=calls * turns * model.config.num_layers)
  first = jax.jit(functools.partial(slots.begin, decoding.unrolled(model), settings))
  ids, token, _ = report.add(f"{who}: first tokens", first, weights, cache.segment_ids, token,
                             block.mask, block.hidden, state(), state(bool), held,
                             section.max_prompt, key, times=calls * turns)
  cache = cache.replace(layers=(layer,) * model.config.num_layers, segment_ids=ids)
  report.held["KV cache"] = cache
  del report.held["read prompts"]
  # From a narrower one; of the same width at the most.
  report.add(f"{who}: widen a layer of the cache", slots.moved, cache.layers[0], 0, width=widest,
             axis=2, times=calls * model.config.num_layers)
  report.add(f"{who}: decode {settings.chunk} steps", steps.decode, weights, cache, token, held,
             section.max_prompt, settings.chunk, key, length=length, times=chunks,
             turns=settings.chunk)
  del report.held["decoding weights"], report.held["KV cache"]


def batch_of(report: Report, rows: int, prompt: int, response: int, **more: Any) -> Batch:
  """A batch as it lies on the mesh; `more` are dtypes of further arrays [B, T]."""
  put = lambda dtype, *dims: shape(report.mesh, (rows, *dims), dtype, "data")
  return Batch(put(np.int32, prompt), put(bool, prompt), put(np.int32, response),
               put(bool, response), **{name: put(dtype, response) for name, dtype in more.items()})


class Run(NamedTuple):
  """A run of pipelines/opd.py before its first step."""

  who: teachers.Asked
  state: train_state.TrainState
  optimizer: Any
  params: dict[str, Any]  # of teachers and reference, by their names in the report
  heads: Any              # of the teachers, for a loss over the vocabulary


def on_policy_distillation(config: ml_collections.ConfigDict, report: Report) -> None:
  """pipelines/opd.py: rollout, score, grade, update."""
  run = begin(config, report)
  sample(config, run, report)
  learn(config, run, report)


def begin(config: ml_collections.ConfigDict, report: Report) -> Run:
  """What lies on the devices from the start."""
  objective.check(config)
  who = asked(config)
  state, optimizer = hold_state(config, who.student, report,
                                config.total_steps * config.loss.updates_per_batch)
  others = {teachers.label(name): policy for name, policy in who.teachers.items()}
  if who.reference:
    others["reference"] = who.reference
  params = {name: parameters(policy, report) for name, policy in others.items()}
  heads = None
  if config.loss.surrogate in divergences.KINDS:
    heads = tuple(report.add(f"{name}: head", jax.jit(functools.partial(opd.head, policy.model)),
                             params[name], times=0.0)
                  for name, policy in others.items() if name != "reference")
    report.held["teachers' heads"] = heads
  if config.teacher_memory == "device":
    report.held |= params
  return Run(who, state, optimizer, params, heads)


def sample(config: ml_collections.ConfigDict, run: Run, report: Report) -> None:
  """A step's rollout."""
  section = config.rollout
  rows = section.prompts * section.group_size
  rollout(report, "student", run.who.student, run.state.params, section, section, rows, 1.0)


def learn(config: ml_collections.ConfigDict, run: Run, report: Report) -> None:
  """A step's scoring and its updates."""
  section, loss, who = config.rollout, config.loss, run.who
  rows = section.prompts * section.group_size
  policies.check_rows("rollout.prompts x rollout.group_size", rows, report.mesh,
                      loss.micro_batches)
  batch = batch_of(report, rows, section.max_prompt, section.max_response,
                   sampler_logprobs=np.float32)
  if len(who.teachers) > 1:
    batch = batch.replace(teacher_id=shape(report.mesh, (rows,), np.int32, "data"))
  report.held["batch"] = batch
  ask = opd.make_score(config, who)
  asks = objective.asks_teacher(loss)
  every = [run.params[teachers.label(name)] if asks else None for name in who.teachers]
  every.append(run.params.get("reference"))
  if config.teacher_memory == "device":
    batch = report.add("score", ask, run.state.params, tuple(every[:-1]), every[-1], batch)
  else:
    names = [*map(teachers.label, who.teachers), "reference"]
    for here in (i for i, tree in enumerate(every) if tree is not None):
      one = [tree if i == here else None for i, tree in enumerate(every)]
      batch = report.add(f"score by {names[here]}", ask, run.state.params, tuple(one[:-1]),
                         one[-1], batch)
  report.held["batch"] = batch
  if loss.signal in objective.REWARDED:
    batch = batch.replace(reward=shape(report.mesh, (rows,), np.float32, "data"))
    batch = report.add("grade", jax.jit(functools.partial(opd.grade, config)), batch)
    report.held["batch"] = batch
  update = on_policy.make_update(config, opd.make_loss(config, who.student), opd.describe,
                                 run.optimizer, run.state)
  report.add("update", update, run.state, batch, run.heads, times=loss.updates_per_batch)


def critiques(config: ml_collections.ConfigDict, report: Report) -> None:
  """pipelines/opcd.py; a step: one round of rollout.prompts questions, an update on triples."""
  section, loss = config.rollout, config.loss
  rows = section.prompts * section.group_size
  policies.check_rows("rollout.prompts x rollout.group_size", rows, report.mesh)
  policies.check_rows("triples", config.triples, report.mesh, loss.micro_batches)
  student = outline(config.student, config.model)
  in_context.check_lengths(config, student)
  state, optimizer = hold_state(config, student, report, 1)
  itself = student, state.params
  cast = {}
  for name in ("critic", "judge"):
    if config[name].source:
      policy = outline(config[name], config.model)
      cast[name] = policy, parameters(policy, report)
      report.held[name] = cast[name][1]
  change = lambda **new: ml_collections.ConfigDict(section.to_dict() | dict(group_size=1) | new)
  longer = dict(max_prompt=config.context.budget, prompt_buckets=tuple(config.context.buckets))
  rollout(report, "student answers", *itself, section, section, rows, 1.0)
  if config.control != "none":
    rollout(report, "critic", *cast.get("critic", itself),
            change(**longer, max_response=config.critique.max_response), config.critique, rows, 1.0)
  rollout(report, "student refines", *itself, change(**longer), config.refine, rows, 1.0)

  batch = batch_of(report, config.triples, section.max_prompt, section.max_response, learn=bool)
  if loss.surrogate in divergences.KINDS:
    batch, heads = read_behind(config, student.model, state.params, batch, report)
  else:
    batch = batch.replace(advantage=shape(report.mesh, (config.triples,), np.float32, "data"))
    heads = None
  report.held["batch"] = batch
  update = on_policy.make_update(config, opd.make_loss(config, student), opd.describe, optimizer,
                                 state)
  report.add("update", update, state, batch, heads)


def read_behind(config: ml_collections.ConfigDict, model: Any, params: Any, batch: Batch,
                report: Report) -> tuple[Batch, tuple[Any]]:
  """The teacher, the student itself before the epoch's updates, reads behind the longest contexts.

  Returns: the batch with what it said, and its head.
  """
  report.held["student at the epoch's beginning"] = jax.tree.map(lambda x: x, params)
  start, hear, whole = in_context.compiled(model, True)
  head = report.add("teacher's head", jax.jit(functools.partial(in_context.heads, model)), params,
                    times=0.0)
  report.held |= {"teacher's head": head, "batch": batch}
  rows, columns = batch.response.shape
  width = in_context.widths(config.context)[-1]
  block = contexts.block_rows(config.context.tokens or rows * (width + columns), width, columns,
                              report.mesh.shape["data"])
  put = lambda dtype, *dims: shape(report.mesh, (block, *dims), dtype, "data")
  found = report.add("blank answers of the teacher", start, params, batch)
  found = report.add(
      f"teacher reads {block} rows", hear, params, found, batch,
      contexts.Block(put(np.int32), put(np.int32, width), put(bool, width)),
      times=math.ceil(rows / block))
  gained = shape(report.mesh, (rows,), bool, "data")
  return report.add("teacher's words", whole, batch, found, gained), (head,)


def given_responses(config: ml_collections.ConfigDict, report: Report) -> None:
  """pipelines/offline.py: who is asked about the data, an update on the longest bucket."""
  student, objective = outline(config.student, config.model), given.of(config)
  size, group = max(config.batch.buckets), objective.group_size
  rows = loader.rows_in(size, config.batch.tokens // group) * group
  learner = {"student": parameters(student, report)}  # it is there before anyone is asked
  policies.check_rows(f"batch.tokens // {group} responses // bucket = {config.batch.tokens} // "
                      f"{group} // {size}", rows // group, report.mesh, config.loss.micro_batches)
  for name, section in teachers.sections(config).items():
    policy = outline(section, config.model)
    params = parameters(policy, report)
    report.held = learner | {teachers.label(name): params}
    sampled = config.rollout.prompts * config.rollout.group_size
    rollout(report, teachers.label(name), policy, params, config.rollout, config.rollout, sampled,
            1.0)
  for name, section in (*config.scores.items(), *[("reference", config.reference)] * bool(
      config.reference.source)):
    policy = outline(section, config.model)
    params = parameters(policy, report)
    report.held = learner | {name: params}
    asked = scoring.batch_rows(size, config, report.mesh)
    report.add(f"{name} of {asked} rows", jax.jit(functools.partial(
        scoring.totals, policy.model, config.loss.micro_batches)), params,
        batch_of(report, asked, 1, size - 1, learn=bool), times=rows / asked)
  report.held = {}
  state, optimizer = hold_state(config, student, report, config.total_steps)
  grouped = lambda *dims: (rows // group, group, *dims)
  batch = jax.tree.map(lambda x: shape(report.mesh, grouped(*x.shape[1:]), x.dtype, "data"),
                       batch_of(report, rows, 1, size - 1, learn=bool))
  column = shape(report.mesh, grouped(), np.float32, "data")
  batch = given.Given(batch, reference=column if objective.name == "dpo" else None,
                      weight=column if objective.name == "eve" else None)
  report.held["batch"] = batch
  report.add("update", offline.make_update(
      config, functools.partial(given.loss, student.model, config.loss),
      functools.partial(given.describe, config.loss), given.count(config), optimizer, state),
      state, batch, None)


PIPELINES: dict[str, Callable[[ml_collections.ConfigDict, Report], None]] = {
    "opd": on_policy_distillation, "opcd": critiques, "sft": given_responses,
}
