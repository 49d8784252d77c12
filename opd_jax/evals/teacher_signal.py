"""Does a teacher's word tell right responses from wrong ones, and what should the teacher see?

In every context the teacher scores each candidate response of a prompt: its mean log-probability,
nats per token. The verifier has given each a reward. The metrics say of one prompt how well the
scores agree with the rewards; where they mean nothing (all candidates right, all wrong, all scores
equal) they are NaN, and `paired` leaves the prompt out of the mean and counts it.

Source: MOPD (2605.12652), the analysis of its signal; METHODS 4.
"""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
import numpy as np
from scipy import special, stats

from opd_jax.evals import paired


def spearman(score: np.ndarray, reward: np.ndarray) -> float:
  """Rank correlation, ties averaged, of f64[n] and f64[n]; NaN where either is constant."""
  return float(stats.spearmanr(score, reward).statistic) if _vary(score, reward) else np.nan


def kendall(score: np.ndarray, reward: np.ndarray) -> float:
  """Kendall's tau-b, which corrects for ties; NaN where either is constant."""
  return float(stats.kendalltau(score, reward).statistic) if _vary(score, reward) else np.nan


def pairwise_accuracy(score: np.ndarray, reward: np.ndarray) -> float:
  """Share of the pairs of unequal reward that the score orders alike; a tied score is half.

  NaN where all rewards are equal. For rewards 0 and 1 it is `auc`.
  """
  better, worse = np.nonzero(reward[:, None] > reward)
  return _share_above(score[better], score[worse])


def auc(score: np.ndarray, reward: np.ndarray) -> float:
  """Probability that a success scores above a failure, ties half; NaN where either is missing."""
  right = reward >= 1.0
  successes, failures = np.meshgrid(score[right], score[~right])
  return _share_above(successes.ravel(), failures.ravel())


def point_biserial(score: np.ndarray, reward: np.ndarray) -> float:
  """Correlation of the score with being right; NaN where either is constant."""
  right = (reward >= 1.0).astype(float)
  return float(stats.pointbiserialr(right, score).statistic) if _vary(score, right) else np.nan


def brier_sigmoid(score: np.ndarray, reward: np.ndarray) -> float:
  """Mean squared error of sigmoid(score) as the probability of being right: the less the better.

  Log-probabilities are not positive, so no candidate is given more than 1/2, and what this says is
  the level of the scores more than their order. NaN without candidates.
  """
  return _brier(special.expit(score), reward)


def brier_minmax(score: np.ndarray, reward: np.ndarray) -> float:
  """As `brier_sigmoid`, of the score stretched to [0, 1] over the prompt; NaN if it is constant."""
  return _brier((score - score.min()) / np.ptp(score), reward) if _vary(score) else np.nan


def top1(score: np.ndarray, reward: np.ndarray) -> float:
  """Whether the candidate with the greatest score is right; of tied ones the share that is.

  That is the expected hit rate of a fair choice among them. NaN where all are right or all are
  wrong: there every choice hits, or none.
  """
  right = reward >= 1.0
  return float(right[score == score.max()].mean()) if _vary(right) else np.nan


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "spearman": spearman, "kendall": kendall, "pairwise_accuracy": pairwise_accuracy, "auc": auc,
    "point_biserial": point_biserial, "brier_sigmoid": brier_sigmoid, "brier_minmax": brier_minmax,
    "top1": top1}

LESS_IS_BETTER = ("brier_sigmoid", "brier_minmax")

# What a score that knows nothing of the rewards has on average, where that does not depend on them.
CHANCE = {"spearman": 0.0, "kendall": 0.0, "pairwise_accuracy": 0.5, "auc": 0.5,
          "point_biserial": 0.0}


def per_prompt(scores: np.ndarray, rewards: np.ndarray) -> dict[str, np.ndarray]:
  """Every metric of every prompt.

  Args:
    scores: f64[P, G], nats per token; NaN where a prompt has no such candidate.
    rewards: f64[P, G], in [0, 1], of which 1 is a success.
  Returns: metric -> f64[P], NaN where it is undefined.
  Raises: ValueError if shapes differ, a score is infinite, or a candidate has no reward.
  """
  scores, rewards = np.asarray(scores, float), np.asarray(rewards, float)
  if scores.ndim != 2 or scores.shape != rewards.shape:
    raise ValueError(f"scores are {scores.shape} and rewards {rewards.shape}; wanted [prompts, "
                     "candidates] of both")
  there = ~np.isnan(scores)
  if np.isinf(scores).any():
    raise ValueError(f"{np.isinf(scores).sum()} scores are infinite; leave the tokens that the "
                     "teacher rules out of the mean, or give NaN for no score")
  if np.isnan(rewards[there]).any():
    raise ValueError(f"{np.isnan(rewards[there]).sum()} candidates with a score have no reward")
  return {name: np.array([metric(score[real], reward[real])
                          for score, reward, real in zip(scores, rewards, there)])
          for name, metric in METRICS.items()}


def study(scores: Mapping[str, np.ndarray], rewards: np.ndarray, seed: int = 0,
          against: str = "plain") -> dict[str, Any]:
  """What the teacher's word is worth in each context.

  Contexts are compared on the candidates that have all of them: which of them exist depends on how
  many peers are right, and so on how hard a prompt is.

  Args:
    scores: context -> f64[P, G], nats per token; NaN where a prompt has no such candidate, or a
      candidate no such context (a lone success has no successful peer). MOPD's seven contexts
      are in teachers/contexts.py, `PEERS`.
    rewards: f64[P, G], in [0, 1], of which 1 is a success.
    seed: of the bootstrap.
    against: the context that is subtracted from the others.
  Returns: what `paired.compare` returns, and "prompts" P, "candidates" of them that have every
    context, and "have": context -> how many candidates have it.
  Raises: as `per_prompt` and `paired.compare`.
  """
  there = {name: ~np.isnan(np.asarray(x, float)) for name, x in scores.items()}
  if len(shapes := {x.shape for x in there.values()}) > 1:
    raise ValueError(f"scores of contexts are of shapes {sorted(shapes)}; wanted one for all")
  everywhere = np.logical_and.reduce(list(there.values()))
  values = {name: per_prompt(np.where(everywhere, x, np.nan), rewards)
            for name, x in scores.items()}
  return {"prompts": len(rewards), "candidates": int(everywhere.sum()),
          "have": {name: int(x.sum()) for name, x in there.items()},
          **paired.compare(values, against, seed)}


def best(results: Mapping[str, Any]) -> dict[str, list[str]]:
  """Metric -> the contexts with the best mean, several if it is the same; none if undefined.

  Args:
    results: from `study`. Whether a lead is more than noise, the differences say.
  """
  out = {}
  for metric in METRICS:
    means = {name: found[metric]["mean"] for name, found in results["means"].items()}
    sign = -1.0 if metric in LESS_IS_BETTER else 1.0
    top = max((sign * x for x in means.values() if x is not None), default=None)
    out[metric] = [name for name, x in means.items() if x is not None and sign * x == top]
  return out


def picture(results: Mapping[str, Any]) -> Figure:
  """Draws the means of `study`; dotted: a score that knows nothing of the rewards."""
  return paired.picture(results["means"], CHANCE)


def _vary(*arrays: np.ndarray) -> bool:
  return all(len(x) > 0 and bool(np.any(x != x[0])) for x in arrays)


def _share_above(better: np.ndarray, worse: np.ndarray) -> float:
  if not len(better):
    return np.nan
  return float(np.mean((better > worse) + 0.5 * (better == worse)))


def _brier(probability: np.ndarray, reward: np.ndarray) -> float:
  if not len(reward):
    return np.nan
  return float(np.mean((probability - (reward >= 1.0))**2))
