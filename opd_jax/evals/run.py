"""Sampling, verifying and counting: mean@k, pass@k and the reverse KL to a teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from opd_jax import distributed, keys, sharding
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.evals import metrics
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts.batch import Batch

Sampler = Callable[[Any, Batch, jax.Array], Batch]          # (params, prompts, key) -> rollout
Verifier = Callable[[Sequence[str], Sequence[str]], list[Any]]  # (texts, answers) -> verdicts
ReverseKL = Callable[[Any, Batch], jax.Array]               # (params, rollout) -> f32[B, T] nats


def evaluate(config: ml_collections.ConfigDict, rows: Sequence[dict[str, Any]], params: Any,
             sample: Sampler, tokenizer: Tokenizer, verify: Verifier, buckets: Sequence[int],
             reverse_kl: ReverseKL | None = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Evaluates one policy on fixed prompts with fixed keys, so that two policies are paired.

  Args:
    config: the `eval` section: batch, samples (n), ks, seed.
    rows: data rows with `prompt_ids` and `answer`, and `teacher_id` if there are several.
    params: the policy's parameters, handed to `sample` and `reverse_kl`.
    sample: fills in response, mask and sampler_logprobs of a Batch of prompts.
    verify: texts and answers -> verdicts.
    buckets: prompt lengths to pad to.
    reverse_kl: per-token KL(student, teacher) on the student's own responses.
  Returns: metrics {"mean@8": ..., "pass@8": ..., "length": ..., "truncated": ...} and one
    record a prompt: id, level, domain (the teacher that its row names, or else its task), texts,
    whether each ended, rewards, and its reverse KL in nats per token.
  """
  key = keys.at(keys.root(config.seed), "eval")
  samples, records = config.samples, []
  for start in range(0, len(rows), config.batch):
    part = list(rows[start:start + config.batch])
    filler = [part[-1]] * (config.batch - len(part))  # one shape for all; the copies are dropped
    prompts = batches.prompts([row["prompt_ids"] for row in part + filler], samples, buckets,
                              tokenizer.pad_id,
                              [row.get("teacher_id", 0) for row in part + filler])
    rollout = sample(params, prompts, jax.random.fold_in(key, start))
    kl = None if reverse_kl is None else sharding.fetch(reverse_kl(params, rollout))
    response, mask = sharding.fetch(rollout.response), sharding.fetch(rollout.mask)

    def judge(i: int) -> dict[str, Any]:
      row = part[i]
      group = range(i * samples, (i + 1) * samples)
      texts = [tokenizer.decode(response[j][mask[j]].tolist()) for j in group]
      verdicts = verify(texts, [row["answer"]] * samples)
      lengths = mask[group.start:group.stop].sum(axis=1)
      ended = [bool(np.isin(response[j][mask[j]][-1], tokenizer.eos_ids)) for j in group]
      record = {"id": row["id"], "level": row["level"], "domain": row.get("teacher") or row["task"],
                "texts": texts, "ended": ended, "rewards": [v.reward for v in verdicts],
                "length": float(lengths.mean()), "truncated": 1.0 - float(np.mean(ended))}
      if kl is not None:
        record["reverse_kl"] = float((kl[group.start:group.stop] * mask[group.start:group.stop])
                                     .sum() / lengths.sum())
      return record

    records += distributed.each(lambda numbers: list(map(judge, numbers)), range(len(part)))
  return summarize(records, config.ks), records


def summarize(records: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, float]:
  """Means over prompts of what `evaluate` recorded for each."""
  rewards = np.array([record["rewards"] for record in records])
  correct = (rewards >= 1.0).sum(axis=1)
  out = {f"mean@{rewards.shape[1]}": float(metrics.mean_at_k(rewards).mean())}
  for k in ks:
    out[f"pass@{k}"] = float(np.mean([metrics.pass_at_k(rewards.shape[1], int(c), k)
                                      for c in correct]))
  for name in ("length", "truncated", "reverse_kl"):
    if name in records[0]:
      out[name] = float(np.mean([record[name] for record in records]))
  return out


def shared(verify: Verifier) -> Verifier:
  """The same verifier, its work shared out between the processes. All must call it together."""
  def together(texts: Sequence[str], answers: Sequence[str]) -> list[Any]:
    return distributed.each(lambda pairs: verify([text for text, _ in pairs],
                                                 [answer for _, answer in pairs]),
                            list(zip(texts, answers, strict=True)))
  return together
