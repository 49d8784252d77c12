"""What is wrong with notes about records, and whether it is the same at every sampling.

    saved evaluations of a model on data/builders/notes -> measures by prompt, for `paired.compare`

Noise is averaged out by the most frequent of many responses; what that one lacks is systematic.
"""

import collections
from collections.abc import Sequence

import numpy as np

from opd_jax.data.builders import notes
from opd_jax.evals.saved import Group
from opd_jax.verifiers import notes as gold


def measures(groups: Sequence[Group]) -> dict[str, np.ndarray]:
  """Of each prompt's responses, their means.

  Args:
    groups: prompts and responses; `answer` is the record.
  Returns: measure -> f64[P]: "reward", from 0 to 1; "of the most frequent", the reward of the
    response that is given most often (of several, the first); "no note", the share that is none;
    what each attribute adds, in nats, over those that are notes (NaN of a prompt without any); and
    "of the head", `head_share` over these.
  """
  rows = [_measured(group) for group in groups]
  return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _measured(group: Group) -> dict[str, float]:
  record = group.answer
  found = [gold.attributes(record, text) for text in group.responses]
  there = [(text, parts) for text, parts in zip(group.responses, found) if parts is not None]
  mean = lambda values: float(np.mean(values)) if values else float("nan")
  most, _ = collections.Counter(group.responses).most_common(1)[0]
  return {
      "reward": mean([gold.share(gold.gold(record, text)) for text in group.responses]),
      "of the most frequent": gold.share(gold.gold(record, most)),
      "no note": 1.0 - len(there) / len(found),
      **{f"{name}, nats": mean([parts[name] for _, parts in there]) for name in (
          "coverage", "truth", "brevity", "order", "arithmetic")},
      "of the head": mean([notes.head_share(record, text) for text, _ in there])}
