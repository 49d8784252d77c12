"""How likely a model finds given responses: asked once, kept on disk, brought by the rows."""

from collections.abc import Sequence
import functools
import json
import math
import pathlib
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
import ml_collections

from opd_jax import keys, progress, sharding
from opd_jax.data import loader
from opd_jax.losses import masked
from opd_jax.pipelines import given
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import stages
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch


class Scored:
  """A source of whose responses one more number is known."""

  def __init__(self, source: Any, field: str, found: Sequence[dict[str, Any]]):
    self._source, self._field, self._found = source, field, found

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> loader.Row:
    row = self._source[index]
    group = [{**member, self._field: number} for member, number in
             zip(json.loads(row["group"]), self._found[index]["logprobs"], strict=True)]
    return {**row, "group": json.dumps(group)}


def of(config: ml_collections.ConfigDict, section: ml_collections.ConfigDict, field: str,
       source: Any, mesh: Mesh, workdir: str) -> Scored:
  """The rows of `source`, whose responses bring their log-probability under a model as `field`.

  It is the sum over the tokens of the response and the token that ends it, in nats, after the
  prompt in the model's own chat template; the model's tokenizer may be its own. Of a response that
  is empty, or too long for batch.buckets, it is NaN. A run that is resumed reads what it asked.

  Args:
    config: of the run; its `batch` section and loss.micro_batches say how many at a time.
    section: names the model, as `reference` does; of a `random:` source it is the student's initial
      self.
    field: the name of the number, and of the file WORKDIR/FIELDs.jsonl.
    source: rows with a `group`.
    mesh: rows are spread over its `replica` and `data` axes.
  Raises: ValueError if the workdir has numbers of other weights or rows.
  """
  key = keys.at(keys.root(config.seed), "init")
  stages.begin_with(pathlib.Path(workdir), f"weights asked for {field}",
                    lambda: policies.fingerprint(section, key))
  stages.begin_with(pathlib.Path(workdir), f"rows asked about for {field}", lambda: stages.contents(
      (row["id"], row["messages"], [x["response"] for x in json.loads(row["group"])])
      for row in (source[i] for i in range(len(source)))))

  @functools.cache
  def ask():
    policy = policies.load(section, config.model, key, mesh)
    progress.note(f"{section.source} is asked about {len(source)} rows of the data, for {field}")
    function = jax.jit(functools.partial(totals, policy.model, config.loss.micro_batches))
    return policy.tokenizer, functools.partial(function, policy.params)

  def make(start: int, stop: int) -> list[dict[str, Any]]:
    tokenizer, function = ask()
    encode = loader.encode(tokenizer)
    rows = [encode(source[i]) for i in range(start, stop)]
    texts = [[member["response"] for member in json.loads(row["group"])] for row in rows]
    found = [[math.nan] * len(group) for group in texts]
    waiting: dict[int, list[tuple[int, int, given.Member]]] = {b: [] for b in config.batch.buckets}
    for i, group in enumerate(texts):
      for j, text in enumerate(group):
        ids = [*tokenizer.encode(text), tokenizer.end_id]
        length = len(rows[i]["prompt_ids"]) + len(ids)
        if text and length <= max(config.batch.buckets):
          waiting[batches.bucket(length, config.batch.buckets)].append(
              (i, j, dict(prompt_ids=rows[i]["prompt_ids"], response_ids=ids)))
    for length, members in waiting.items():
      size = batch_rows(length, config, mesh)
      for k in range(0, len(members), size):
        part = members[k:k + size]
        asked = [member for _, _, member in part] + [None] * (size - len(part))
        batch = given.as_batch(asked, length, tokenizer.pad_id)
        values = sharding.fetch(function(sharding.put(batch, sharding.of_batch(mesh))))
        for (i, j, _), value in zip(part, values):
          found[i][j] = float(value)
    return [{"id": row["id"], "logprobs": values} for row, values in zip(rows, found)]

  path = pathlib.Path(workdir, f"{field}s.jsonl")
  return Scored(source, field, stages.rows(path, len(source), config.batch.chunk, make))


def batch_rows(length: int, config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """Rows at a time of a bucket: batch.tokens of them, as the mesh and the micro-batches divide."""
  parts = sharding.ways("batch", mesh) * config.loss.micro_batches
  return -(-loader.rows_in(length, config.batch.tokens) // parts) * parts


def totals(model: Any, parts: int, params: Any, batch: Batch) -> Array:
  """Log-probability of each whole response, f32[B], computed in `parts` parts."""
  def part(batch):
    return masked.row_sum(scorer.logprobs(model, params, batch)[0], batch.learn)
  return batches.in_parts(part, parts, batch)
