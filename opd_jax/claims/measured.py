"""What a run has measured and what it has cost, read from the files that it left."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any

import ml_collections
import numpy as np

from opd_jax import writer
from opd_jax.claims import identity
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders import rows as made
from opd_jax.pipelines import evaluation, stages, teacher_samples

# Measured at every update and noisy: their mean over the last tenth of the steps.
AVERAGED = ("critique/kept", "critique/unusable", "refine/outcome", "refine/repaired",
            "refine/spoiled", "judge/auc", "judge/undecided", "student/entropy", "rollout/length",
            "rollout/truncated", "rollout/reward", "teacher/reverse_kl", "loss/weight",
            "loss/effective_responses", "update/gradient_norm", "update/skipped")
NOTHING = dict(updates=0, rows=0, student_tokens=0, teacher_tokens=0)  # cost by what trains nothing
EXPORT = "export"


def of(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """A run that has come to its end, as a few numbers, for JSON.

  Returns:
    metrics: those of the last evaluation ("eval/mean@8"), and the standard error of its mean
      reward over prompts ("eval/error"); the accuracy by domain ("domain/chain"); of training
      runs `AVERAGED`, what accuracy and length have gained since
      the start ("gain/mean@8", "gain/length"), and of the accuracy's curve, if they evaluate
      on the way, its mean height, how far it falls and when it is highest ("curve/area", "curve/
      fall", "curve/peak"). None where one is not finite.
    curve: [step, mean@k] of every evaluation.
    updates: made; rows: in a batch.
    student_tokens: response tokens that the student sampled for its updates.
    teacher_tokens: those of the teachers' responses that it learned from.
    left: hash of what other runs can start from, as `left` says.
  Raises: ValueError if the run was broken off, or has not logged every step.
  """
  lines = writer.read(workdir)
  if config.pipeline == "responses":
    return {"metrics": {name: value for name, value in lines[-1].items() if name != "step"},
            "curve": [], **NOTHING, "left": left(config, workdir)}
  if config.pipeline == "critique_refine":
    return {"metrics": of_chains(workdir), "curve": [], **NOTHING, "left": ""}
  last = f"step_{config.total_steps:06d}" if "total_steps" in config else "eval"
  path = pathlib.Path(workdir, "eval", f"{last}.json")
  if not path.is_file():
    raise ValueError(f"{workdir} has no eval/{path.name}: the run was broken off")
  metrics = evaluation.named(evaluation.read(workdir, last))
  records = json.loads(path.read_text())["records"]
  metrics |= by_domain(records) | {"eval/error": error(records)}
  mean = headline(config)
  curve = [(line["step"], line[mean]) for line in lines if mean in line]
  if "total_steps" in config:
    metrics |= of_training(config, lines, metrics)
    metrics |= {"curve/area": area(curve), "curve/fall": fall(curve),
                "curve/peak": peak(curve, config.total_steps)}
  return {
      "metrics": {name: value if math.isfinite(value) else None
                  for name, value in sorted(metrics.items())},
      "curve": curve, **costs(config, lines, workdir),
      "left": left(config, workdir),
  }


def headline(config: ml_collections.ConfigDict) -> str:
  """The metric whose curve is kept."""
  return ("eval/accuracy" if config.pipeline == "reward_model"
          else f"eval/mean@{config.eval.samples}")


def left(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Hash of what a run has left for others, "" of nothing: rows, a reward model, or a model."""
  if config.pipeline == "reward_model":  # whose checkpoints hold times; its rewards tell it apart
    there = pathlib.Path(workdir, "checkpoints").is_dir()
    return identity.contents(pathlib.Path(workdir, "eval")) if there else ""
  return identity.contents(pathlib.Path(
      workdir, made.FILE if config.pipeline == "responses" else f"{EXPORT}/model.safetensors"))


def diverged(config: ml_collections.ConfigDict, workdir: str, why: str) -> dict[str, Any]:
  """A run that was stopped because its loss was not finite: nothing but what it has cost."""
  lines = writer.read(workdir)
  steps = max((line["step"] for line in lines), default=0)
  short = config.copy_and_resolve_references()
  short.total_steps = int(steps)
  return {"diverged": why, "metrics": {}, "curve": [], **costs(short, lines, workdir), "left": ""}


def of_chains(workdir: str) -> dict[str, float]:
  """pass@k of each method of a study of critics, and by how much methods differ."""
  found = json.loads(pathlib.Path(workdir, "critique_refine.json").read_text())
  return {f"{section}/{k} {name}": value["mean"]
          for section, key in (("eval", "means"), ("gain", "differences"))
          for name, values in found[key].items() for k, value in values.items()}


def of_training(config: ml_collections.ConfigDict, lines: Sequence[Mapping[str, float]],
                metrics: Mapping[str, float]) -> dict[str, float]:
  """`AVERAGED`, and what has been gained since the start."""
  tail, out = [line for line in lines if line["step"] > 0.9 * config.total_steps], {}
  for name in AVERAGED:
    if found := [line[name] for line in tail if name in line]:
      out[name] = float(np.mean(found))
  if config.pipeline == "reward_model":
    return out
  first = next((line for line in lines if line["step"] == 0), {})
  for name in (f"mean@{config.eval.samples}", "length"):
    if f"eval/{name}" in first:
      out[f"gain/{name}"] = metrics[f"eval/{name}"] - first[f"eval/{name}"]
  return out


def area(curve: Sequence[tuple[int, float]]) -> float:
  """Mean height of a curve of (step, value), by trapezoids: higher is faster at an equal end.

  Returns: NaN of fewer than two points.
  """
  if len(curve) < 2:
    return math.nan
  steps, values = np.asarray(curve, float).T
  return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def fall(curve: Sequence[tuple[int, float]]) -> float:
  """How far a curve of (step, value) has fallen below its highest point; 0 if it ends there."""
  values = [value for _, value in curve]
  return max(values, default=math.nan) - values[-1] if values else math.nan


def peak(curve: Sequence[tuple[int, float]], steps: int) -> float:
  """The share of the training after which a curve of (step, value) is first at its highest."""
  return max(curve, key=lambda point: point[1])[0] / steps if curve else math.nan


def error(records: Sequence[Mapping[str, Any]]) -> float:
  """Standard error of the mean reward over prompts; NaN of one."""
  means = [np.mean(record["rewards"]) for record in records]
  return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def by_domain(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Accuracy on the prompts of each domain: "domain/chain" -> mean reward."""
  found: dict[str, list[float]] = {}
  for record in (x for x in records if "domain" in x):
    found.setdefault(f"domain/{record['domain']}", []).append(float(np.mean(record["rewards"])))
  return {name: float(np.mean(rewards)) for name, rewards in found.items()}


def costs(config: ml_collections.ConfigDict, lines: Sequence[Mapping[str, float]],
          workdir: str) -> dict[str, int]:
  """Updates made, rows a batch, and the tokens that were sampled for them, counted."""
  if config.pipeline == "evaluate":
    return NOTHING
  if config.pipeline in ("sft", "reward_model"):
    rows = config.batch.tokens // max(config.batch.buckets)
    return dict(updates=config.total_steps, rows=rows, student_tokens=0,
                teacher_tokens=answered(workdir))
  if config.pipeline == "opcd":  # who answers and refines; a critic's tokens are not the student's
    triples = [x for path in pathlib.Path(workdir).glob("epochs/*/triples.jsonl")
               for x in stages.read(path)]
    return dict(updates=round(sum(line.get("update/count", 0) for line in lines)),
                rows=config.triples, teacher_tokens=0,
                student_tokens=sum(len(x["ids"]) + len(x["refined_ids"] or ()) for x in triples))
  steps = [line for line in lines if "rollout/length" in line]
  if len(steps) != config.total_steps:
    raise ValueError(f"{workdir} has {len(steps)} lines of {config.total_steps} steps, and tokens "
                     "are counted in every one; set log_every=1")
  rows = config.rollout.prompts * config.rollout.group_size
  own = sum(step["rollout/length"] for step in steps if step.get("rollout/own", 1.0))
  return dict(updates=config.total_steps * config.loss.updates_per_batch, rows=rows,
              student_tokens=round(own * rows), teacher_tokens=0)


def answered(workdir: str) -> int:
  """Tokens of the teachers' responses in a workdir, each with its end; 0 without teachers."""
  path = pathlib.Path(workdir, teacher_samples.FILE)
  if not path.is_file():
    return 0
  tokenizer = tokenizers.load(pathlib.Path(workdir, "model"))
  return sum(len(tokenizer.encode(text)) + 1 for row in stages.read(path)
             for text in row["responses"] if text)
