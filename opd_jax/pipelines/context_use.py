"""Runs evals/context_use.py on several models and leaves its table in the workdir."""

import json
import pathlib

import jax
from jax.sharding import Mesh
import ml_collections

from opd_jax import keys, progress, sharding
from opd_jax.data import builders, chat
from opd_jax.data.builders.arithmetic import chains
from opd_jax.evals import context_use
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder as responders
from opd_jax.rollouts.sampler import Sampling


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Studies each of `config.models`; `config.critic` writes the weak critiques."""
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("eval.batch", config.eval.batch, mesh)
  root = keys.root(config.seed)
  source = builders.open_eval(config.data)
  problems = [chains.parse(json.loads(source[i]["messages"])[-1]["content"])
              for i in range(config.eval.prompts)]
  results = {}
  with jax.set_mesh(mesh):
    open_policy = lambda section: load(config, section, root, mesh, problems)
    # All are loaded and checked before the first is studied: that takes long.
    studied = {name: open_policy(ml_collections.ConfigDict({**config.student, "source": name}))
               for name in config.models}
    critic = responder(config, open_policy(config.critic), mesh, root, Sampling(temperature=0.0))
    for name, policy in studied.items():
      respond = responder(config, policy, mesh, root, Sampling(config.eval.temperature))
      results[name] = context_use.study(problems, respond, critic)
      columns = list(results[name]["plain"])
      progress.table(name, ["", *columns], [
          [condition, *(f"{100 * found[c]:.0f}" if c in found else "" for c in columns)]
          for condition, found in results[name].items()])
  path = pathlib.Path(workdir) / "context_use.json"
  path.write_text(json.dumps(results, indent=1))
  progress.note(f"the numbers, of {len(problems)} questions, are in {path}")


def load(config: ml_collections.ConfigDict, section: ml_collections.ConfigDict, root: jax.Array,
         mesh: Mesh, problems: list[chains.Chain]) -> policies.Policy:
  """Loads a model and makes sure that the study's prompts will fit.

  Raises: ValueError naming the key to change.
  """
  policy = policies.load(section, config.model, root, mesh)
  policies.check_lengths(policy, section.source, config.rollout)
  longest = 0

  def rehearse(conversations: list[chat.Messages]) -> list[str]:
    nonlocal longest
    longest = max(longest, *(len(policy.tokenizer.encode_chat(c)) for c in conversations))
    return ["1" * config.rollout.max_response] * len(conversations)  # a digit is a token

  context_use.conditions(problems, rehearse, rehearse, seed=0)
  check_prompt(longest, config.rollout)
  return policy


def check_prompt(length: int, rollout: ml_collections.ConfigDict) -> None:
  """Refuses a prompt that no bucket holds."""
  if length > rollout.max_prompt:
    raise ValueError(
        f"a question with its context is up to {length} tokens long when answers and critiques "
        f"have rollout.max_response={rollout.max_response}, but rollout.max_prompt is "
        f"{rollout.max_prompt}; set it to {length} or more")


def responder(config: ml_collections.ConfigDict, policy: policies.Policy, mesh: Mesh,
              root: jax.Array, sampling: Sampling) -> context_use.Respond:
  """A model as a function from conversations to responses."""
  speak = responders.make(policy, config.rollout, sampling, config.eval.batch, mesh)

  def respond(conversations: list[chat.Messages]) -> list[str]:
    found = speak(policy.params, conversations, keys.at(root, "eval"))
    if None in found:  # text may come back as more tokens
      check_prompt(max(len(policy.tokenizer.encode_chat(c)) for c in conversations), config.rollout)
    return [response.text for response in found]

  return respond
