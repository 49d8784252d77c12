"""Which context knows a right response: evals/teacher_signal.py on the saved rollouts of a run.

    saved groups -> each response behind seven contexts of its peers -> scores -> metrics, intervals
"""

from collections.abc import Sequence
import json
import pathlib

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from opd_jax import keys, progress, sharding
from opd_jax.evals import paired, saved, teacher_signal
from opd_jax.losses import masked
from opd_jax.pipelines import evaluate, in_context
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.teachers import contexts

Groups = Sequence[saved.Group]


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Scores an evaluation of `config.run` by `config.student`; leaves a table and a picture.

  Without a run the student is evaluated first.

  Raises: ValueError if the run has no such evaluation, or its prompts no responses to compare.
  """
  source = config.run or workdir
  if not config.run and not saved.names(workdir):
    evaluate.run(config, workdir)
  groups = saved.read(source, config.evaluation or saved.last(source))
  if len(groups[0].responses) < 2:
    raise ValueError(f"the evaluations of {source} have one response a prompt, and so no peers; "
                     "evaluate it with --config=configs/eval.py --config.eval.samples=8")
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    policy = policies.load(config.student, config.model, keys.root(config.seed), mesh)
    in_context.check_lengths(config, policy)
    read = in_context.make(config.context, False, policy.model, policy.tokenizer.pad_id, mesh)
    scores = {name: score(config, policy, groups, name, read, mesh) for name in contexts.PEERS}
  results = teacher_signal.study(scores, np.array([group.rewards for group in groups]))
  progress.table(f"{config.student.source} on {results['candidates']} responses to "
                 f"{results['prompts']} prompts, [95% interval over prompts]",
                 *paired.table(results["means"]))
  for metric, names in teacher_signal.best(results).items():
    progress.note(f"best by {metric}: {', '.join(names) or 'undefined'}")
  path = pathlib.Path(workdir, "teacher_signal.json")
  path.write_text(json.dumps(results, indent=1, allow_nan=False))
  teacher_signal.picture(results).savefig(path.with_suffix(".png"))
  progress.note(f"the numbers, and differences from no context, are in {path}; their picture is "
                "beside it")


def score(config: ml_collections.ConfigDict, policy: policies.Policy, groups: Groups, name: str,
          read: in_context.Read, mesh: Mesh) -> np.ndarray:
  """f64[P, G], nats per token: each response's mean log-probability behind one context.

  Contexts are those of training: never with the response itself, nor with a peer that wrote the
  same. NaN where that leaves nothing to show, where the context has no room for all of it, or the
  response is too long.

  Args:
    config: reads `context`, `rollout` and `eval.batch`.
    policy: who scores.
    groups: P prompts with G responses each.
    name: of contexts.PEERS.
    read: from `in_context.make`, of the policy.
    mesh: rows are spread over its `replica` and `data` axes.
  """
  tokenizer, size = policy.tokenizer, len(groups[0].responses)
  settings = contexts.Settings(config.context.budget, name,
                               remove_thinking=config.context.remove_thinking)
  made = contexts.make(
      [contexts.Group(i, group.prompt, group.responses, group.rewards, [""] * size)
       for i, group in enumerate(groups)],
      settings, tokenizer, keys.at(keys.root(config.seed), "context"))
  if name == "plain":  # which gains nothing, and is read nevertheless
    made = [context._replace(shown=(contexts.Part("none", "", 0, 0),)) for context in made]
  # The end is a token like others, where there was one.
  responses = [[*tokenizer.encode(text), *[tokenizer.end_id] * ended] for group in groups
               for text, ended in zip(group.responses, group.ended)]
  asked = [tokenizer.encode_chat(group.prompt) for group in groups for _ in group.responses]
  fits = [i for i in range(len(made)) if made[i].shown and not made[i].dropped
          and 1 <= len(responses[i]) <= config.rollout.max_response
          and len(made[i].ids) <= config.context.budget
          and len(asked[i]) <= config.rollout.max_prompt]
  found, rows = np.full(len(made), np.nan), config.eval.batch * size
  for start in range(0, len(fits), rows):
    here = fits[start:start + rows]
    filled = here + here[-1:] * (rows - len(here))  # one shape for all
    batch = batches.answered(
        batches.prompts([asked[i] for i in filled], 1, (config.rollout.max_prompt,),
                        tokenizer.pad_id),
        [responses[i] for i in filled], (config.rollout.max_response,), tokenizer.pad_id)
    batch, _ = read(policy.params, jax.device_put(batch, sharding.of_batch(mesh)),
                    [made[i] for i in filled])
    found[here] = np.asarray(masked.row_mean(batch.teacher_logprobs, batch.mask))[:len(here)]
  return found.reshape(len(groups), size)
