"""Evaluation as a part of every pipeline: fixed prompts, fixed keys, results on disk."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import distributed, progress, sharding
from opd_jax.data import builders, loader
from opd_jax.evals import run as evals
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import teachers
from opd_jax.rollouts.sampler import Sampling

Evaluate = Callable[[Any, str], dict[str, float]]  # (params, name) -> metrics


def make(config: ml_collections.ConfigDict, policy: policies.Policy, verify: evals.Verifier,
         mesh: Mesh, workdir: str, reverse_kl: evals.ReverseKL | None = None) -> Evaluate:
  """Prepares the evaluation of one policy's parameters at any time of a run.

  Args:
    config: the whole config; reads `eval`, `rollout` and `data`.
    policy: whose model and tokenizer are used; parameters are given at each call.
    verify: texts and answers -> verdicts.
    mesh: prompts are spread over its `replica` and `data` axes.
    workdir: each call leaves `eval/<name>.json` (metrics and records) and a readable
      `samples/<name>.txt` there; of guarded data neither holds a text.
    reverse_kl: (params, rollout) -> KL(student, teacher) per token, if there is a teacher.
  Returns: (params, name) -> metrics; "dropped" is among them if over-long prompts were.
  """
  section, rollout = config.eval, config.rollout
  rows, dropped = read_rows(config, policy)
  if dropped:
    progress.note(f"evaluation leaves out {dropped} prompts of {config.data.eval_split!r} that are "
                  f"longer than rollout.max_prompt={rollout.max_prompt} tokens, and takes the next")
  sample = policies.make_sampler(
      policy.model, policy.tokenizer, rollout,
      Sampling(section.temperature, section.top_k, section.top_p))
  on_mesh = sharding.of_batch(mesh)

  def evaluate(params: Any, name: str) -> dict[str, float]:
    metrics, records = evals.evaluate(
        section, rows, params, lambda p, b, k: sample(p, sharding.put(b, on_mesh), k),
        policy.tokenizer, verify, policies.buckets(rollout), reverse_kl)
    if dropped:  # otherwise a column of zeros in every table
      metrics["dropped"] = float(dropped)
    if distributed.is_first():
      write(pathlib.Path(workdir), name, metrics, rows, records, builders.is_guarded(config.data))
    return metrics

  return evaluate


def read_rows(config: ml_collections.ConfigDict,
              policy: policies.Policy) -> tuple[list[dict[str, Any]], int]:
  """The first `eval.prompts` rows of the evaluation split whose prompts fit.

  Returns: the rows, and how many among them were too long and left out.

  Raises: ValueError if the split has too few of them.
  """
  source = builders.open_eval(config.data)
  encode, rows = loader.encode(policy.tokenizer, tuple(teachers.sections(config))), []
  for i in range(len(source)):
    row = encode(source[i])
    if len(row["prompt_ids"]) <= config.rollout.max_prompt:
      rows.append(row)
    if len(rows) == config.eval.prompts:
      return rows, i + 1 - len(rows)
  raise ValueError(f"the split {config.data.eval_split!r} has {len(rows)} prompts of at most "
                   f"rollout.max_prompt={config.rollout.max_prompt} tokens (of {len(source)} "
                   f"rows), eval.prompts asks for {config.eval.prompts}")


def due(config: ml_collections.ConfigDict, done: int) -> bool:
  """Whether there is an evaluation after `done` updates, as eval.every and eval.at say."""
  every, total = config.eval.every, config.total_steps
  return (done == total or bool(every and done) and done % every == 0
          or done in {max(round(share * total), share > 0) for share in config.eval.at})


def named(metrics: dict[str, float]) -> dict[str, float]:
  """The metrics under their section: "mean@8" -> "eval/mean@8"."""
  return {f"eval/{name}": value for name, value in metrics.items()}


def write(workdir: pathlib.Path, name: str, metrics: dict[str, float],
          rows: list[dict[str, Any]], records: list[dict[str, Any]], guarded: bool) -> None:
  """Leaves one evaluation on disk, for machines (eval/) and for eyes (samples/).

  Of guarded data ids and numbers are left: a response may say its question again.
  """
  if guarded:
    records = [{key: x for key, x in record.items() if key != "texts"} for record in records]
  for folder in ("eval", "samples"):
    (workdir / folder).mkdir(parents=True, exist_ok=True)
  (workdir / "eval" / f"{name}.json").write_text(
      json.dumps({"metrics": metrics, "records": records}, indent=1))
  lines = []
  for row, record in list(zip(rows, records))[:16]:
    answer = "(guarded)" if guarded else row["answer"]
    lines.append(f"=== {record['id']}, level {record['level']}, answer {answer}, "
                 f"{sum(record['rewards']):g} of {len(record['rewards'])} correct")
    if guarded:
      continue
    lines.append("\n".join(f"[{m['role']}] {m['content']}" for m in json.loads(row["messages"])))
    lines.append(f"--- response, reward {record['rewards'][0]:g}\n{record['texts'][0]}\n")
  (workdir / "samples" / f"{name}.txt").write_text("\n".join(lines))


def is_there(workdir: str, name: str) -> bool:
  """Whether `write` left an evaluation of that name; the first process looks."""
  return distributed.of_first(lambda: pathlib.Path(workdir, "eval", f"{name}.json").is_file())


def read(workdir: str, name: str) -> dict[str, float]:
  """The metrics of an evaluation that `write` left."""
  return json.loads((pathlib.Path(workdir) / "eval" / f"{name}.json").read_text())["metrics"]


def paired(workdir: str, before: str, after: str) -> str:
  """What changed between two evaluations of the same prompts: mean and standard error.

  Accuracy and reverse KL are differenced prompt by prompt, so the prompts' own difficulty
  does not blur the comparison.
  """
  records = [json.loads((pathlib.Path(workdir) / "eval" / f"{name}.json").read_text())["records"]
             for name in (before, after)]
  parts = []
  for name, value in (("accuracy", lambda r: np.mean(r["rewards"])),
                      ("reverse KL", lambda r: r.get("reverse_kl", np.nan))):
    change = np.array([value(b) - value(a) for a, b in zip(*records)])
    error = change.std(ddof=1) / np.sqrt(len(change))
    if not np.isnan(change).all():  # without a teacher there is no KL
      parts.append(f"{name} {change.mean():+.3f} +- {error:.3f}")
  return f"change over {len(records[0])} prompts (paired standard errors): " + ", ".join(parts)
