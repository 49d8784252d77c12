"""Who is asked: the teachers and the reference of a config, and the teacher that each row names."""

import re
from typing import NamedTuple

from jax.sharding import Mesh
import ml_collections

from opd_jax import keys
from opd_jax.data import builders, loader
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.policy import Policy


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


def load(config: ml_collections.ConfigDict, student: Policy, reference: bool, mesh: Mesh) -> Asked:
  """Loads every teacher, and the reference if it is needed.

  A reference is drawn as the student was: of the same `random:` source it is its initial self.

  Raises: ValueError if one does not speak the student's language, or takes too few tokens.
  """
  root = keys.root(config.seed)
  others = {label(name): policies.load(section, config.model, keys.at(root, "init", 1 + i), mesh)
            for i, (name, section) in enumerate(sections(config).items())}
  if reference:
    others["reference"] = policies.load(config.reference, config.model, keys.at(root, "init"), mesh)
  for name, policy in others.items():
    policies.check_lengths(policy, name, config.rollout)
  student, others, notices = policies.match(student, others)
  if config.reference.source and not reference:
    notices.append(f"the reference, {config.reference.source}, is not asked: the loss has no use "
                   "for it")
  anchor = others.pop("reference", None)
  return Asked(student, dict(zip(sections(config), others.values())), anchor, notices)


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
  if not config.teachers and not {"teacher", "teachers"} & set(data.builder_kw):
    return  # the rows have no names, and large data need not be read through
  for split in (data.train_split, data.eval_split):
    source = builders.open_source(data.builder, data.builder_kw, split, data.cache)
    for i in range(len(source)):
      loader.teacher_id(source[i], names)
