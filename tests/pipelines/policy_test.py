"""Two models of one tokenizer, padded differently, are cut to what they share."""

import dataclasses
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, main, progress, sharding, writer
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, source
from opd_jax.pipelines import evaluation, objective, opd
from opd_jax.pipelines import policy as policies

TOKENS = 320  # of the tiny models, whose vocabularies have no padding


def padded(name, size, folder):
  """A tiny model with padding as a folder; its padding copies real tokens, so it is likely."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  found = source.load(f"tiny:{name}", keys.root(0), mesh)
  table = found.params["embedding"]
  params = found.params | {"embedding": jnp.concatenate([table, table[:size - TOKENS]])}
  hf.export_hf(params, dataclasses.replace(found.config, vocab_size=size), folder,
               tokenizers.load(found.tokenizer_folder))
  return f"hf:{folder}"


def tiny(make=configs.on_policy, **changes):
  settings = dict(
      writers=("jsonl",), data=dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=24),
      eval=dict(prompts=4, samples=2, ks=(1,), batch=4))
  if make is configs.on_policy:
    settings |= dict(total_steps=2, log_every=1, optimizer=dict(learning_rate=1e-3),
                     checkpoint=dict(best_metric="eval/mean@2"))
    settings["rollout"] |= dict(prompts=4)
  return make(**settings, **changes)


class PaddingTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    self.enter_context(jax.set_mesh(self.mesh))

  def folder(self):
    return self.create_tempdir().full_path + "/model"

  def load(self, source_name, tokenizer=None):
    config = tiny()
    section = ml_collections.ConfigDict({**config.student, "source": source_name})
    return policies.load(section, config.model, keys.root(0), self.mesh, tokenizer)

  def run_pipeline(self, config):
    workdir = self.create_tempdir().full_path
    configs.validate(config)
    main.pick(config.pipeline).run(config, workdir)
    return workdir

  @parameterized.parameters((384, 320, 320), (320, 384, 320), (384, 352, 352))
  def test_different_padding_is_cut_to_the_smaller_with_a_notice(self, ours, theirs, size):
    student = self.load(padded("student", ours, self.folder()))
    teacher = self.load(padded("teacher", theirs, self.folder()))
    student_cut, others, notices = policies.match(student, {"teacher": teacher})
    self.assertLen(notices, 1)
    self.assertRegex(notices[0],
                     f"{ours} .student. and {theirs} .teacher.* cut to {size} and {size}")
    for before, after in zip((student, teacher), (student_cut, others["teacher"])):
      self.assertEqual(after.model.config.vocab_size, size)
      self.assertEqual((after.model.dtype, after.model.remat),
                       (before.model.dtype, before.model.remat))
      np.testing.assert_array_equal(after.params["embedding"], before.params["embedding"][:size])

  def test_the_same_padding_stays_and_nothing_is_said(self):
    student = self.load(padded("student", 384, self.folder()))
    teacher = self.load(padded("teacher", 384, self.folder()))
    _, others, notices = policies.match(student, {"teacher": teacher})
    self.assertEqual(notices, [])
    self.assertIs(others["teacher"].params, teacher.params)

  def test_no_model_is_cut_below_its_tokenizer_and_no_teacher_may_lack_ids(self):
    plain = self.load("tiny:student")
    longer = tokenizers.load(source.TINY / "teacher")
    longer.hf.add_tokens(["<tool>"])
    more = self.load(padded("teacher", 384, self.folder()), longer)
    student, others, notices = policies.match(plain, {"teacher": more})
    self.assertIs(student, plain)
    self.assertEqual(others["teacher"].model.config.vocab_size, TOKENS + 1)
    self.assertRegex("".join(notices), "cut to 320 and 321")
    with self.assertRaisesRegex(ValueError, "has 321 tokens, the teacher only 320 embeddings"):
      policies.match(more, {"teacher": plain})

  def test_padding_on_both_sides_neither_stops_a_run_nor_takes_its_tokens(self):
    workdir = self.run_pipeline(tiny(
        student=dict(source=padded("student", 384, self.folder())),
        teacher=dict(source=padded("teacher", 352, self.folder()))))
    lines = writer.read(workdir)
    self.assertTrue(all(np.isfinite(value) for line in lines for value in line.values()))
    self.assertEqual([line["teacher/dropped_tokens"] for line in lines
                      if "teacher/dropped_tokens" in line], [0, 0])
    # The checkpoint is that of the cut model, and says so to whoever loads it.
    self.assertEqual(self.load(f"workdir:{workdir}").model.config.vocab_size, 352)

  def test_an_evaluation_cuts_padding_too(self):
    notes = []
    with mock.patch.object(progress, "note", notes.append):
      workdir = self.run_pipeline(tiny(
          configs.evaluate, student=dict(source=padded("student", 384, self.folder())),
          teacher=dict(source="tiny:teacher")))
    self.assertIn("cut to 320 and 320", "".join(notes))
    self.assertTrue(np.isfinite(evaluation.read(workdir, "eval")["reverse_kl"]))


class ConstantsTest(absltest.TestCase):

  def test_the_teachers_head_is_made_once_and_only_for_a_loss_that_reads_it(self):
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
      for surrogate in objective.SURROGATES:
        config = tiny(loss=dict(surrogate=surrogate))
        student = policies.load(config.student, config.model, keys.root(0), mesh)
        method = opd.build(config, student, mesh)
        first, second = method.constants(None), method.constants(None)
        self.assertIs(first, second)
        if surrogate in ("score_function", "clipped"):
          self.assertIsNone(first)
        else:
          np.testing.assert_array_equal(first[0], method.teachers[""].params["embedding"].T)


if __name__ == "__main__":
  absltest.main()
