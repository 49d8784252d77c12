"""What teachers say of the data's own responses: asked once, kept on disk, read at every step.

A cache is a folder of arrays that are mapped, not loaded. The tokens of all rows' responses lie
one after another; those of row i begin at the sum of the lengths before it.

    manifest.json   what the arrays were made from, as hashes, and K
    lengths.npy     i32[rows, 2], tokens of each row's prompt and response
    done.npy        bool[rows], which rows have been asked about
    ids.npy         i32[tokens, K], the teacher's most likely tokens, best first
    top.npy         f32[tokens, K], their log-probabilities, in nats
    own.npy         f32[tokens], log-probability of the response's own token

Rows are marked as done when their words are on the disk, so a making that was broken off goes on.
"""

from collections.abc import Iterator, Sequence
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import distributed, keys, progress, sharding
from opd_jax.data import builders, loader
from opd_jax.losses import fused
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import teachers
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch

FORMAT = 1  # of the files, and of how the words in them are computed
WORDS = ("ids", "top", "own")


class Cache(NamedTuple):
  lengths: np.ndarray           # i32[rows, 2]
  starts: np.ndarray            # i64[rows], each row's first token
  done: np.ndarray              # bool[rows]
  words: dict[str, np.ndarray]  # under the names in `WORDS`
  top_k: int                    # K of the words
  folder: str


def prepare(config: ml_collections.ConfigDict, asked: teachers.Asked, mesh: Mesh) -> Cache:
  """Opens the cache of a config, and makes it if there is none.

  Every row that fits rollout.max_prompt and max_response is asked about once, rollout.prompts rows
  at a time in loss.micro_batches parts, by one teacher after another: one is in memory at a time.

  Args:
    config: of a run on the data's responses.
    asked: from `teachers.outline`.
    mesh: rows are spread over its `replica` and `data` axes.
  Raises: ValueError if the folder holds a cache made from something else, with a smaller K, or one
    that cannot be read; if a row has no response, or its teacher does not exist; and for guarded
    data, since likely tokens tell a text.
  """
  if builders.is_guarded(config.data):
    raise ValueError(f"teacher_cache would keep tokens of the guarded data set "
                     f"{config.data.builder!r} on disk; set it to ''")
  folder = pathlib.Path(config.teacher_cache).expanduser()
  source = builders.open_source(config.data.builder, config.data.builder_kw,
                                config.data.train_split, config.data.cache)
  rows_hash, owners = read_through(source, tuple(teachers.sections(config)))
  made_from = identity(config, asked, rows_hash, len(source))
  manifest = folder / "manifest.json"
  if not manifest.is_file() or _open(config, folder, made_from)[1].any():
    if distributed.count() > 1:
      raise ValueError(f"the teacher cache {folder} is not whole, and several processes cannot "
                       "make it together; run the config in one first")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
      if not manifest.is_file():
        _create(config, asked, source, folder, made_from)
      _, missing = _open(config, folder, made_from)  # another run may have been faster
      if missing.any():
        _ask(config, asked, source, mesh, _mapped(folder, "r+"), missing, owners)
  return _open(config, folder, made_from)[0]


def recall(cache: Cache, top_k: int, batch: Batch, rows: Sequence[loader.Row]) -> Batch:
  """A batch of the data's responses with what their teachers have said of them.

  Args:
    cache: complete for these rows.
    top_k: how many of the most likely tokens to read.
    batch: prompts and responses, as numpy arrays.
    rows: its rows, from a `loader.Numbered` source.
  """
  shape = batch.response.shape
  found = dict(ids=np.zeros((*shape, top_k), np.int32), top=np.zeros((*shape, top_k), np.float32),
               own=np.zeros(shape, np.float32))
  for i, row in enumerate(rows):
    length, start = len(row["response_ids"]), cache.starts[row["index"]]
    for name, words in cache.words.items():
      said = words[start:start + length]
      found[name][i, :length] = said if name == "own" else said[:, :top_k]
  return batch.replace(teacher_logprobs=found["own"], teacher_top_ids=found["ids"],
                       teacher_top_logprobs=found["top"])


def read_through(source: Any, names: Sequence[str]) -> tuple[str, np.ndarray]:
  """A hash of what rows bring to a teacher, and the number of each row's teacher."""
  digest, owners = hashlib.sha256(), np.zeros(len(source), np.int32)
  for i in range(len(source)):
    row = source[i]
    owners[i] = loader.teacher_id(row, names)
    digest.update(_hash(row["messages"], row["response"], row["teacher"]).encode())
  return digest.hexdigest(), owners


def identity(config: ml_collections.ConfigDict, asked: teachers.Asked, rows_hash: str,
             rows: int) -> dict[str, dict[str, str]]:
  """What the words depend on: under the name it has in messages its hash, and what it is called."""
  root, tokenizer = keys.root(config.seed), asked.student.tokenizer
  template = tokenizer.hf.chat_template or ""
  sizes = [policy.model.config.vocab_size for policy in (asked.student, *asked.teachers.values())]
  made_from = {
      teachers.label(name): (
          policies.fingerprint(section, keys.at(root, "init", 1 + i)), section.source)
      for i, (name, section) in enumerate(teachers.sections(config).items())}
  made_from |= {
      "format": (_hash(FORMAT), str(FORMAT)),
      "tokenizer": (_hash(tokenizer.hf.backend_tokenizer.to_str(), tokenizer.end_id),
                    tokenizer.name),
      "chat template": (_hash(template), f"one of {len(template)} characters"),
      "data set": (rows_hash, f"{rows} rows of {config.data.builder} {config.data.train_split}"),
      "vocabulary": (_hash(sizes), " and ".join(map(str, sizes)) + " ids"),
      "compute_dtype": (_hash(config.model.compute_dtype), config.model.compute_dtype),
  }
  return {what: {"hash": digest[:16], "is": name} for what, (digest, name) in made_from.items()}


def _hash(*content: Any) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """One process at a time makes a cache; the kernel lets go of it however that one ends."""
  with (folder / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      progress.note(f"another run is making the teacher cache {folder}; waiting for it")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _create(config: ml_collections.ConfigDict, asked: teachers.Asked, source: Any,
            folder: pathlib.Path, made_from: dict[str, dict[str, str]]) -> None:
  """Empty arrays for all rows; the manifest comes last, and by a rename."""
  encode = loader.encode_answered(asked.student.tokenizer, tuple(teachers.sections(config)))
  lengths = np.array([[len(row["prompt_ids"]), len(row["response_ids"])]
                      for row in (encode(source[i]) for i in range(len(source)))], np.int32)
  tokens, top_k = int(lengths[:, 1].sum()), config.loss.top_k
  np.save(folder / "lengths.npy", lengths)
  np.save(folder / "done.npy", np.zeros(len(lengths), bool))
  for name, shape, dtype in (("ids", (tokens, top_k), np.int32),
                             ("top", (tokens, top_k), np.float32), ("own", (tokens,), np.float32)):
    path = folder / f"{name}.npy"
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
      try:  # now: a mapped file that finds the disk full kills its process
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
      except OSError as error:
        file.truncate(0)
        raise OSError(f"no room for a teacher cache of {tokens} tokens and top_k={top_k} in "
                      f"{folder}: {error}") from error
  aside = folder / "manifest.tmp"
  aside.write_text(json.dumps({"made_from": made_from, "top_k": top_k}, indent=2))
  aside.rename(folder / "manifest.json")


def _check(folder: pathlib.Path, made_from: dict[str, dict[str, str]], top_k: int) -> None:
  """Refuses a cache that was made from something else, or holds too little."""
  manifest = _manifest(folder)
  there, nothing = manifest["made_from"], {"hash": "", "is": "none"}
  say = lambda x: f"{x['is']} ({x['hash']})" if x["hash"] else x["is"]
  for what in (*made_from, *there):
    then, now = there.get(what, nothing), made_from.get(what, nothing)
    if then["hash"] != now["hash"]:
      raise ValueError(f"the teacher cache {folder} was made with another {what}: {say(then)} "
                       f"there, {say(now)} now. Name another folder in teacher_cache, to be made "
                       "there, or give the config that it was made with")
  if manifest["top_k"] < top_k:
    raise ValueError(f"the teacher cache {folder} holds the {manifest['top_k']} most likely "
                     f"tokens, and loss.top_k is {top_k}; name another folder in teacher_cache, to "
                     f"be made there, or set loss.top_k to at most {manifest['top_k']}")


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads((folder / "manifest.json").read_text())
    return {"made_from": found["made_from"], "top_k": found["top_k"]}
  except (ValueError, LookupError, TypeError) as error:
    raise _damaged(folder, error) from error


def _damaged(folder: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(f"{folder} cannot be read as a teacher cache ({error!r}); name another folder "
                    "in teacher_cache, or delete this one, and it is made again")


def _open(config: ml_collections.ConfigDict, folder: pathlib.Path,
          made_from: dict[str, dict[str, str]]) -> tuple[Cache, np.ndarray]:
  """A cache that is the right one, and bool[rows]: which it lacks of those that fit."""
  _check(folder, made_from, config.loss.top_k)
  cache = _mapped(folder, "r")  # numpy would lengthen a file that was cut off, were it writable
  fits = cache.lengths <= (config.rollout.max_prompt, config.rollout.max_response)
  return cache, fits.all(axis=1) & ~cache.done


def _mapped(folder: pathlib.Path, mode: str) -> Cache:
  try:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode)
              for name in ("lengths", "done", *WORDS)}
  except (OSError, ValueError, EOFError) as error:
    raise _damaged(folder, error) from error
  lengths, done = arrays.pop("lengths"), arrays.pop("done")
  starts = np.cumsum(lengths[:, 1], dtype=np.int64) - lengths[:, 1]
  return Cache(lengths, starts, done, arrays, arrays["ids"].shape[1], str(folder))


def _ask(config: ml_collections.ConfigDict, asked: teachers.Asked, source: Any, mesh: Mesh,
         cache: Cache, missing: np.ndarray, owners: np.ndarray) -> None:
  """Fills in the words of the rows that are missing, one teacher after another."""
  # Rows of similar length together, so that they fit small buckets.
  order = np.lexsort((cache.lengths[:, 0], cache.lengths[:, 1]))
  for i, (name, section) in enumerate(teachers.sections(config).items()):
    rows = order[(missing & (owners == i))[order]]
    if len(rows):
      progress.note(f"{teachers.label(name)} is asked about {len(rows)} rows of the data, for the "
                    f"cache {cache.folder}")
      teacher = teachers.load_one(config, section, asked.teachers[name], 1 + i, mesh)
      ask = jax.jit(functools.partial(words, teacher.model, asked.student.model.config.vocab_size,
                                      cache.top_k, config.loss.micro_batches))
      for start in range(0, len(rows), config.rollout.prompts):
        part = rows[start:start + config.rollout.prompts]
        batch = jax.device_put(_batch(config, asked, source, part), sharding.of_batch(mesh))
        _keep(cache, part, jax.device_get(ask(teacher.params, batch)))
      del teacher  # before the next comes


def words(model: nn.Module, vocabulary: int, top_k: int, parts: int, params: Any,
          batch: Batch) -> dict[str, Array]:
  """What a model says of given responses: ids, top and own, as in the head of this file.

  The most likely tokens are those of the first `vocabulary` ids, which student and teacher share.
  """
  def part(batch):
    states = scorer.hidden(model, params, batch)
    own, _ = scorer.token_logprobs(model, params, states, batch.response)
    ids, top = fused.fused_topk(states, scorer.head(model, params)[:, :vocabulary], top_k)
    return dict(ids=ids, top=top, own=own)

  return batches.in_parts(part, parts, batch)


def _batch(config: ml_collections.ConfigDict, asked: teachers.Asked, source: Any,
           part: np.ndarray) -> Batch:
  """Some rows of the data as a batch of rollout.prompts; the last row fills it up."""
  tokenizer, rollout = asked.student.tokenizer, config.rollout
  encode = loader.encode_answered(tokenizer, tuple(teachers.sections(config)))
  rows = [encode(source[int(i)]) for i in part]
  rows += [rows[-1]] * (rollout.prompts - len(rows))
  batch = batches.prompts([row["prompt_ids"] for row in rows], 1, policies.buckets(rollout),
                          tokenizer.pad_id)
  return batches.answered(batch, [row["response_ids"] for row in rows],
                          (*rollout.response_buckets, rollout.max_response), tokenizer.pad_id)


def _keep(cache: Cache, part: np.ndarray, found: dict[str, np.ndarray]) -> None:
  for j, i in enumerate(part):
    start, length = cache.starts[i], cache.lengths[i, 1]
    for name, kept in cache.words.items():
      kept[start:start + length] = found[name][j, :length]
  for kept in cache.words.values():  # on the disk before they count as done
    kept.flush()
  cache.done[part] = True
  cache.done.flush()
