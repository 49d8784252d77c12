"""Does OPCD's self-teacher answer better behind a critique? Of what a claims' cell gathered.

    python tests/bench/self_teacher.py runs/claims_opcd

A row a model and a kind of triples: right answers, %, to the plain question, behind the critique
alone (what the teacher of OPCD sees), and behind the attempt and its critique (a refinement).
"""

import json
import sys

import jax
import ml_collections
import numpy as np

from configs.claims import opcd as claims
from opd_jax import keys, sharding, verifiers
from opd_jax.claims import markdown
from opd_jax.data import chat
from opd_jax.pipelines import opcd, responder
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts.sampler import Sampling

MODELS = ("tiny:student", "hf:results/opcd/stages/strong")


def rewards(config, source, triples, mesh, verify):
  """f64[3, triples] of answers to the three kinds of requests."""
  student = policies.load(ml_collections.ConfigDict(config.student.to_dict() | dict(source=source)),
                          config.model, keys.root(config.seed), mesh)
  rows = {row["id"]: row for row in opcd.questions(config, student)}
  longer = ml_collections.ConfigDict(config.rollout.to_dict() | dict(
      max_prompt=config.context.budget, prompt_buckets=tuple(config.context.buckets)))
  section, block = config.rollout, config.rollout.prompts * config.rollout.group_size
  say = responder.make(student, longer,
                       Sampling(section.temperature, section.top_k, section.top_p), block, mesh)
  asked = [json.loads(rows[x["prompt"]]["messages"]) for x in triples]
  right = [rows[x["prompt"]]["answer"] for x in triples]
  kinds = (asked, [chat.with_critique(q, x["critique"]) for q, x in zip(asked, triples)],
           [chat.refine_request(q, x["answer"], x["critique"]) for q, x in zip(asked, triples)])
  found = []
  for kind, conversations in enumerate(kinds):
    said = [x for start in range(0, len(asked), block) for x in say(
        student.params, conversations[start:start + block],
        jax.random.fold_in(jax.random.key(kind), start))]
    found.append([x.reward for x in verify([x.text if x else "" for x in said], right)])
  return np.array(found)


def main(workdir):
  config = claims.get_config().methods.opcd
  triples = opcd.read(f"{workdir}/methods/opcd-s0", 0)
  kept = np.array([x["kept"] for x in triples])
  mesh, table = sharding.make_mesh(**config.mesh), []
  with jax.set_mesh(mesh), verifiers.make(**config.verifier) as verify:
    for source in MODELS:
      found = rewards(config, source, triples, mesh, verify)
      table += [[f"`{source}`", name, str(where.sum()), *(f"{100 * x:.0f}" for x in
                                                         found[:, where].mean(axis=1))]
                for name, where in (("all", kept | ~kept), ("kept", kept), ("not kept", ~kept))]
  print(markdown.table(("model", "triples", "number", "plain", "behind the critique",
                        "refining the attempt"), table))


if __name__ == "__main__":
  main(*sys.argv[1:])
