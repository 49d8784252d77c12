"""What others say of a run's own samples, at every evaluation: how likely they are, and who wins.

    eval.scores      name -> a model q: log q(y | x) of each sample y, beside the student's log p
    eval.rival.rows  another response to each prompt: how often a sample's reward is above its

Models are asked by text, so that each may have a tokenizer of its own. Means of log-probabilities
may be subtracted: of EVE's Figure 2 the implicit weak reward is E log pi_weak - E log pi_weak_ref,
the KL to the weak reference E log p - E log pi_weak_ref. Of a q that reads text as the student does
KL(p || q) is also estimated token by token, by k3, and summed over the response (Figure 9).
"""

from collections.abc import Callable, Sequence
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import distributed, keys, sharding
from opd_jax.data import builders, chat
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders import rows as made
from opd_jax.evals import run as evals
from opd_jax.losses import divergences
from opd_jax.pipelines import evaluation, given, scoring
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer

STUDENT = "student"  # under which its own log-probabilities are kept
# (params, conversations, texts) -> f32[T] of each response and its end; None where it has none.
Ask = Callable[[Any, Sequence[chat.Messages], Sequence[str]], list[np.ndarray | None]]


def make(config: ml_collections.ConfigDict, student: policies.Policy, verify: evals.Verifier,
         mesh: Mesh, workdir: str, evaluate: evaluation.Evaluate) -> evaluation.Evaluate:
  """An evaluation that also says what eval.scores and eval.rival ask for; without them, as it was.

  To its metrics are added "logprob/NAME" (mean over samples, nats a response), "k3/NAME" (the same
  of KL(student || NAME), where NAME reads text as the student does), "scored" (the share of the
  samples that have all of these: they have ended, are not empty, and fit batch.buckets for every
  model), and "win_rate", where equal rewards are half a win. WORKDIR/eval/NAME.json has the numbers
  of each sample, None where there is none.

  Args:
    config: an offline one; how many are asked at a time is as for its `scores`.
    student: whose parameters `evaluate` gets.
    verify: of the run; it rewards the rival's responses too.
    mesh, workdir: of the run.
    evaluate: samples, and leaves its records in the workdir.
  Raises: ValueError for guarded data, a model that is called "student", and a rival that answers
    other prompts.
  """
  section = config.eval
  if not section.scores and not section.rival.rows:
    return evaluate
  if builders.is_guarded(config.data):
    raise ValueError("eval.scores and eval.rival read the texts of samples from disk; of the data "
                     f"{config.data.builder!r} they may not be there; leave them empty")
  if STUDENT in section.scores:
    raise ValueError(f"eval.scores has a model called {STUDENT!r}, which is the name of who is "
                     "trained; choose another")
  rows, _ = evaluation.read_rows(config, student)
  key = keys.at(keys.root(config.seed), "init")
  others = {name: policies.load(one, config.model, key, mesh)
            for name, one in section.scores.items()}
  asks = {name: asker(config, policy, mesh) for name, policy in (
      {STUDENT: student} | others if others else {}).items()}
  comparable = [name for name, policy in others.items()
                if read_alike(student.tokenizer, policy.tokenizer)]
  rival = (rival_rewards(section.rival.rows, rows, evals.shared(verify))
           if section.rival.rows else None)

  def scored(params: Any, name: str) -> dict[str, float]:
    metrics = evaluate(params, name)
    path = pathlib.Path(workdir, "eval", f"{name}.json")
    records = distributed.of_first(lambda: json.loads(path.read_text()))["records"]
    if asks:
      whose = {STUDENT: params} | {other: policy.params for other, policy in others.items()}
      metrics |= score(rows, records, {who: lambda *said, ask=ask, held=whose[who]: ask(held, *said)
                                       for who, ask in asks.items()}, comparable)
    if rival is not None:
      for record, reward in zip(records, rival, strict=True):
        record["wins"] = [float(x > reward) + 0.5 * (x == reward) for x in record["rewards"]]
      metrics["win_rate"] = float(np.mean([record["wins"] for record in records]))
    if distributed.is_first():
      aside = path.with_suffix(".tmp")
      aside.write_text(json.dumps({"metrics": metrics, "records": records}, indent=1))
      aside.rename(path)
    return metrics

  return scored


def score(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]],
          asks: dict[str, Callable[..., Any]], comparable: Sequence[str]) -> dict[str, float]:
  """Adds "logprobs" and "k3" of every sample to the records.

  Args:
    rows: the prompts, one a record.
    records: with `texts` and `ended`.
    asks: who -> (conversations, texts) -> log-probabilities by token; "student" is among them.
    comparable: those of whom k3 is estimated.
  Returns: the metrics; NaN means of no sample.
  """
  conversations = [json.loads(row["messages"]) for row, record in zip(rows, records, strict=True)
                   for _ in record["texts"]]
  # One that did not end is no response: whoever reads its text would think that it had.
  texts = [text if ended else "" for record in records
           for text, ended in zip(record["texts"], record["ended"])]
  said = {who: ask(conversations, texts) for who, ask in asks.items()}
  there = [all(x[i] is not None and math.isfinite(x[i].sum()) for x in said.values())
           for i in range(len(texts))]
  columns = {("logprobs", who): [float(x.sum()) if ok else None for x, ok in zip(found, there)]
             for who, found in said.items()}
  columns |= {("k3", who): [k3(p, q) if ok else None
                            for p, q, ok in zip(said[STUDENT], said[who], there)]
              for who in comparable}
  start = 0
  for record in records:
    stop = start + len(record["texts"])
    for (what, who), values in columns.items():
      record.setdefault(what, {})[who] = values[start:stop]
    start = stop
  mean = lambda values: float(np.mean([x for x in values if x is not None])) if any(there) else (
      math.nan)
  return {"scored": float(np.mean(there))} | {
      f"{what.removesuffix('s')}/{who}": mean(values) for (what, who), values in columns.items()}


def k3(p: np.ndarray, q: np.ndarray) -> float:
  """KL(p || q) of one response, in nats: k3 of its tokens, summed."""
  return float(np.sum(divergences.kl_estimate(p[None], q[None], "k3")))


def asker(config: ml_collections.ConfigDict, policy: policies.Policy, mesh: Mesh) -> Ask:
  """A function that asks the model of a policy about texts, batch.tokens at a time, by bucket.

  A response is its text in the model's own tokens and the token that ends it, after the
  conversation in its own chat template. One that is empty, or too long for batch.buckets, is None.
  """
  tokenizer, buckets = policy.tokenizer, config.batch.buckets

  def part(params, batch):
    return jnp.where(batch.learn, scorer.logprobs(policy.model, params, batch)[0], 0.0)

  compiled = jax.jit(lambda params, batch: batches.in_parts(
      lambda rows: part(params, rows), config.loss.micro_batches, batch))

  def ask(params: Any, conversations: Sequence[chat.Messages],
          texts: Sequence[str]) -> list[np.ndarray | None]:
    found: list[np.ndarray | None] = [None] * len(texts)
    waiting: dict[int, list[tuple[int, given.Member]]] = {}
    for i, (messages, text) in enumerate(zip(conversations, texts, strict=True)):
      member = dict(prompt_ids=tokenizer.encode_chat(messages),
                    response_ids=[*tokenizer.encode(text), tokenizer.end_id])
      length = sum(map(len, member.values()))
      if text and length <= max(buckets):
        waiting.setdefault(batches.bucket(length, buckets), []).append((i, member))
    for length, members in sorted(waiting.items()):
      size = scoring.batch_rows(length, config, mesh)
      for start in range(0, len(members), size):
        some = members[start:start + size]
        batch = given.as_batch([member for _, member in some] + [None] * (size - len(some)), length,
                               tokenizer.pad_id)
        values = sharding.fetch(compiled(params, sharding.put(batch, sharding.of_batch(mesh))))
        for (i, member), row in zip(some, values):
          first = len(member["prompt_ids"]) - 1  # columns begin behind the row's first token
          found[i] = row[first:first + len(member["response_ids"])]
    return found

  return ask


def read_alike(one: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> bool:
  """Whether two tokenizers make the same tokens of a text."""
  try:
    tokenizers.check_same(one, other)
  except ValueError:
    return False
  return one.end_id == other.end_id


def rival_rewards(path: str, rows: Sequence[dict[str, Any]],
                  verify: evals.Verifier) -> list[float]:
  """The reward of the rival's response to each row; where it did not come to an end, of none.

  Raises: ValueError if it has none to any of them: it is of other prompts then.
  """
  known = {row["id"]: row["response"] for row in made.read(path)}
  if not any(row["id"] in known for row in rows):
    raise ValueError(f"eval.rival.rows={path!r} has no response to any of the {len(rows)} held-out "
                     f"prompts ({rows[0]['id']!r} is the first); make it of the same rows")
  return [verdict.reward for verdict in verify([known.get(row["id"], "") for row in rows],
                                               [row["answer"] for row in rows])]
