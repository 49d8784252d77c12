"""The functions of a run, built from shapes: of each pipeline its parts, in the order of a step."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from opd_jax import keys, sharding, train_state
from opd_jax.aot.report import Report, shape
from opd_jax.data import loader
from opd_jax.losses import divergences
from opd_jax.models import build, decoding, surgery
from opd_jax.models.configs import NAMED, REPOSITORIES, of_repository
from opd_jax.models.layers import KVCache
from opd_jax.pipelines import (given, in_context, judge, objective, offline, on_policy, opcd, opd,
                               scoring, teachers)
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.policy import Policy
from opd_jax.rollouts import engine, slots
from opd_jax.rollouts.batch import Batch
from opd_jax.rollouts.sampler import Sampling
from opd_jax.teachers import contexts


WORD = 2  # tokens of a judge's word at the most; its tokenizer may not be here


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
  put = lambda dtype, *dims: shape(report.mesh, (rows, *dims), dtype, "batch")
  return Batch(put(np.int32, prompt), put(bool, prompt), put(np.int32, response),
               put(bool, response), **{name: put(dtype, response) for name, dtype in more.items()})


class Parts(NamedTuple):
  """The parts of a pipeline. What `begin` finds out, the others are told."""

  begin: Callable[[ml_collections.ConfigDict, Report], Any]
  sample: Callable[[ml_collections.ConfigDict, Any, Report], None]    # rollouts
  learn: Callable[[ml_collections.ConfigDict, Any, Report], None]     # asking teachers, updates
  evaluate: Callable[[ml_collections.ConfigDict, Any, Report], None]  # what else is computed


def compile_all(config: ml_collections.ConfigDict, report: Report) -> None:
  """All functions of a run, added to the report."""
  parts = PIPELINES[config.pipeline]
  run = parts.begin(config, report)
  for part in parts[1:]:
    part(config, run, report)


def learned(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Rows of a batch, which loss.micro_batches divides, and the responses of each."""
  if config.pipeline == "sft":
    group = given.of(config).group_size
    return loader.rows_in(max(config.batch.buckets), config.batch.tokens // group), group
  section = config.rollout
  return (config.triples if config.pipeline == "opcd" else
          section.prompts * section.group_size), 1


class Distillation(NamedTuple):
  """A run of pipelines/opd.py before its first step."""

  who: teachers.Asked
  state: train_state.TrainState
  optimizer: Any
  params: dict[str, Any]  # of teachers and reference, by their names in the report
  heads: Any              # of the teachers, for a loss over the vocabulary


def begin_distillation(config: ml_collections.ConfigDict, report: Report) -> Distillation:
  """pipelines/opd.py: what lies on the devices from the start."""
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
  return Distillation(who, state, optimizer, params, heads)


def sample_responses(config: ml_collections.ConfigDict, run: Distillation, report: Report) -> None:
  """A step's rollout."""
  section = config.rollout
  rows = section.prompts * section.group_size
  rollout(report, "student", run.who.student, run.state.params, section, section, rows, 1.0)


def distill(config: ml_collections.ConfigDict, run: Distillation, report: Report) -> None:
  """A step's scoring and its updates."""
  section, loss, who = config.rollout, config.loss, run.who
  rows = section.prompts * section.group_size
  policies.check_rows("rollout.prompts x rollout.group_size", rows, report.mesh,
                      loss.micro_batches)
  batch = routed(batch_of(report, rows, section.max_prompt, section.max_response,
                          sampler_logprobs=np.float32), run, report)
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
    batch = batch.replace(reward=shape(report.mesh, (rows,), np.float32, "batch"))
    batch = report.add("grade", jax.jit(functools.partial(opd.grade, config)), batch)
    report.held["batch"] = batch
  update = on_policy.make_update(config, opd.make_loss(config, who.student), opd.describe,
                                 run.optimizer, run.state)
  report.add("update", update, run.state, batch, run.heads, times=loss.updates_per_batch)
  del report.held["batch"]


def routed(batch: Batch, run: Distillation, report: Report) -> Batch:
  """The batch with each row's teacher, if there are several."""
  if len(run.who.teachers) < 2:
    return batch
  return batch.replace(teacher_id=shape(report.mesh, (batch.mask.shape[0],), np.int32, "batch"))


def evaluate_distillation(config: ml_collections.ConfigDict, run: Distillation,
                          report: Report) -> None:
  """Exact divergences from the teachers; evaluations sample as steps do."""
  if not run.who.teachers:
    return
  section = config.rollout
  batch = routed(batch_of(report, config.eval.batch * config.eval.samples, section.max_prompt,
                          section.max_response, sampler_logprobs=np.float32), run, report)
  report.held["batch"] = batch
  models = tuple(policy.model for policy in run.who.teachers.values())
  gap = opd.make_gap(config, run.who.student, models)
  names = list(map(teachers.label, run.who.teachers))
  together = config.teacher_memory == "device"
  for names_here in [names] if together else [[name] for name in names]:
    report.add("evaluation: KL from " + " and ".join(names_here), gap, run.state.params,
               tuple(run.params[name] if name in names_here else None for name in names), batch,
               times=0.0)
  del report.held["batch"]


class Critiques(NamedTuple):
  """A run of pipelines/opcd.py before its first epoch."""

  student: Policy
  state: train_state.TrainState
  optimizer: Any
  cast: dict[str, tuple[Policy, Any]]  # critic and judge, where they are not the student


def begin_critiques(config: ml_collections.ConfigDict, report: Report) -> Critiques:
  """pipelines/opcd.py; a step is one round of rollout.prompts questions, an update on triples."""
  student = outline(config.student, config.model)
  in_context.check_lengths(config, student)
  state, optimizer = hold_state(config, student, report, 1)
  cast = {}
  for name in ("critic", "judge"):
    if config[name].source:
      policy = outline(config[name], config.model)
      cast[name] = policy, parameters(policy, report)
      report.held[name] = cast[name][1]
  return Critiques(student, state, optimizer, cast)


def talk(config: ml_collections.ConfigDict, run: Critiques, report: Report) -> None:
  """Answers, critiques, refinements."""
  section = config.rollout
  rows = section.prompts * section.group_size
  policies.check_rows("rollout.prompts x rollout.group_size", rows, report.mesh)
  itself = run.student, run.state.params
  change = lambda **new: ml_collections.ConfigDict(section.to_dict() | dict(group_size=1) | new)
  longer = dict(max_prompt=config.context.budget, prompt_buckets=tuple(config.context.buckets))
  rollout(report, "student answers", *itself, section, section, rows, 1.0)
  if config.control != "none":
    rollout(report, "critic", *run.cast.get("critic", itself),
            change(**longer, max_response=config.critique.max_response), config.critique, rows, 1.0)
  rollout(report, "student refines", *itself, change(**longer), config.refine, rows, 1.0)


def judge_critiques(config: ml_collections.ConfigDict, run: Critiques, report: Report) -> None:
  """What the judge says; evaluations sample as the answers are sampled."""
  rows = config.rollout.prompts * config.rollout.group_size
  if config.rubric:
    policy, params = run.cast.get("judge", (run.student, run.state.params))
    cases, words = opcd.cases(config, report.mesh), len(judge.WORDS)
    batch = batch_of(report, cases * words, in_context.widths(config.context)[-1], WORD)
    report.add(f"judge of {cases} cases", jax.jit(functools.partial(
        judge.word_logprobs, policy.model)), params, batch, times=math.ceil(rows / cases))


def learn_critiques(config: ml_collections.ConfigDict, run: Critiques, report: Report) -> None:
  """The teacher reads behind the critiques; an update."""
  section, loss = config.rollout, config.loss
  policies.check_rows("triples", config.triples, report.mesh, loss.micro_batches)
  batch = batch_of(report, config.triples, section.max_prompt, section.max_response, learn=bool)
  if loss.surrogate in divergences.KINDS:
    batch, heads = read_behind(config, run.student.model, run.state.params, batch, report)
  else:
    batch = batch.replace(advantage=shape(report.mesh, (config.triples,), np.float32, "batch"))
    heads = None
  report.held["batch"] = batch
  update = on_policy.make_update(config, opd.make_loss(config, run.student), opd.describe,
                                 run.optimizer, run.state)
  report.add("update", update, run.state, batch, heads)


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
  block = in_context.at_a_time(config.context, rows, columns,
                               sharding.ways("batch", report.mesh))(width)
  put = lambda dtype, *dims: shape(report.mesh, (block, *dims), dtype, "batch")
  found = report.add("blank answers of the teacher", start, params, batch)
  found = report.add(
      f"teacher reads {block} rows", hear, params, found, batch,
      contexts.Block(put(np.int32), put(np.int32, width), put(bool, width)),
      times=math.ceil(rows / block))
  gained = shape(report.mesh, (rows,), bool, "batch")
  return report.add("teacher's words", whole, batch, found, gained), (head,)


class Given(NamedTuple):
  """A run of pipelines/offline.py."""

  student: Policy
  learner: dict[str, Any]  # its parameters: they are there before anyone is asked


def begin_given(config: ml_collections.ConfigDict, report: Report) -> Given:
  """pipelines/offline.py; a step is an update on the longest bucket."""
  student = outline(config.student, config.model)
  return Given(student, {"student": parameters(student, report)})


def ask_teachers(config: ml_collections.ConfigDict, run: Given, report: Report) -> None:
  """Teachers answer a data set."""
  for name, section in teachers.sections(config).items():
    policy = outline(section, config.model)
    params = parameters(policy, report)
    report.held = run.learner | {teachers.label(name): params}
    sampled = config.rollout.prompts * config.rollout.group_size
    rollout(report, teachers.label(name), policy, params, config.rollout, config.rollout, sampled,
            1.0)


def learn_given(config: ml_collections.ConfigDict, run: Given, report: Report) -> None:
  """Who is asked how likely responses are, and an update."""
  objective, size = given.of(config), max(config.batch.buckets)
  groups, group = learned(config)
  policies.check_rows(f"batch.tokens // {group} responses // bucket = {config.batch.tokens} // "
                      f"{group} // {size}", groups, report.mesh, config.loss.micro_batches)
  for name, section in (*config.scores.items(), *[("reference", config.reference)] * bool(
      config.reference.source)):
    policy = outline(section, config.model)
    params = parameters(policy, report)
    report.held = run.learner | {name: params}
    asked = scoring.batch_rows(size, config, report.mesh)
    report.add(f"{name} scores {asked} rows", jax.jit(functools.partial(
        scoring.totals, policy.model, config.loss.micro_batches)), params,
        batch_of(report, asked, 1, size - 1, learn=bool), times=groups * group / asked)
  report.held = {}
  state, optimizer = hold_state(config, run.student, report, config.total_steps)
  grouped = lambda *dims: (groups, group, *dims)
  batch = jax.tree.map(lambda x: shape(report.mesh, grouped(*x.shape[1:]), x.dtype, "batch"),
                       batch_of(report, groups * group, 1, size - 1, learn=bool))
  column = shape(report.mesh, grouped(), np.float32, "batch")
  batch = given.Given(batch, reference=column if objective.name == "dpo" else None,
                      weight=column if objective.name == "eve" else None)
  report.held["batch"] = batch
  report.add("update", offline.make_update(
      config, functools.partial(given.loss, run.student.model, config.loss),
      functools.partial(given.describe, config.loss), given.count(config), optimizer, state),
      state, batch, None)
  del report.held["batch"]


def evaluate_given(config: ml_collections.ConfigDict, run: Given, report: Report) -> None:
  """The student samples: nothing else of a step does."""
  section = ml_collections.ConfigDict(config.rollout.to_dict() | dict(
      group_size=config.eval.samples))
  rollout(report, "evaluation", run.student, report.held["student"], section, config.eval,
          config.eval.batch * config.eval.samples, 0.0)


PIPELINES: dict[str, Parts] = {
    "opd": Parts(begin_distillation, sample_responses, distill, evaluate_distillation),
    "opcd": Parts(begin_critiques, talk, learn_critiques, judge_critiques),
    "sft": Parts(begin_given, ask_teachers, learn_given, evaluate_given),
}
