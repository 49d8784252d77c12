"""What an epoch of OPCD learns from: answers, critiques, refinements, and what stood the checks.

    a = S(x)  ->  f = W(x, a)  ->  r = S(x, a, f)  ->  is r right?  is f useful?

Each stage is a file in the epoch's folder, a row for every answer, so a run that was killed goes on
in the middle of any of them. The last file has all that is known of every triple.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from opd_jax import keys
from opd_jax.data import chat
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.evals import teacher_signal
from opd_jax.pipelines import judge as judges
from opd_jax.pipelines import stages
from opd_jax.pipelines.responder import Respond
from opd_jax.verifiers import Verify

TRIPLES = "triples.jsonl"
FILTERS = ("both", "outcome", "rubric", "none")

Row = stages.Row


class Cast(NamedTuple):
  """Who speaks; each with a function of the student's present parameters to its own."""

  answer: Respond
  refine: Respond
  criticize: Respond | None   # None: refining without a critique
  critic: Callable[[Any], Any]
  judge: judges.Judge | None  # None: no rubric
  judging: Callable[[Any], Any]


def gather(config: ml_collections.ConfigDict, cast: Cast, rows: Sequence[Row], params: Any,
           epoch: int, folder: pathlib.Path | None, tokenizer: Tokenizer, verify: Verify,
           check: Callable[[], None]) -> list[Row]:
  """All triples of an epoch, as many as prompts x rollout.group_size; of some `kept` is true.

  Args:
    config: reads `rollout`, `context.budget`, `filter`, `remove_thinking` and `seed`.
    cast: who speaks.
    rows: of the data, with `prompt_ids` that fit.
    params: the student's at the beginning of the epoch.
    epoch: counts from 0.
    folder: where the stages are; None to keep nothing, for guarded data.
    tokenizer: the student's.
    verify: texts and answers -> verdicts.
    check: called before every block; what it raises ends the epoch where it is.
  """
  group = config.rollout.group_size
  block, total = config.rollout.prompts * group, len(rows) * group
  messages = [json.loads(row["messages"]) for row in rows]
  root = keys.at(keys.root(config.seed), "rollout", epoch)
  critic, judging = cast.critic(params), cast.judging(params)
  show = chat.without_thinking if config.remove_thinking else str

  def stage(number: int, name: str, make: Callable[[slice, jax.Array], list[Row]]) -> list[Row]:
    def block_of(start: int, stop: int) -> list[Row]:
      check()
      return make(slice(start, stop), jax.random.fold_in(jax.random.fold_in(root, number), start))
    return stages.rows(folder and folder / f"{name}.jsonl", total, block, block_of)

  def answer(here: slice, key: jax.Array) -> list[Row]:
    places = range(here.start, here.stop)
    said = cast.answer(params, [messages[i // group] for i in places], key)
    verdicts = verify([x.text for x in said], [rows[i // group]["answer"] for i in places])
    return [dict(epoch=epoch, prompt=rows[i // group]["id"], chain=i % group, answer=x.text,
                 ids=x.ids, ended=x.ended, reward=verdict.reward)
            for i, x, verdict in zip(places, said, verdicts)]

  answers = stage(0, "answers", answer)

  def criticize(here: slice, key: jax.Array) -> list[Row]:
    if cast.criticize is None:
      return [dict(critique="", problem="")] * (here.stop - here.start)
    found = cast.criticize(critic, [
        chat.critique_request(messages[i // group], show(answers[i]["answer"]))
        for i in range(here.start, here.stop)], key)
    said = [show(x.text) if x else "" for x in found]
    return [dict(critique=text, problem=_problem(x, text)) for x, text in zip(found, said)]

  critiques = stage(1, "critiques", criticize)

  def refine(here: slice, key: jax.Array) -> list[Row]:
    asked = [i for i in range(here.start, here.stop) if not critiques[i]["problem"]]
    # Where there is no critique, the question stands in: one shape, and every row its own draws.
    said = cast.refine(params, [
        chat.refine_request(messages[i // group], show(answers[i]["answer"]),
                            critiques[i]["critique"])
        if i in asked else messages[i // group] for i in range(here.start, here.stop)], key)
    said = [x if i in asked else None for i, x in zip(range(here.start, here.stop), said)]
    verdicts = verify([x.text if x else "" for x in said],
                      [rows[i // group]["answer"] for i in range(here.start, here.stop)])
    return [dict(refinement=x and x.text, refined_ids=x and x.ids,
                 outcome=bool(x and verdict.reward >= 1.0)) for x, verdict in zip(said, verdicts)]

  refinements = stage(2, "refinements", refine)

  def filtered(here: slice, key: jax.Array) -> list[Row]:
    places = [i for i in range(here.start, here.stop) if refinements[i]["refinement"] is not None]
    words: dict[int, Any] = {}
    if cast.judge:
      words = dict(zip(places, cast.judge(judging, [judges.Case(
          messages[i // group], show(answers[i]["answer"]), critiques[i]["critique"])
                                                  for i in places])))
    out = []
    for i in range(here.start, here.stop):
      known = {**answers[i], **critiques[i], **refinements[i], "judge": words.get(i)}
      # A judge that prefers neither has not said yes.
      known["rubric"] = bool(known["judge"] and known["judge"][0] > known["judge"][1])
      context = tokenizer.encode_chat(chat.with_critique(messages[i // group], known["critique"]))
      known["problem"] = known["problem"] or next((problem for problem, there in (
          ("too long to be refined", i not in places),
          ("too long to be judged", bool(cast.judge) and known["judge"] is None),
          ("too long to be learned behind", len(context) > config.context.budget)) if there), "")
      known["kept"] = not known["problem"] and passes(config.filter, known)
      out.append(known)
    return out

  return stage(3, TRIPLES.removesuffix(".jsonl"), filtered)


def passes(name: str, known: Row) -> bool:
  """Whether a triple stands the checks of a filter, a name in FILTERS."""
  return {"both": known["outcome"] and known["rubric"], "outcome": known["outcome"],
          "rubric": known["rubric"], "none": True}[name]


def reasons(config: ml_collections.ConfigDict, triples: Sequence[Row]) -> str:
  """Why triples were not kept, with how many each: "5 cut off, 3 refinement not right"."""
  checks = {"outcome": "refinement not right", "rubric": "no by the judge"}
  asked = [name for name in checks if config.filter in (name, "both")]
  why = Counter(x["problem"] or " and ".join(checks[name] for name in asked if not x[name])
                for x in triples if not x["kept"])
  return ", ".join(f"{count} {name}" for name, count in why.most_common())


def _problem(response: Any, said: str) -> str:
  """Why a critique cannot be used, in a word; "": it can. `said` is what would be shown of it."""
  if response is None:
    return "too long to be asked for"
  if not response.ended:
    return "cut off"
  return "" if said.strip() else "empty"


def without_texts(triple: Row) -> Row:
  """What may be left of a triple of guarded data: its ids and numbers."""
  return {name: triple[name] for name in (
      "epoch", "prompt", "chain", "ended", "reward", "problem", "outcome", "judge", "rubric",
      "kept")}


def metrics(triples: Sequence[Row]) -> dict[str, float]:
  """Shares of an epoch's triples; the judge's AUC against the outcome where it has one."""
  share = lambda value, among=triples: float(np.mean([value(x) for x in among]))
  refined = [x for x in triples if x["refinement"] is not None]
  wrong, right = ([x for x in refined if (x["reward"] >= 1.0) == was] for was in (False, True))
  judged = [x for x in triples if x["judge"]]
  found = {
      "rollout/reward": share(lambda x: x["reward"]),
      "rollout/truncated": share(lambda x: not x["ended"]),
      "critique/unusable": share(lambda x: bool(x["problem"])),
      "critique/kept": share(lambda x: x["kept"]),
      "refine/outcome": share(lambda x: x["outcome"])}
  # Of wrong answers that were refined, those that became right; and the other way round.
  if wrong:
    found["refine/repaired"] = share(lambda x: x["outcome"], wrong)
  if right:
    found["refine/spoiled"] = share(lambda x: not x["outcome"], right)
  if judged:
    found["judge/yes"] = float(np.mean([x["rubric"] for x in judged]))
    found["judge/undecided"] = float(np.mean([x["judge"][0] == x["judge"][1] for x in judged]))
    auc = teacher_signal.auc(np.array([x["judge"][0] - x["judge"][1] for x in judged]),
                             np.array([float(x["outcome"]) for x in judged]))
    if not np.isnan(auc):
      found["judge/auc"] = float(auc)
  return found
