"""What do the tiny models make of a context? Accuracy by difficulty under six conditions."""

from collections.abc import Callable, Sequence
import random
from typing import Any

import numpy as np

from opd_jax.data import chat
from opd_jax.data.builders.arithmetic import chains
from opd_jax.verifiers import exact_match

Respond = Callable[[list[chat.Messages]], list[str]]  # conversations -> one response each

# Difficulty: digits, and the range of steps, "2d 5-6".
LEVELS = {f"{digits}d {low}-{low + 1}": (digits, low)
          for digits in (1, 2) for low in (3, 5, 7)}


def conditions(problems: Sequence[chains.Chain], respond: Respond, criticize: Respond,
               seed: int) -> dict[str, list[str]]:
  """One response a problem under each condition.

  Args:
    problems: the questions.
    respond: the model under study.
    criticize: the weak model, which writes critiques of the model's first answers.
    seed: of the wrong peers and the misleading critiques.
  Returns: condition -> responses; "wrong peer" and "first answer" conditions share `seed`,
    so all models see the same failures.
  """
  rng = random.Random(seed)
  plain = [chat.question(chains.question(c)) for c in problems]
  failures = [chains.corrupt(c, rng) for c in problems]
  first = respond(plain)
  misleading = [chains.misleading_critique(c, a, rng) for c, a in zip(problems, first)]
  weak = criticize([chat.critique_request(q, a) for q, a in zip(plain, first)])
  refine = lambda critiques: respond(
      [chat.refine_request(q, a, c) for q, a, c in zip(plain, first, critiques)])
  return {
      "plain": first,
      "a correct peer": respond(
          [chat.with_peers(q, [chains.solution(c)]) for q, c in zip(plain, problems)]),
      "a wrong peer, marked wrong": respond(
          [chat.with_peers(q, [], [f]) for q, f in zip(plain, failures)]),
      "a helpful critique": refine(
          [chains.critique(c, a) for c, a in zip(problems, first)]),
      "a misleading critique": refine(misleading),
      "the weak model's critique": refine(weak),
      "copied from the wrong peer": failures,
  }


def accuracy(problems: Sequence[chains.Chain], responses: Sequence[str]) -> dict[str, float]:
  """Share of right answers, for all problems and by difficulty."""
  right = np.array([exact_match.verify(r, chains.answer(c)).reward
                    for r, c in zip(responses, problems)])
  where = {"all": np.ones(len(right), bool)}
  for name, (digits, low) in LEVELS.items():
    where[name] = np.array([c.digits == digits and low <= len(c.steps) <= low + 1
                            for c in problems])
  return {name: float(right[mask].mean()) for name, mask in where.items() if mask.any()}


def study(problems: Sequence[chains.Chain], respond: Respond, criticize: Respond,
          seed: int = 0) -> dict[str, dict[str, float]]:
  """Condition -> accuracy by difficulty, and how often a marked failure was copied whole."""
  found = conditions(problems, respond, criticize, seed)
  failures = found.pop("copied from the wrong peer")
  table: dict[str, Any] = {name: accuracy(problems, texts) for name, texts in found.items()}
  copied = np.mean([a == b for a, b in zip(found["a wrong peer, marked wrong"], failures)])
  table["copied from the wrong peer"] = {"all": float(copied)}
  return table
