"""Where in a response is the teacher's word worth something?

Three looks at the student's own responses: how often teacher and student reach the right answer
from a beginning of one (`rescue`), how far apart they are along it (`along`), and how much of that
lies in its first or last part (`share`).

Responses are rows r = 0..R-1, R = G * P: row r answers prompt r mod P. Whatever is measured is
summed over a prompt's rows first, and every 95% interval is a percentile bootstrap over prompts
(numpy), since responses to one prompt are no independent witnesses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.losses import weights

DECILES = 10
RESAMPLES = 2000

# (prompts of R rows, how many tokens each may add, which call this is) -> what each row added
Finish = Callable[[Sequence[Sequence[int]], np.ndarray, int], list[list[int]]]
# (whole responses, how many there are of each row in turn) -> f64[their number], 1 where right
Judge = Callable[[Sequence[Sequence[int]], int], np.ndarray]


def cut(lengths: np.ndarray, fraction: float) -> np.ndarray:
  """How many tokens a response keeps: ceil(fraction x length), but never its last.

  The count is that of the weight "position". The last token is EOS, behind which nothing can
  follow, or that of a response that had reached its limit.

  Args:
    lengths: i32[R], tokens of each response, EOS included, at least 1.
    fraction: of its tokens, in [0, 1].
  Returns: i32[R], at most lengths - 1.
  Raises: ValueError for another fraction.
  """
  kept = weights.position(_mask(lengths, int(lengths.max())), fraction, "prefix")
  return np.minimum(np.asarray(kept).sum(axis=1), lengths - 1)


def rescue(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
           fractions: Sequence[float], samples: int, longest: int,
           finishers: Mapping[str, Finish], judge: Judge) -> dict[str, np.ndarray]:
  """Cuts every response at every fraction, and lets every model finish what is left of it.

  Prefix and continuation are put together as ids: as text, two tokens could become others.

  Args:
    prompts, responses: ids of each row; responses as sampled, with their EOS.
    fractions: of a response's tokens that it keeps. 0 leaves the prompt alone, 1 the response as
      it is, which nobody has to finish.
    samples: K, how often each model finishes each prefix.
    longest: T, tokens that prefix and continuation may have together.
    finishers: models by name.
    judge: which of several whole responses of each row are right.
  Returns: model -> f64[fractions, R, K], 1 where the finished answer is right.
  """
  lengths = np.array([len(response) for response in responses])
  own = np.repeat(judge(responses, 1)[:, None], samples, axis=1)
  found: dict[str, list[np.ndarray]] = {name: [] for name in finishers}
  for call, fraction in enumerate(fractions, start=1):
    counts = np.repeat(cut(lengths, fraction), samples)
    rows = np.repeat(np.arange(len(responses)), samples)
    starts = [list(responses[row][:count]) for row, count in zip(rows, counts)]
    asked = [[*prompts[row], *start] for row, start in zip(rows, starts)]
    for name, finish in finishers.items():
      if fraction == 1.0:
        found[name].append(own)
        continue
      ends = finish(asked, longest - counts, call)
      whole = [start + end for start, end in zip(starts, ends, strict=True)]
      found[name].append(judge(whole, samples).reshape(own.shape))
  return {name: np.stack(each) for name, each in found.items()}


def resample(prompts: int, seed: int) -> np.ndarray:
  """Draws of the bootstrap: i64[RESAMPLES, P], how often each prompt is in each of them.

  All intervals of a study use the same draws, so differences are paired.
  """
  return np.random.default_rng(seed).multinomial(
      prompts, np.full(prompts, 1.0 / prompts), size=RESAMPLES)


def interval(sums: np.ndarray, counts: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
  """A mean over everything counted, and its 95% interval over prompts.

  Args:
    sums, counts: f64[..., P], of each prompt.
    draws: from `resample`.
  Returns: "mean", "low", "high" as nested lists [...]; None where nothing was counted.
  """
  sums, counts = np.broadcast_arrays(np.asarray(sums, float), np.asarray(counts, float))
  ratio = lambda a, b: np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
  drawn = ratio(sums @ draws.T, counts @ draws.T)
  mean = ratio(sums.sum(axis=-1), counts.sum(axis=-1))
  # A draw that has none of the few prompts that count says nothing.
  empty = np.isnan(drawn).all(axis=-1, keepdims=True)
  low, high = np.nanquantile(np.where(empty, 0.0, drawn), (0.025, 0.975), axis=-1)
  bare = lambda x: np.where(np.isnan(mean), None, x).tolist()
  return {"mean": bare(mean), "low": bare(low), "high": bare(high)}


def curves(found: Mapping[str, np.ndarray], right: np.ndarray, prompts: int,
           draws: np.ndarray) -> dict[str, Any]:
  """What `rescue` found, as shares of right answers with their intervals.

  Args:
    found: model -> f64[fractions, R, K]; "teacher" and "student" among them.
    right: f64[R], 1 for the student's own right responses.
    prompts: P.
    draws: from `resample`.
  Returns: "student", "teacher", their "difference", and "student_of_wrong", "teacher_of_wrong":
    among the prefixes of responses that the student itself finished wrong.
  """
  per_prompt = lambda x: by_prompt(x.sum(axis=-1), prompts)
  sums = {name: per_prompt(x) for name, x in found.items()}
  samples = found["student"].shape[-1]
  all_rows = np.full(prompts, samples * len(right) / prompts)
  out = {name: interval(x, all_rows, draws) for name, x in sums.items()}
  out["difference"] = interval(sums["teacher"] - sums["student"], all_rows, draws)
  wrong = (1.0 - right)[:, None]
  for name, x in found.items():
    out[f"{name}_of_wrong"] = interval(
        per_prompt(x * wrong), samples * by_prompt(wrong[:, 0], prompts), draws)
  return out


def along(columns: Mapping[str, np.ndarray], mask: np.ndarray, prompts: int,
          draws: np.ndarray) -> dict[str, Any]:
  """The gap between student and teacher by position in the response.

  Args:
    columns: f32[R, T] each, what is known of every token: "reverse_kl" over the vocabulary,
      "student" and "teacher", the token's log-probability under each; nats.
    mask: bool[R, T], true for real tokens.
    prompts: P.
    draws: from `resample`.
  Returns: each column, and "sampled_kl" (student - teacher), as the mean over the tokens of each
    tenth of the responses: token t of L is in decile floor(10 t / L). An eleventh value is the
    mean over all tokens. "student_prefix", "teacher_prefix" are log-probabilities of the whole
    first 1, 2, .. 10 tenths of a response, mean over responses.
  """
  columns = {**columns, "sampled_kl": columns["student"] - columns["teacher"]}
  with_all = lambda x: np.concatenate([x, x.sum(axis=0, keepdims=True)])
  counts = by_decile(np.ones(mask.shape), mask, prompts)
  sums = {name: by_decile(x, mask, prompts) for name, x in columns.items()}
  out = {name: interval(with_all(x), with_all(counts), draws) for name, x in sums.items()}
  responses = np.full(prompts, len(mask) / prompts)
  return out | {f"{name}_prefix": interval(np.cumsum(sums[name], axis=0), responses, draws)
                for name in ("student", "teacher")}


def share(values: np.ndarray, mask: np.ndarray, fraction: float, side: str, prompts: int,
          draws: np.ndarray) -> dict[str, Any]:
  """How much of the sum of `values` f32[R, T] lies in one part of the responses."""
  part = np.asarray(weights.position(mask, fraction, side))
  total = lambda where: by_prompt(np.where(where, values, 0.0).sum(axis=1), prompts)
  return interval(total(part), total(mask), draws)


def by_decile(values: np.ndarray, mask: np.ndarray, prompts: int) -> np.ndarray:
  """Sums of [R, T] over the tokens of each tenth of a prompt's responses: f64[10, P]."""
  length = np.maximum(mask.sum(axis=1, keepdims=True), 1)
  decile = np.where(mask, DECILES * (np.cumsum(mask, axis=1) - 1) // length, -1)
  return np.stack([by_prompt(np.where(decile == i, values, 0.0).sum(axis=1), prompts)
                   for i in range(DECILES)])


def by_prompt(values: np.ndarray, prompts: int) -> np.ndarray:
  """Sums over the rows of each prompt: [..., R] -> f64[..., P]."""
  return values.reshape(*values.shape[:-1], -1, prompts).sum(axis=-2, dtype=float)


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
  return np.arange(width) < lengths[:, None]
