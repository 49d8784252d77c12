"""Who is asked: the teachers and the reference of a config, and the teacher that each row names."""

from collections.abc import Callable, Sequence
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections

from opd_jax import keys, sharding
from opd_jax.data import builders, loader
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.policy import Policy

Ask = Callable[[Any, Sequence[Any]], Any]  # (carry, params) -> carry


class Asked(NamedTuple):
  student: Policy                # as given, or cut to the ids that all share
  teachers: dict[str, Policy]    # by name; {"": ...} for one without a name
  reference: Policy | None
  notices: list[str]             # what the user should know


def sections(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """The teachers' sections by name: those of `teachers`, or the one `teacher` under ""."""
  if "teachers" in config and config.teachers:
    return dict(config.teachers)
  return {"": config.teacher} if "teacher" in config and config.teacher.source else {}


def label(name: str) -> str:
  """What a teacher is called where it is measured."""
  return f"teacher {name}".strip()


def outline(config: ml_collections.ConfigDict, student: Policy, reference: bool) -> Asked:
  """Every teacher, and the reference if it is needed, without their parameters.

  Raises: ValueError if one does not speak the student's language, or takes too few tokens.
  """
  others = {label(name): policies.outline(section, config.model)
            for name, section in sections(config).items()}
  if reference:
    others["reference"] = policies.outline(config.reference, config.model)
  for name, policy in others.items():
    policies.check_lengths(policy, name, config.rollout)
  student, others, notices = policies.match(student, others)
  if config.reference.source and not reference:
    notices.append(f"the reference, {config.reference.source}, is not asked: the loss has no use "
                   "for it")
  anchor = others.pop("reference", None)
  return Asked(student, dict(zip(sections(config), others.values())), anchor, notices)


def load(config: ml_collections.ConfigDict, asked: Asked, mesh: Mesh) -> Asked:
  """Those of an outline with their parameters, in the memory that teacher_memory says.

  A reference is drawn as the student was: of the same `random:` source it is its initial self.
  """
  def whole(section, outlined, draw):
    policy = load_one(config, section, outlined, draw, mesh)
    if config.teacher_memory == "host":  # before the next one comes
      policy = policy._replace(params=jax.block_until_ready(sharding.to_host(policy.params)))
    return policy

  named = {name: whole(section, asked.teachers[name], 1 + i)
           for i, (name, section) in enumerate(sections(config).items())}
  anchor = asked.reference and whole(config.reference, asked.reference, 0)
  return asked._replace(teachers=named, reference=anchor)


def load_one(config: ml_collections.ConfigDict, section: ml_collections.ConfigDict,
             outlined: Policy, draw: int, mesh: Mesh) -> Policy:
  """One of an outline with its parameters, on the device.

  Args:
    section: its own.
    draw: which weights of a `random:` source: 0 the student's, 1 + i those of teacher i.
  """
  key = keys.at(keys.root(config.seed), "init", draw)
  policy = policies.load(section, config.model, key, mesh, outlined.tokenizer)
  return policies.cut(policy, outlined.model.config.vocab_size)


def at_once(function: Ask, params: Sequence[Any], carry: Any) -> Any:
  """Asks everyone in one call of `function`: all parameters are on the device."""
  return function(carry, params)


def in_turn(function: Ask, params: Sequence[Any], carry: Any) -> Any:
  """Asks one after another: parameters wait on the host, and one tree of them is on the device.

  It costs a copy of all of them at every call, and the caller waits until the last has answered.

  Args:
    function: (carry, params) -> carry; each call has None in the place of all params but one.
    params: trees in host memory; None for one who is not asked at all.
    carry: what the first call is given.
  Returns: the carry of the last call, computed.
  """
  for i in [i for i, held in enumerate(params) if held is not None] or [0]:
    here = [None] * len(params)
    here[i] = sharding.to_device(params[i])
    carry = jax.block_until_ready(function(carry, tuple(here)))
    del here  # before the next comes
  return carry


MEMORY = {"device": at_once, "host": in_turn}
# Keys of data.builder_kw that give rows the names of teachers; rows that a stage has made may have
# them anyway.
NAMING = ("teacher", "teachers", "route")


def check_names(config: ml_collections.ConfigDict) -> None:
  """Refuses a config with teachers under two keys, and rows that name none of its teachers.

  Raises: ValueError naming the key, or the row.
  """
  if config.teachers and config.teacher.source:
    raise ValueError(f"both `teachers` ({', '.join(config.teachers)}) and teacher.source "
                     f"({config.teacher.source!r}) are set; set teacher.source='' or no `teachers`")
  for name in config.teachers:
    if not re.fullmatch(r"[\w-]+", name):
      raise ValueError(f"`teachers` has the name {name!r}, and files are named after it; use "
                       "letters, digits, '_' and '-' alone")
  data, names = config.data, tuple(sections(config))
  named = lambda builder, settings: builder == "rows" or any(map(settings.get, NAMING))
  if not config.teachers and not named(data.builder, data.builder_kw) and not (
      named(data.eval_builder, data.eval_builder_kw)):
    return  # the rows have no names, and large data need not be read through
  for source in (builders.open_source(data.builder, data.builder_kw, data.train_split, data.cache),
                 builders.open_eval(data)):
    for i in range(len(source)):
      loader.teacher_id(source[i], names)
