"""Critique and refine: chains of answer, critique, refinement; their table and picture.

Every stage is a file in WORKDIR/chains, a row a line, made once:

    answers          S to the question
    weak_answers     W to the question
    critiques        W on each of S's answers
    refinements      S, shown its answer and the critique of it
    selected_KIND    S, shown its answer and the one critique selected for its prompt and k

A row has the `prompt`'s id, its `chain`, the `text` as sampled, the number of its `tokens`, its
`reward` (a critique has none), and `how` it came about:

    ended            with an end token
    cut off          at the length limit; a critique is shown as far as it goes
    too long         not at all: the conversation has more than rollout.max_prompt tokens
    no critique      not at all: the critic could not be asked, or said nothing but thoughts

What did not come about is empty, but instead of a refinement the answer stands: S refining without
a critique would be another method. All chains count.

Of guarded data the rows reach the disk without their texts, and only when all stages are made: the
table comes from them as well, but such a run cannot go on in the middle.

S and W talk in text, each in its own tokenizer and chat template; a question is taken if S has
room for it. Responses are verified whole, thoughts included, as in every evaluation.
"""

from collections.abc import Callable, Sequence
import functools
import json
import pathlib

import jax
from jax.sharding import Mesh
import ml_collections

from opd_jax import keys, progress, sharding, verifiers
from opd_jax.data import builders, chat
from opd_jax.evals import critique_refine
from opd_jax.pipelines import evaluation
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder as responders
from opd_jax.pipelines import stages
from opd_jax.pipelines.responder import Response
from opd_jax.pipelines.stages import Row
from opd_jax.rollouts.sampler import Sampling

# Their places are part of their keys: append, never reorder.
STAGES = ("answers", "weak_answers", "critiques", "refinements",
          *(f"selected_{kind}" for kind in critique_refine.KINDS))

# (name of the section that says how, conversations, key) -> a response each; None: too long
Speak = Callable[[str, Sequence[chat.Messages], jax.Array], list[Response | None]]
Ask = Callable[[Sequence[chat.Messages]], list[Response | None]]
Show = Callable[[str], str]  # a response -> what is shown of it


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Studies S, `config.student`, with W, `config.critic`; nothing is sampled twice."""
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  with jax.set_mesh(mesh), verifiers.make(**config.verifier) as verify:
    found = sample(config, workdir, mesh, verify)
  results = critique_refine.study(found, ks(config), config.eval.seed)
  critique_refine.report(results)
  path = pathlib.Path(workdir) / "critique_refine.json"
  path.write_text(json.dumps(results, indent=1, allow_nan=False))
  critique_refine.picture(results).savefig(path.with_suffix(".png"), dpi=100)
  progress.note(f"the numbers are in {path}, their picture beside it, the chains in "
                f"{chains_of(workdir)}")


def chains_of(workdir: str) -> pathlib.Path:
  """The folder of a run's stages."""
  return pathlib.Path(workdir) / "chains"


def read(workdir: str) -> dict[str, list[Row]]:
  """The stages that a run has left: name -> rows.

  Raises: ValueError if there are none.
  """
  folder = chains_of(workdir)
  found = {name: rows for name in STAGES if (rows := stages.read(folder / f"{name}.jsonl"))}
  if not found:
    raise ValueError(f"{folder} has no chains; name the workdir of a run of "
                     "configs/critique_refine.py")
  return found


def ks(config: ml_collections.ConfigDict) -> list[int]:
  """The k of pass@k, each once, in order."""
  return sorted(set(config.eval.ks))


def sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
  """The stages of a run in their order: name -> rows a prompt."""
  each = {name: config.eval.samples for name in STAGES[:4]}
  return each | {name: sum(ks(config)) for name in STAGES[4:] if config.reuse_critiques}


def sample(config: ml_collections.ConfigDict, workdir: str, mesh: Mesh,
           verify: verifiers.Verify) -> dict[str, list[Row]]:
  """All rows of every stage; those that are not on disk are made and left there.

  What a block of rows holds depends on its place and on the stages before, so a stage goes on
  wherever it was broken off. Data and models are opened for the first row that needs them.

  Raises: ValueError if rows on disk are of other prompts or weights, or if a model has not the
    positions for the lengths that the config allows.
  """
  folder, chains = chains_of(workdir), config.eval.samples
  strong, weak = (speaker(config, name, folder, mesh) for name in ("student", "critic"))
  prompts = functools.cache(lambda: read_prompts(config, folder))
  show = chat.without_thinking if config.remove_thinking else lambda text: text
  path = lambda name: folder / f"{name}.jsonl"
  totals = {name: config.eval.prompts * each for name, each in sizes(config).items()}
  # Without texts a stage is of no use to the next, so it is all of them or none.
  in_memory = builders.is_guarded(config.data) and any(
      len(stages.read(path(name))) != total for name, total in totals.items())
  found: dict[str, list[Row]] = {}

  def stage(name: str, make: Callable[[slice, list[Row], jax.Array], list[Row]]) -> None:
    """Fills in a stage; `make` is given places, the data's rows of these, and a key."""
    stream = keys.at(keys.root(config.eval.seed), "eval", STAGES.index(name))
    each, total = sizes(config)[name], totals[name]

    def block(start: int, stop: int) -> list[Row]:
      rows = [row for row in prompts()[start // each:stop // each] for _ in range(each)]
      made = make(slice(start, stop), rows, jax.random.fold_in(stream, start))
      progress.note(f"{name}: {stop} of {total}")
      return made

    found[name] = stages.rows(None if in_memory else path(name), total, config.eval.batch * each,
                              block)

  number = lambda rows: [{"prompt": row["id"], "chain": i % chains} for i, row in enumerate(rows)]
  to = lambda speak, how, key: lambda conversations: speak(how, conversations, key)
  stage("answers", lambda where, rows, key: answer(
      number(rows), rows, to(strong, "eval", key), verify))
  stage("weak_answers", lambda where, rows, key: answer(
      number(rows), rows, to(weak, "eval", key), verify))
  stage("critiques", lambda where, rows, key: criticize(
      number(rows), rows, found["answers"][where], to(weak, "critique", key), show))
  stage("refinements", lambda where, rows, key: refine(
      number(rows), rows, found["answers"][where], found["critiques"][where],
      to(strong, "refine", key), show, verify))
  for kind in critique_refine.KINDS if config.reuse_critiques else ():
    heads = select(config, found, kind)
    stage(f"selected_{kind}", lambda where, rows, key: reuse(
        heads[where], rows, found, found.get("selected_random", [])[where],
        to(strong, "refine", key), show, verify))
  if in_memory:
    for name, rows in found.items():
      bare = [{key: value for key, value in row.items() if key != "text"} for row in rows]
      path(name).unlink(missing_ok=True)
      stages.rows(path(name), len(bare), len(bare), lambda start, stop: bare)
  return found


def answer(heads: list[Row], rows: list[Row], ask: Ask, verify: verifiers.Verify) -> list[Row]:
  """A model's answers, graded.

  Args:
    heads: the beginnings of the rows to make.
    rows: of the data, one for each.
    ask: conversations -> responses.
    verify: texts and answers -> verdicts.
  """
  made = respond(heads, [question(row) for row in rows], ask)
  return grade(made, rows, verify)


def criticize(heads: list[Row], rows: list[Row], answers: list[Row], ask: Ask,
              show: Show) -> list[Row]:
  """W's critiques of S's answers, one for each row of the data."""
  return respond(heads, [chat.critique_request(question(row), show(given["text"]))
                         for row, given in zip(rows, answers)], ask)


def refine(heads: list[Row], rows: list[Row], answers: list[Row], critiques: list[Row], ask: Ask,
           show: Show, verify: verifiers.Verify) -> list[Row]:
  """S's refinements of its answers, each with the critique beside it; see the head of this file."""
  conversations = []
  for row, given, critique in zip(rows, answers, critiques):
    said = show(critique["text"])
    conversations.append(chat.refine_request(question(row), show(given["text"]), said)
                         if said.strip() else None)
  made = grade(respond(heads, conversations, ask), rows, verify)
  return [{**row, "text": given["text"], "reward": given["reward"]} if _is_empty(row) else row
          for row, given in zip(made, answers)]


def select(config: ml_collections.ConfigDict, found: dict[str, list[Row]],
           kind: str) -> list[Row]:
  """The beginnings of a stage's rows: of each prompt, k and chain, whose critique is shown."""
  before, after = (critique_refine.rewards(found[name]) for name in ("answers", "refinements"))
  heads = []
  for i, (was, now) in enumerate(zip(before, after)):
    prompt = found["answers"][i * len(was)]["prompt"]
    for k in ks(config):
      choice = critique_refine.select(was, now, k, kind, (config.eval.seed, i, k))
      heads += [{"prompt": prompt, "k": k, "chain": chain, "critique_of": choice.chain,
                 "fell_back": choice.fell_back} for chain in range(k)]
  return heads


def reuse(heads: list[Row], rows: list[Row], found: dict[str, list[Row]], same: list[Row],
          ask: Ask, show: Show, verify: verifiers.Verify) -> list[Row]:
  """S's refinements of its answers with selected critiques.

  Args:
    heads: from `select`.
    rows: of the data, one for each.
    found: the stages; answers and critiques are read.
    same: rows of these places with another choice of critiques, or none. Where that is the same
      critique its refinement is taken, so that kinds differ by their critiques and not by luck.
    ask, show, verify: as above.
  """
  answers, critiques = ({(row["prompt"], row["chain"]): row for row in found[name]}
                        for name in ("answers", "critiques"))
  taken = [i for i, (head, row) in enumerate(zip(heads, same))
           if head["critique_of"] == row["critique_of"]]
  fresh = sorted(set(range(len(heads))) - set(taken))
  made = refine([heads[i] for i in fresh], [rows[i] for i in fresh],
                [answers[heads[i]["prompt"], heads[i]["chain"]] for i in fresh],
                [critiques[heads[i]["prompt"], heads[i]["critique_of"]] for i in fresh],
                ask, show, verify)
  both = dict(zip(fresh, made)) | {i: {**same[i], **heads[i]} for i in taken}
  return [both[i] for i in range(len(heads))]


def respond(heads: list[Row], conversations: Sequence[chat.Messages | None],
            ask: Ask) -> list[Row]:
  """The rows of a model's responses; without a conversation nobody is asked."""
  asked = [i for i, messages in enumerate(conversations) if messages is not None]
  said = dict(zip(asked, ask([conversations[i] for i in asked]))) if asked else {}
  made = []
  for i, head in enumerate(heads):
    if response := said.get(i):
      made.append({**head, "text": response.text, "tokens": len(response.ids),
                   "how": "ended" if response.ended else "cut off"})
    else:
      made.append({**head, "text": "", "tokens": 0,
                   "how": "too long" if i in said else "no critique"})
  return made


def grade(made: list[Row], rows: list[Row], verify: verifiers.Verify) -> list[Row]:
  """The rows with their rewards; what did not come about has 0."""
  asked = [i for i, row in enumerate(made) if not _is_empty(row)]
  verdicts = verify([made[i]["text"] for i in asked], [rows[i]["answer"] for i in asked])
  rewards = dict(zip(asked, (verdict.reward for verdict in verdicts)))
  return [{**row, "reward": rewards.get(i, 0.0)} for i, row in enumerate(made)]


def question(row: Row) -> chat.Messages:
  """The conversation of a row of the data."""
  return json.loads(row["messages"])


def _is_empty(row: Row) -> bool:
  return row["how"] in ("too long", "no critique")


def read_prompts(config: ml_collections.ConfigDict, folder: pathlib.Path) -> list[Row]:
  """The rows of the data, of which the chains in `folder` must be; checks lengths on the way."""
  outlines = {name: policies.outline(config[name], config.model) for name in ("student", "critic")}
  for name, policy in outlines.items():
    policies.check_lengths(policy, name, config.rollout)
  policies.check_lengths(outlines["critic"], "critic", lengths(config, "critique"))
  rows, dropped = evaluation.read_rows(config, outlines["student"])
  if dropped:
    progress.note(f"{dropped} questions longer than rollout.max_prompt={config.rollout.max_prompt} "
                  "tokens are left out, and the next taken")
  known = stages.read(folder / "answers.jsonl")[::config.eval.samples]
  for row, other in zip(rows, known):
    if row["id"] != other["prompt"]:
      raise ValueError(f"the chains in {folder} are of other prompts ({other['prompt']!r} where "
                       f"the data has {row['id']!r} now): the data has changed since; choose "
                       "another workdir")
  return rows


def speaker(config: ml_collections.ConfigDict, name: str, folder: pathlib.Path,
            mesh: Mesh) -> Speak:
  """A model, loaded when it is first asked.

  Args:
    config: the whole config.
    name: of its section, "student" or "critic".
    folder: of the stages, which must have been made with the same weights.
    mesh: for its parameters and rows.
  """
  @functools.cache
  def load() -> policies.Policy:
    key = keys.at(keys.root(config.seed), "init", ("student", "critic").index(name))
    stages.begin_with(folder, f"{name}'s weights", lambda: policies.fingerprint(config[name], key))
    return policies.load(config[name], config.model, key, mesh)

  @functools.cache
  def responder(how: str) -> responders.Respond:
    section = config[how]
    return responders.make(
        load(), lengths(config, how), Sampling(section.temperature, section.top_k, section.top_p),
        config.eval.batch * config.eval.samples, mesh)

  return lambda how, conversations, key: responder(how)(load().params, conversations, key)


def lengths(config: ml_collections.ConfigDict, how: str) -> ml_collections.ConfigDict:
  """The `rollout` section for answers, critiques or refinements."""
  if how != "critique":
    return config.rollout
  return ml_collections.ConfigDict({**config.rollout,
                                    "max_response": config.critique.max_response})
