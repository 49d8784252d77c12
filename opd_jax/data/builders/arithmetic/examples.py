"""Training and test rows over chains: plain questions, and questions with a context.

The tiny models must be able to use what later methods show them, so part of their
training carries peers' solutions, failures marked as such, critiques of an earlier
attempt, and the critic's own job. A judge's, to tell right critiques from misleading
ones, is for models that do nothing else.
"""

from collections.abc import Iterator
import json
import random
from typing import Any

from opd_jax.data import chat
from opd_jax.data.builders.arithmetic import chains

KINDS = ("plain", "peers", "failures", "refine", "critic", "judge")

# Peers shown together: (successes, failures).
SHOWN = {"peers": ((1, 0), (1, 0), (0, 1), (1, 1), (2, 1), (2, 0)), "failures": ((0, 1), (0, 2))}


def level(digits: int, steps: int) -> int:
  """Difficulty as one number: hundreds count the digits, the rest the steps."""
  return 100 * digits + steps


def _peers(rng: random.Random, kind: str, chain: chains.Chain, beyond: bool) -> chat.Messages:
  successes, failures = rng.choice([s for s in SHOWN[kind] if s[0] or not beyond])
  return chat.with_peers(chat.question(chains.question(chain)),
                         [chains.solution(chain)] * successes,
                         [chains.corrupt(chain, rng) for _ in range(failures)])


def _refine(rng: random.Random, chain: chains.Chain, beyond: bool) -> chat.Messages:
  attempt = chains.corrupt(chain, rng, where=rng.choice((0, None))) if beyond else _attempt(
      rng, chain)
  # A critic that works on past the mistake: without such rows the models copy the attempt,
  # which is nearly as often right, and never learn to trust the critique.
  further = len(chain.steps) if beyond else rng.choice((0, 0, 1, 2, len(chain.steps)))
  return chat.refine_request(chat.question(chains.question(chain)), attempt,
                             chains.critique(chain, attempt, further))


def _attempt(rng: random.Random, chain: chains.Chain) -> str:
  """Right in a quarter of the cases, wrong from the first line in another."""
  kind = rng.choice(("right", "early", "anywhere", "anywhere"))
  if kind == "right":
    return chains.solution(chain)
  return chains.corrupt(chain, rng, where=0 if kind == "early" else None)


def example(rng: random.Random, kind: str, digits: int, steps: int, beyond: float,
            rubric: str = "") -> dict[str, Any]:
  """One row of the given kind, without its id: task, level, messages, answer, response.

  A context is worth reading only where the model cannot do without: with probability
  `beyond` a row with a context has three digits, more than the tiny models can compute,
  and all of its response can be copied from the context.
  """
  beyond = kind in ("peers", "refine") and rng.random() < beyond
  if beyond:
    digits, steps = 3, min(steps, 4)
  chain = chains.sample(rng, digits, steps)
  response = chains.solution(chain)
  if kind == "plain":
    messages = chat.question(chains.question(chain))
  elif kind in SHOWN:
    messages = _peers(rng, kind, chain, beyond)
  elif kind == "refine":
    messages = _refine(rng, chain, beyond)
  elif kind == "judge":
    attempt, right = _attempt(rng, chain), rng.random() < 0.5
    said = (chains.critique(chain, attempt) if right else
            chains.misleading_critique(chain, attempt, rng))
    messages = chat.fill(rubric, chat.question(chains.question(chain)),
                         dict(answer=attempt, critique=said))
    response = "yes" if right else "no"
  else:
    attempt = _attempt(rng, chain)
    messages = chat.critique_request(chat.question(chains.question(chain)), attempt)
    response = chains.critique(chain, attempt)
  return dict(task=f"arithmetic/{kind}", level=level(digits, steps), messages=json.dumps(messages),
              answer=chains.answer(chain), response=response)


def rows(*, count: int, seed: int, digits: tuple[int, ...], min_steps: int, max_steps: int,
         mix: dict[str, float], beyond: float = 0.0,
         rubric: str = "") -> Iterator[dict[str, Any]]:
  """Yields `count` rows, deterministic in the arguments.

  Args:
    count: number of rows.
    seed: of the generator; different splits use different seeds.
    digits: which moduli appear, each equally often.
    min_steps, max_steps: bounds of the chain's length, both included, equally often.
    mix: share of each kind in `KINDS`.
    beyond: share of the rows with a context that only the context can answer.
    rubric: what a judge is asked, with {question}, {answer} and {critique}.
  """
  rng = random.Random(seed)
  for i in range(count):
    kind = rng.choices(list(mix), list(mix.values()))[0]
    row = example(rng, kind, rng.choice(digits), rng.randint(min_steps, max_steps),
                  beyond, rubric)
    yield dict(id=f"chain-{seed}-{i}", **row)
