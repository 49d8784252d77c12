"""What is cached equals what is asked live, and a cache of anything else is refused."""

import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, main, progress, sharding, train_state
from opd_jax.data import builders, loader
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import source
from opd_jax.pipelines import opd, teacher_cache, teachers
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches

ROWS = dict(train=14, test=8, mix=dict(plain=1.0))  # not a multiple of the batch
TWO = dict(poor=dict(source="tiny:weak"), strong=dict(source="tiny:teacher"))
TO_TWO = dict(**ROWS, teachers={"1": "poor", "2": "strong"})
LOSS = dict(surrogate="jsd", top_k=8, top_of="teacher")


def tiny(**changes):
  """A run of seconds on the data's responses."""
  settings = dict(
      total_steps=2, log_every=1, writers=("jsonl",), export=True, student_share=0.0,
      data=dict(builder_kw=ROWS), loss=LOSS,
      rollout=dict(prompts=4, group_size=1, max_prompt=40, max_response=72,
                   response_buckets=(40,)),
      optimizer=dict(learning_rate=1e-3), eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
      checkpoint=dict(best_metric="eval/mean@2"))
  for section, values in changes.items():
    merge = isinstance(values, dict) and section in settings
    settings[section] = {**settings[section], **values} if merge else values
  return configs.on_policy(**settings)


def run(config, workdir):
  """The learned weights, and what was measured but for times and compilations."""
  configs.validate(config)
  main.pick(config.pipeline).run(config, workdir)
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  lines = [{name: value for name, value in json.loads(line).items()
            if not name.startswith(("time/", "compile/"))} for line in text.splitlines()]
  return safetensors.load_file(f"{workdir}/export/model.safetensors"), lines


def contents(folder):
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


class CacheTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    self.enter_context(jax.set_mesh(self.mesh))

  def folder(self):
    return self.create_tempdir().full_path

  def build(self, config):
    configs.validate(config)
    student = policies.load(config.student, config.model, keys.root(0), self.mesh)
    return opd.build(config, student, self.mesh)

  def rows(self, config, tokenizer, count=6):
    """Some rows of the data and a batch of their responses."""
    found = loader.Numbered(builders.open_source(
        config.data.builder, config.data.builder_kw, "train", config.data.cache))
    encode = loader.encode_answered(tokenizer, tuple(teachers.sections(config)))
    rows = [encode(found[i]) for i in range(count)][::-1]
    batch = batches.prompts([row["prompt_ids"] for row in rows], 1, (40,), 0,
                            [row["teacher_id"] for row in rows])
    return rows, batches.answered(batch, [row["response_ids"] for row in rows], (72,), 0)

  def score(self, method, batch):
    return method.score(train_state.TrainState(0, method.student.params, None, None), batch)


class SameTest(CacheTest):

  def test_loss_and_gradient_of_cached_words_equal_those_of_the_teachers(self):
    changes = dict(teachers=TWO, data=dict(builder_kw=TO_TWO), loss=dict(
        surrogate="forward_kl", tail="renormalize", weight="iw_opd", micro_batches=2))
    live = self.build(tiny(**changes))
    cached = self.build(tiny(teacher_cache=self.folder(), **changes))
    self.assertEmpty(cached.teachers)
    rows, batch = self.rows(tiny(**changes), live.student.tokenizer)
    found = []
    for method in (live, cached):
      scored = self.score(method, method.recall(batch, rows))
      step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
      found.append((scored, step(live.student.params, scored, method.constants(None))))
    (asked, ((want, _), gradient)), (recalled, ((total, _), also)) = found
    self.assertIsNone(recalled.teacher_hidden)
    self.assertEqual(set(batch.teacher_id), {0, 1})
    np.testing.assert_array_equal(recalled.learn, asked.learn)
    np.testing.assert_allclose(np.asarray(recalled.teacher_logprobs)[batch.mask],
                               np.asarray(asked.teacher_logprobs)[batch.mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size),
                 also, gradient)

  def test_a_run_on_cached_words_learns_the_same_and_loads_no_teacher(self):
    plain = dict(optimizer=dict(learning_rate=1.0, eps=10.0))  # updates in proportion to gradients
    weights, lines = run(tiny(**plain), self.folder())
    cache = self.folder()
    self.build(tiny(teacher_cache=cache))
    loaded, notes = [], []
    load = policies.load
    with mock.patch.object(policies, "load", lambda section, *x: (
        loaded.append(section.source), load(section, *x))[1]), \
         mock.patch.object(progress, "note", notes.append):
      found, also = run(tiny(teacher_cache=cache, **plain), self.folder())
    self.assertEqual(loaded, ["tiny:student"])
    self.assertIn("no teacher is loaded", "".join(notes))
    start = safetensors.load_file(source.TINY / "student" / "model.safetensors")
    for name, value in weights.items():
      moved = np.linalg.norm(value - start[name])
      self.assertGreater(moved, 0.0, name)
      self.assertLess(np.linalg.norm(found[name] - value), 1e-3 * moved, name)
    for ours, theirs in zip(also, lines, strict=True):
      self.assertEqual(theirs.keys() - ours.keys(), {"eval/reverse_kl"} & theirs.keys())
      for name in ours.keys() & {"loss/total", "teacher/reverse_kl", "eval/mean@2"}:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)

  def test_own_responses_ask_the_teacher_and_the_datas_the_cache(self):
    config = tiny(teacher_cache=self.folder(), student_share=0.5, teacher_memory="host")
    method = self.build(config)
    rows, batch = self.rows(config, method.student.tokenizer)
    own, datas = self.score(method, batch), self.score(method, method.recall(batch, rows))
    self.assertIsNone(own.teacher_top_logprobs)
    self.assertIsNone(datas.teacher_hidden)
    np.testing.assert_allclose(np.asarray(datas.teacher_logprobs)[batch.mask],
                               np.asarray(own.teacher_logprobs)[batch.mask], rtol=1e-5, atol=1e-5)


class MakingTest(CacheTest):

  def test_a_making_that_was_broken_off_goes_on_where_it_was(self):
    whole, broken = self.folder(), self.folder()
    self.build(tiny(teacher_cache=whole))
    keep, kept = teacher_cache._keep, []

    def breaking(cache, part, found):
      if len(kept) == 2:
        raise KeyboardInterrupt
      kept.append(part)
      keep(cache, part, found)

    with mock.patch.object(teacher_cache, "_keep", breaking), self.assertRaises(KeyboardInterrupt):
      self.build(tiny(teacher_cache=broken))
    self.assertEqual(np.load(f"{broken}/done.npy").sum(), 8)
    with mock.patch.object(teacher_cache, "_keep", lambda *x: (kept.append(x[1]), keep(*x))):
      self.build(tiny(teacher_cache=broken))
    self.assertCountEqual(np.concatenate(kept), range(ROWS["train"]))  # nobody is asked twice
    self.assertEqual(contents(broken), contents(whole))

  def test_rows_that_a_longer_response_lets_in_are_added(self):
    cache = self.folder()
    self.build(tiny(teacher_cache=cache, rollout=dict(max_response=40)))
    short = np.load(f"{cache}/done.npy")
    self.build(tiny(teacher_cache=cache))
    self.assertBetween(short.sum(), 1, ROWS["train"] - 1)
    self.assertTrue(np.load(f"{cache}/done.npy").all())

  def test_fewer_of_the_most_likely_tokens_are_the_first_of_more(self):
    cache = self.folder()
    self.build(tiny(teacher_cache=cache))
    method = self.build(tiny(teacher_cache=cache, loss=dict(top_k=3)))
    rows, batch = self.rows(tiny(), method.student.tokenizer)
    found = method.recall(batch, rows)
    length = len(rows[0]["response_ids"])
    start = np.load(f"{cache}/lengths.npy")[:rows[0]["index"], 1].sum()
    np.testing.assert_array_equal(found.teacher_top_ids[0, :length],
                                  np.load(f"{cache}/ids.npy")[start:start + length, :3])
    self.assertTrue(np.all(np.diff(found.teacher_top_logprobs, axis=-1) <= 0.0))


class RefusedTest(CacheTest):

  made, teacher = "", ""

  def setUp(self):
    super().setUp()
    if not self.made:  # once for all tests
      made, teacher = tempfile.mkdtemp(), f"{tempfile.mkdtemp()}/teacher"
      self.addClassCleanup(shutil.rmtree, made)
      self.addClassCleanup(shutil.rmtree, teacher)
      shutil.copytree(source.TINY / "teacher", teacher)
      self.build(tiny(teacher_cache=made, teacher=dict(source=f"hf:{teacher}")))
      type(self).made, type(self).teacher = made, teacher

  def refuse(self, pattern, **changes):
    before = contents(self.made)
    settings = dict(teacher_cache=self.made, teacher=dict(source=f"hf:{self.teacher}"))
    with self.assertRaisesRegex(ValueError, pattern):
      self.build(tiny(**{**settings, **changes}))
    self.assertEqual(contents(self.made), before)

  def test_another_teacher(self):
    self.refuse("another teacher: hf:.*there, tiny:weak .* now.*another folder",
                teacher=dict(source="tiny:weak"))
    self.refuse("another teacher poor: none there, tiny:weak", teachers=TWO,
                teacher=dict(source=""), data=dict(builder_kw=TO_TWO))

  def test_the_same_teacher_elsewhere_is_the_same(self):
    self.build(tiny(teacher_cache=self.made))  # tiny:teacher

  def test_other_weights_in_the_same_folder(self):
    file = pathlib.Path(self.teacher, "model.safetensors")
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    self.refuse("another teacher: hf:(.*) \\(.*\\) there, hf:\\1 \\(.*\\) now")
    file.write_bytes(before)

  def test_another_tokenizer_or_chat_template(self):
    folder = self.folder()
    tokenizers.byte_tokenizer().save(folder)
    self.refuse("another tokenizer", student=dict(tokenizer=folder),
                teacher=dict(source=f"hf:{self.teacher}", tokenizer=folder))
    self.refuse("another chat template", student=dict(
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"))

  @parameterized.parameters(
      (dict(data=dict(builder_kw=dict(ROWS, seed=5))), "another data set: 14 rows of arithmetic"),
      (dict(data=dict(builder_kw=dict(ROWS, train=13))), "another data set: 14 .* 13 rows"),
      (dict(loss=dict(top_k=9)), "holds the 8 most likely tokens, and loss.top_k is 9"),
      (dict(model=dict(compute_dtype="bfloat16")), "compute_dtype: float32 .*, bfloat16 .* now"))
  def test_other_data_or_numbers(self, changes, pattern):
    self.refuse(pattern, **changes)

  @parameterized.parameters(
      (dict(loss=dict(top_k=0, top_of="student")), "top_k is 0.*set loss.top_k=K"),
      (dict(loss=dict(top_of="student")), "loss.top_of 'student'.*'teacher'"),
      (dict(student_share=1.0), "student_share is 1.*set student_share below 1"),
      (dict(checkpoint=dict(best_metric="eval/reverse_kl")), "best_metric is 'eval/reverse_kl'"))
  def test_what_cannot_be_known_ahead(self, changes, pattern):
    with self.assertRaisesRegex(ValueError, pattern):
      self.build(tiny(teacher_cache=self.made, **changes))

  def test_a_row_without_a_response(self):
    rows = [dict(id=str(i), question="1+1", answer="2", solution="2" * (i != 3)) for i in range(8)]
    file = self.create_tempfile(content="\n".join(map(json.dumps, rows))).full_path
    with self.assertRaisesRegex(ValueError, "row '3' has an empty `response`"):
      self.build(tiny(teacher_cache=self.folder(), data=dict(builder="jsonl", builder_kw=dict(
          train=file, test=file, question="question", answer="answer", response="solution"))))

  def test_files_that_are_not_whole(self):
    for name, keep in (("manifest.json", 9), ("top.npy", 200), ("done.npy", 0)):
      folder = f"{self.folder()}/copy"
      shutil.copytree(self.made, folder)
      os.truncate(f"{folder}/{name}", keep)
      with self.assertRaisesRegex(ValueError, "cannot be read as a teacher cache.*delete"):
        self.build(tiny(teacher_cache=folder))


if __name__ == "__main__":
  absltest.main()
