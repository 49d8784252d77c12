"""What a measurement rests on, as hashes: if one of them changes, it no longer holds.

code, config and the models it starts from; the device's kind and jax's version are added by whoever
runs it. A CPU's model is none of them: it changes the last bits, as a seed does.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import ml_collections

from opd_jax import verifiers
from opd_jax.data import builders
from opd_jax.models.source import TINY

PACKAGE = pathlib.Path(__file__).parents[1]
# Modules from which no number of a run comes: what a person sees of it, when it was asked to stop,
# what is made of its numbers later. The config is hashed as it is, complete.
APART = ("opd_jax", "opd_jax.config", "opd_jax.pipelines", "opd_jax.progress", "opd_jax.writer",
         "opd_jax.compilations", "opd_jax.preemption", "opd_jax.claims.identity",
         "opd_jax.claims.statistics")
# Their functions and classes count, but not their lists of everything there is, which grow with
# things that a run does not use: of those, the one that the config names.
LISTING = ("opd_jax.data.builders", "opd_jax.verifiers")
# What reads a run's numbers from its files.
READER = "opd_jax.claims.measured"
# Keys of a config that change nothing that is learned or measured.
FREE = ("writers", "export", "checkpoint", "evaluate_teachers", "data.cache", "verifier.workers",
        "verifier.allow_unsafe_code")
# Keys whose text may name files: their contents count.
NAMING = ("source", "base", "tokenizer", "chat_template", "rubric", "rows")
STAGE = "stage:"


def of(config: ml_collections.ConfigDict, module: str, stages: Mapping[str, str]) -> dict[str, Any]:
  """The identity of a run.

  Args:
    config: its complete config, "stage:NAME" standing for what another run leaves.
    module: of its pipeline.
    stages: name -> hash of what this stage has left.
  Raises: KeyError for a stage that is not there yet.
  """
  asked = ((verifiers.VERIFIERS[config.verifier.name].__module__,) if "verifier" in config else ())
  data = {config.data.builder, builders.evaluated(config.data)[0]}
  return {"code": code(module, READER, *(f"opd_jax.data.builders.{name}" for name in sorted(data)),
                       *asked),
          "config": settings(config), "models": dict(sorted(models(config, stages).items()))}


@functools.cache  # what this process has imported is what it runs
def code(*modules: str) -> str:
  """Hash of the code behind some modules: theirs, and that of all of opd_jax that they import.

  Of the syntax, without docstrings: a comment, a docstring or a line break does not throw away
  an hour of measurements, a changed number does. By imports and not by folder, so that neither
  does a file that has no part in them.
  """
  return digest(*(f"{name}\n{tree}" for name, tree in sorted(_trees(modules).items())))


def _trees(modules: Sequence[str]) -> dict[str, str]:
  """Modules and all of opd_jax that they import: name -> what of it counts."""
  todo, trees = list(modules), {}
  while todo:
    name = todo.pop()
    if name in trees or name in APART or not name.startswith("opd_jax"):
      continue
    if path := _file(name):
      tree = _undocumented(ast.parse(path.read_text()))
      if name in LISTING:
        tree.body = [x for x in tree.body if isinstance(x, (ast.ClassDef, ast.FunctionDef))]
      trees[name] = json.dumps(_plain(tree))
      todo += _imported(tree)
  return trees


def _file(name: str) -> pathlib.Path | None:
  """The file of a module; None of a name that is something within one."""
  path = PACKAGE.parent.joinpath(*name.split("."))
  return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()),
              None)


def _imported(tree: ast.Module) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _undocumented(tree: ast.Module) -> ast.Module:
  for node in ast.walk(tree):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
      first = node.body[0]
      if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        node.body = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 ends some with an empty text
      node.values = [x for x in node.values if not isinstance(x, ast.Constant) or x.value]
  return tree


def _plain(node: Any) -> Any:
  """A syntax tree as lists and texts, without empty fields: the same of every Python.

  ast.dump is not: fields come with a version, and whether empty ones are shown.
  """
  if isinstance(node, ast.AST):
    return [type(node).__name__, *([name, _plain(value)] for name, value in ast.iter_fields(node)
                                   if value is not None and value != [])]
  return [_plain(x) for x in node] if isinstance(node, list) else repr(node)


def settings(config: ml_collections.ConfigDict) -> str:
  """Hash of a config, without the keys that change nothing."""
  return digest(json.dumps(counting(config), sort_keys=True))


def counting(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The keys of a config that may change something, and their values."""
  return {path: value for path, value in leaves(config)
          if not any(path == free or path.startswith(f"{free}.") for free in FREE)}


def models(config: ml_collections.ConfigDict, stages: Mapping[str, str]) -> dict[str, str]:
  """What the config names on disk, or as another stage: name -> hash of its contents."""
  found = {}
  for path, value in leaves(config):
    if not isinstance(value, str) or not value:
      continue
    kind, _, name = value.partition(":")
    if kind == "stage":
      found[value] = stages[name]
    elif path.split(".")[-1] in NAMING and kind in ("tiny", "hf", "workdir"):
      found[value] = contents(TINY / name if kind == "tiny" else
                              pathlib.Path(name.removesuffix("@best")).expanduser())
    elif path.split(".")[-1] in NAMING or "builder_kw." in path:
      if os.path.exists(value):  # a template may also be the text itself
        found[value] = contents(pathlib.Path(value))
  return found


def asks(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The stages that a config starts from, or learns the rows of."""
  return tuple(dict.fromkeys(value.removeprefix(STAGE) for _, value in leaves(config)
                             if isinstance(value, str) and value.startswith(STAGE)))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Every key of a config that is no section, under its whole path, and its value."""
  for key, value in tree.items():
    if isinstance(value, ml_collections.ConfigDict) and value:
      yield from leaves(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", list(value) if isinstance(value, tuple) else (
          {} if isinstance(value, ml_collections.ConfigDict) else value)


def contents(path: pathlib.Path) -> str:
  """Hash of a file, or of the files of a folder with their names; of what is not there ""."""
  if path.is_file():
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  files = sorted(file for file in path.rglob("*") if file.is_file())
  return digest(*(f"{file.relative_to(path)} {contents(file)}" for file in files)) if files else ""


def digest(*texts: str) -> str:
  """A short hash of some texts."""
  return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
