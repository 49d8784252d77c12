"""Evaluation alone: a model on the held-out prompts, with a teacher's reverse KL if asked."""

import contextlib
import functools

import jax
import ml_collections

from opd_jax import keys, progress, sharding, verifiers
from opd_jax.data import builders
from opd_jax.pipelines import evaluation, opd
from opd_jax.pipelines import policy as policies
from opd_jax.writer import Writer


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Evaluates `config.student`, a Hugging Face folder or one of our workdirs."""
  mesh = sharding.make_mesh(**config.mesh)
  policies.check_rows("eval.batch x eval.samples", config.eval.batch * config.eval.samples, mesh)
  root = keys.root(config.seed)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    student = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
    policies.check_lengths(student, "student", config.rollout)
    gap = None
    if config.teacher.source:
      teacher = policies.load(config.teacher, config.model, keys.at(root, "init", 1), mesh)
      student, others, notices = policies.match(student, {"teacher": teacher})
      teacher = others["teacher"]
      for line in notices:
        progress.note(line)
      exact = jax.jit(functools.partial(opd.reverse_kl, student.model, (teacher.model,)))
      gap = lambda params, batch: exact(params, (teacher.params,), batch)
    verify = stack.enter_context(verifiers.make(**config.verifier))
    writer = stack.enter_context(Writer(workdir, config, 0))
    scores = evaluation.make(config, student, verify, mesh, workdir, gap)(student.params, "eval")
    writer.write(0, evaluation.named(scores))
  progress.table(f"{config.student.source} on {builders.evaluated(config.data)[0]}", list(scores),
                 [[f"{value:.3f}" for value in scores.values()]])
  progress.note(f"records are in {workdir}/eval, readable samples in {workdir}/samples")
