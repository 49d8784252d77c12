"""Two sets of saved responses to the same prompts, compared by a judge, as AlpacaEval does.

    pairs, by prompt -> each in an order drawn from the seed -> a local model, or an endpoint -> who
    is preferred -> win rate, its length-controlled form, bias of the place (evals/judged.py)

WORKDIR/judgements.jsonl has a row a prompt, made once: the same command goes on behind the last.

    prompt, question   the prompt's id, and its last turn
    a, b               the first response of each side
    flipped            whether b was shown first, as A; else a was
    said               the judge's reply, or a local model's log-probabilities of "A" and "B"; None:
                       it was not asked, or the request was too long for it
    by                 what an endpoint calls the model that answered
    preferred          "a", "b", "tie", or None for what cannot be read
    how                "chosen"; "same", the texts are equal: a tie without asking; "refused"; "too
                       long"; "cut off", by the length limit before a choice; "unreadable"

A reply is read as a choice if it ends with one of A, B and tie and names no other of A and B.
"""

from collections.abc import Callable, Iterator, Sequence
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from opd_jax import keys, progress, sharding
from opd_jax.data import chat
from opd_jax.data.builders import rows as made
from opd_jax.evals import judged, saved
from opd_jax.pipelines import endpoint, evaluate, in_context, opcd, stages
from opd_jax.pipelines import judge as judges
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.stages import Row

PLACEHOLDERS = ("question", "first", "second")
LABELS = ("A", "B")  # of the response shown first, and of the other
TIE = "tie"          # a rubric may offer it


class Sample(NamedTuple):
  messages: chat.Messages  # the conversation up to the response
  response: str


class Pair(NamedTuple):
  prompt: str
  messages: chat.Messages
  a: str
  b: str
  flipped: bool  # b is shown first


class Reply(NamedTuple):
  label: str | None  # one of LABELS, or TIE; None: no choice
  how: str
  said: Any
  by: str = ""


Ask = Callable[[Sequence[chat.Messages]], Iterator[Reply]]


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Compares `config.a` with `config.b`; leaves judgements.jsonl and judged.json."""
  check(config)
  rubric = judges.read_rubric(config.rubric, PLACEHOLDERS)
  pairs = read(config, workdir)
  folder = pathlib.Path(workdir)
  stages.begin_with(folder, "responses", lambda: stages.contents(pairs))
  stages.begin_with(folder, "rubric's words", lambda: rubric)
  if config.judge.source:  # what an endpoint has is not ours to know
    stages.begin_with(folder, "judge's weights", lambda: policies.fingerprint(
        config.judge, keys.root(config.seed)))
  rows = compare(config, pairs, rubric, folder)
  results = judged.study(rows, config.seed)
  judged.report(results)
  path = folder / "judged.json"
  path.write_text(json.dumps(results, indent=1, allow_nan=False))
  progress.note(f"the numbers are in {path}, every judgement in {folder}/judgements.jsonl")


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what cannot work before anything is asked.

  Raises: ValueError naming the keys.
  """
  if bool(config.judge.source) == bool(config.endpoint.url):
    raise ValueError(f"judge.source is {config.judge.source!r} and endpoint.url "
                     f"{config.endpoint.url!r}; one of them must name the judge, and the other be "
                     "''")


def read(config: ml_collections.ConfigDict, workdir: str) -> list[Pair]:
  """The pairs of the prompts that both sides have, in a's order, and which of them are flipped.

  Raises: ValueError if there are none, or a prompt's id stands for two prompts.
  """
  first = config.a.source or workdir
  if not config.a.source and not saved.names(workdir):
    evaluate.run(config, workdir)
  a = samples(first, config.a.evaluation, "a")
  b = (samples(config.b.source, config.b.evaluation, "b") if config.b.source else
       given(first, list(a)))
  both = [name for name in a if name in b]
  if not both:
    raise ValueError(f"a has {len(a)} prompts and b {len(b)}, and none of them is the same: "
                     f"{next(iter(a))!r} is a's first and {next(iter(b))!r} b's; name responses to "
                     "the same prompts in a.source and b.source")
  if other := [name for name in both if a[name].messages != b[name].messages]:
    raise ValueError(f"prompt {other[0]!r} is another in a than in b, as are {len(other)} of the "
                     f"{len(both)} that both have: they come from different data; name responses "
                     "to the same prompts in a.source and b.source")
  if alone := len(a) + len(b) - 2 * len(both):
    progress.note(f"{alone} prompts that only one side has are left out; {len(both)} are in both")
  both = both[:config.prompts or None]
  root = keys.root(config.seed)
  flipped = jax.vmap(lambda i: jax.random.bernoulli(keys.at(root, "context", i)))(
      np.arange(len(both)))
  return [Pair(name, a[name].messages, a[name].response, b[name].response, bool(flip))
          for name, flip in zip(both, np.asarray(flipped))]


def samples(source: str, evaluation: str, side: str) -> dict[str, Sample]:
  """The first response to each prompt: id -> sample.

  Args:
    source: a file of rows (pipelines/responses.py), or the workdir of a run that evaluates.
    evaluation: of that run; "": its only one.
    side: "a" or "b", for messages.
  Raises: ValueError if there is none, or there are several to choose from.
  """
  if pathlib.Path(source).is_file():
    return {row["id"]: Sample(json.loads(row["messages"]), row["response"])
            for row in made.read(source)}
  names = saved.names(source)
  if not evaluation and len(names) != 1:
    raise ValueError(f"{side}.source {source!r} has "
                     + (f"several evaluations; name one of {', '.join(names)} in "
                        f"{side}.evaluation" if names else "no evaluation: it must be the workdir "
                        "of a run that evaluates, or a file of rows such as "
                        "runs/strong_samples/rows.jsonl"))
  return {group.id: Sample(group.prompt, group.responses[0])
          for group in saved.read(source, evaluation or names[0])}


def given(workdir: str, ids: Sequence[str]) -> dict[str, Sample]:
  """The responses that the data of an evaluation bring themselves.

  Raises: ValueError if they bring none.
  """
  if pathlib.Path(workdir).is_file():
    raise ValueError(f"b.source is '', which stands for the responses that the data of a's "
                     f"evaluation bring, but a.source {workdir!r} is a file of rows; name b.source")
  rows = saved.rows(workdir, ids)
  if bare := [row["id"] for row in rows if not row["response"]]:
    raise ValueError(f"b.source is '', but the data of {workdir} bring no response to "
                     f"{len(bare)} prompts ({bare[0]!r} is the first); name b.source")
  return {row["id"]: Sample(json.loads(row["messages"]), row["response"]) for row in rows}


def compare(config: ml_collections.ConfigDict, pairs: Sequence[Pair], rubric: str,
            folder: pathlib.Path) -> list[Row]:
  """The judgements of all pairs; those that are not on disk are made and left there."""
  ask, block = ((remote(config), 1) if config.endpoint.url else
                (local(config), config.eval.batch))
  replies: list[Iterator[Reply]] = []

  def make(start: int, stop: int) -> list[Row]:
    if not replies:  # all that is left, of which an endpoint answers some ahead
      replies.append(ask([request(rubric, x) for x in pairs[start:] if x.a != x.b]))
    rows = [judgement(x, next(replies[0]) if x.a != x.b else Reply(TIE, "same", None))
            for x in pairs[start:stop]]
    if stop % 100 < stop - start or stop == len(pairs):
      progress.note(f"judged: {stop} of {len(pairs)}")
    return rows

  return stages.rows(folder / "judgements.jsonl", len(pairs), block, make)


def request(rubric: str, pair: Pair) -> chat.Messages:
  """What the judge is asked about a pair."""
  shown = (pair.b, pair.a) if pair.flipped else (pair.a, pair.b)
  return chat.fill(rubric, pair.messages, dict(zip(("first", "second"), shown)))


def judgement(pair: Pair, reply: Reply) -> Row:
  """The row of a pair."""
  who = dict(zip(LABELS, "ba" if pair.flipped else "ab")) | {TIE: TIE, None: None}
  return dict(prompt=pair.prompt, question=pair.messages[-1]["content"], a=pair.a, b=pair.b,
              flipped=pair.flipped, said=reply.said, by=reply.by, preferred=who[reply.label],
              how=reply.how)


def local(config: ml_collections.ConfigDict) -> Ask:
  """A model of ours as the judge: the label that it finds likelier as the beginning of a reply."""
  mesh, key = sharding.make_mesh(**config.mesh), keys.root(config.seed)
  policies.check_rows("eval.batch", config.eval.batch, mesh)

  def ask(requests: Sequence[chat.Messages]) -> Iterator[Reply]:
    with jax.set_mesh(mesh):
      policy = policies.load(config.judge, config.model, key, mesh)
      opcd.check_fits(config, "judge", policy, max(map(len, map(policy.tokenizer.encode, LABELS))))
      choose = judges.choose(policy, LABELS, in_context.widths(config.context), config.eval.batch,
                             mesh)
    for start in range(0, len(requests), config.eval.batch):
      with jax.set_mesh(mesh):
        found = choose(policy.params, requests[start:start + config.eval.batch])
      yield from map(of_logprobs, found)

  return ask


def of_logprobs(found: tuple[float, ...] | None) -> Reply:
  """The choice of a model that gives the labels these log-probabilities, nats."""
  if found is None:
    return Reply(None, "too long", None)
  if not np.isfinite(found).all():
    return Reply(None, "unreadable", None)
  first, second = found
  return Reply(TIE if first == second else LABELS[second > first], "chosen", list(found))


def remote(config: ml_collections.ConfigDict) -> Ask:
  """The model behind an endpoint as the judge."""
  return lambda requests: map(of_answer, endpoint.make(config.endpoint)(requests))


def of_answer(answer: endpoint.Answer) -> Reply:
  """The choice in an endpoint's answer."""
  if answer.how in ("refused", "too long"):
    return Reply(None, answer.how, answer.text, answer.model)
  label = choice(answer.text, answer.how == "ended")
  how = "chosen" if label else "unreadable" if answer.how == "ended" else "cut off"
  return Reply(label, how, answer.text, answer.model)


def choice(text: str, ended: bool) -> str | None:
  """The choice that a reply ends with: a label or TIE; None if it cannot be read.

  Args:
    text: the reply; thoughts in it do not count.
    ended: whether it came to its end. If not, only a choice alone is one.
  """
  words = re.findall(r"\w+", chat.without_thinking(text))
  if not words or not (ended or len(words) == 1):
    return None
  last = TIE if words[-1].lower() == TIE else words[-1]
  others = {*LABELS} - {last}
  return last if last in (*LABELS, TIE) and not others & {*words} else None
