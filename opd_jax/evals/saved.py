"""Saved evaluations of a run, read back as groups: a prompt, its responses and their rewards."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any, NamedTuple

from opd_jax.data import builders, chat


class Group(NamedTuple):
  """What a policy answered to one prompt."""

  id: str                  # of the data's row
  prompt: chat.Messages    # the conversation up to the response
  answer: str              # the ground truth
  responses: list[str]
  rewards: list[float]     # in [0, 1], of which 1 is a success
  ended: list[bool]        # False: cut off by the length limit


def names(workdir: str) -> list[str]:
  """The evaluations that a run has left: "step_000000", "step_000200", "teacher"."""
  return sorted(path.stem for path in pathlib.Path(workdir, "eval").glob("*.json"))


def last(workdir: str) -> str:
  """The name of the last evaluation of who was trained, or of the only one that there is.

  Raises: ValueError if there is none.
  """
  found = names(workdir)
  if not found:
    raise ValueError(f"{workdir} has no evaluation; name the workdir of a run that evaluates")
  return max((name for name in found if name.startswith("step_")), default=found[-1])


def read(workdir: str, name: str) -> list[Group]:
  """The groups of one evaluation, in the order of the data.

  Records hold the ids of prompts and not their text, which for guarded data may not be kept: the
  text is that of the data set that config.json names.

  Args:
    workdir: of any run that evaluates.
    name: one of `names`.
  Raises: ValueError if there is no such evaluation, no config, or the records have no texts or
    name rows that the data set has not.
  """
  folder = pathlib.Path(workdir)
  path = folder / "eval" / f"{name}.json"
  if not path.is_file():
    found = ", ".join(names(workdir)) or "none"
    raise ValueError(f"{workdir} has no evaluation {name!r}; there are: {found}")
  records = json.loads(path.read_text())["records"]
  if bare := [record["id"] for record in records if "texts" not in record]:
    raise ValueError(f"{path} has no texts of {len(bare)} prompts ({bare[0]!r} is the first); "
                     "those of guarded data are not kept")
  asked = rows(folder, [record["id"] for record in records])
  return [Group(record["id"], json.loads(row["messages"]), row["answer"], record["texts"],
                record["rewards"], record["ended"]) for record, row in zip(records, asked)]


def rows(workdir: str | pathlib.Path, ids: Sequence[str]) -> list[dict[str, Any]]:
  """The rows of these ids of the data set on which a run was evaluated, in this order.

  Raises: ValueError if the workdir has no config, or the data set lacks some of them.
  """
  folder = pathlib.Path(workdir)
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"{folder} has no config.json, which says where the prompts are from; name "
                     "the workdir of a run")
  data = json.loads(path.read_text())["data"]
  source = builders.open_eval(data)
  wanted, found = set(ids), {}
  for i in range(len(source)):
    row = source[i]
    if row["id"] in wanted:
      found[row["id"]] = row
    if len(found) == len(wanted):
      return [found[one] for one in ids]
  missing = sorted(wanted - found.keys())
  raise ValueError(f"the split {data['eval_split']!r} of {builders.evaluated(data)[0]!r} "
                   f"lacks {len(missing)} of the {len(wanted)} rows evaluated in {folder} "
                   f"({missing[0]!r} is the first); the data has changed since")
