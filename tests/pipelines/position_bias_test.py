"""The study of position bias: its models, its runs and what it leaves."""

import functools
import json
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, main, progress, sharding
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evals import position_bias as evals
from opd_jax.pipelines import evaluation, position_bias
from opd_jax.pipelines import policy as policies

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def small(**changes):
  settings = dict(
      data=dict(builder_kw=dict(train=64, test=64, mix=dict(plain=1.0), seed=7, digits=(1,),
                                min_steps=3, max_steps=4)),
      writers=("jsonl",), parts=(), cuts=(0.5,), continuations=2, checkpoint=dict(keep_best=0),
      rollout=dict(prompts=4, group_size=1, max_prompt=32, max_response=44, slots=16),
      eval=dict(prompts=3, samples=2, ks=(1,), batch=2))
  for key, value in changes.items():
    settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
  return configs.position_bias(**settings)


class ModelsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    self.enter_context(jax.set_mesh(self.mesh))

  def policy(self, config, name="student"):
    return policies.load(config[name], config.model, keys.root(0), self.mesh)

  def test_greedy_the_student_finishes_its_own_prefixes_as_before_at_every_cut(self):
    config = small(eval=dict(temperature=0.0, prompts=16, batch=16))
    student = self.policy(config)
    rows, _ = evaluation.read_rows(config, student)
    responses = position_bias.own_responses(config, student, rows)
    asked = position_bias.prompts(config, rows)
    self.assertTrue(all(x[-1] in student.tokenizer.eos_ids for x in responses))
    finished = []

    def judge(whole, each):
      finished.append(whole)
      return np.zeros(len(whole))

    evals.rescue(asked, responses, FRACTIONS, 1, config.rollout.max_response,
                 {"student": position_bias.finisher(config, student)}, judge)
    self.assertEqual(finished, [responses] * (1 + len(FRACTIONS)))

  def test_answers_meet_their_own_responses(self):
    tokenizer = tokenizers.byte_tokenizer()
    seen = []

    def verify(texts, answers):
      seen.extend(zip(texts, answers, strict=True))
      return [mock.Mock(reward=float(text == answer)) for text, answer in zip(texts, answers)]

    judge = position_bias.judge(tokenizer, verify, ["a", "b", "c"])
    texts = [x for row in ("a", "b", "c", "a", "c", "b") for x in (row, row)]  # two of each row
    np.testing.assert_array_equal(judge([tokenizer.encode(x) for x in texts], 2),
                                  [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    self.assertLen(seen, 12)

  def test_the_gap_of_a_row_is_its_own_and_a_model_has_none_to_itself(self):
    config = small()
    student, teacher = self.policy(config), self.policy(config, "teacher")
    rows, _ = evaluation.read_rows(config, student)
    responses = [[*student.tokenizer.encode("3+4=7\n" * n), student.tokenizer.end_id]
                 for n in (1, 2, 5, 6, 0, 3)]
    gap = functools.partial(position_bias.gap, policy=student, responses=responses, rows=rows,
                            mesh=self.mesh)
    found, mask = gap(config, teacher=teacher)  # 2 of 3 prompts at a time: the last is filled up
    self.assertEqual(mask.sum(axis=1).tolist(), list(map(len, responses)))
    self.assertGreater(found["reverse_kl"][mask].mean(), 0.01)
    same, _ = gap(small(eval=dict(batch=3)), teacher=student)
    np.testing.assert_allclose(same["student"][mask], found["student"][mask], atol=1e-4)
    np.testing.assert_allclose(same["student"][mask], same["teacher"][mask], atol=1e-5)
    np.testing.assert_allclose(same["reverse_kl"][mask], 0.0, atol=1e-5)


class RunsTest(absltest.TestCase):

  def test_the_runs_differ_in_the_tokens_they_learn_from(self):
    runs = position_bias.plan(small(parts=(0.5, 0.3), loss=dict(aggregate="sequence_mean"), seed=3))
    self.assertEqual({name: (c.loss.weight, c.loss.position.side, c.loss.position.fraction)
                      for name, c in runs.items()}, {
                          "all tokens": ("uniform", "prefix", 0.3),
                          "first 30%": ("position", "prefix", 0.3),
                          "first 50%": ("position", "prefix", 0.5),
                          "last 30%": ("position", "suffix", 0.3),
                          "last 50%": ("position", "suffix", 0.5)})
    for config in runs.values():
      self.assertEqual((config.pipeline, config.seed, config.loss.aggregate, config.eval.prompts),
                       ("opd", 3, "sequence_mean", 3))
    self.assertEqual(list(position_bias.plan(small(parts=(1.0,)))), ["all tokens"])
    self.assertEqual(position_bias.plan(small()), {})

  def test_what_is_trained_is_not_trained_again_and_what_was_broken_off_is(self):
    config, workdir, ran = small(parts=(0.5,), total_steps=2), self.create_tempdir().full_path, []

    def train(run_config, where):
      ran.append(pathlib.Path(where).name)
      if ran == ["all_tokens", "first_50"]:
        return  # asked to stop
      rewards = dict(before=[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], after=[[1.0, 1.0]] * 3)
      pathlib.Path(where, "checkpoints", "2").mkdir(parents=True)
      pathlib.Path(where, "eval").mkdir()
      for step, when in ((0, "before"), (2, "after")):
        pathlib.Path(where, "eval", f"step_{step:06d}.json").write_text(
            json.dumps({"records": [dict(rewards=x) for x in rewards[when]]}))
      pathlib.Path(where, "metrics.jsonl").write_text(
          '{"step": 0, "eval/mean@2": 0.16}\n{"step": 2, "eval/mean@2": 1.0}\n')

    runs = position_bias.plan(config)
    with mock.patch.object(position_bias.opd, "run", train):
      self.assertFalse(position_bias.train(config, runs, workdir))
      self.assertTrue(position_bias.train(config, runs, workdir))
      self.assertTrue(position_bias.train(config, runs, workdir))
    self.assertEqual(ran, ["all_tokens", "first_50", "first_50", "last_50"])
    mask = np.arange(4) < np.array([4, 4, 4, 4, 4, 4])[:, None]
    kl = np.broadcast_to([0.0, 1.0, 2.0, 3.0], (6, 4))
    found = position_bias.learned(workdir, "last 50%", runs["last 50%"], kl, mask,
                                  evals.resample(3, 0))
    self.assertAlmostEqual(found["share_of_kl"]["mean"], 5 / 6)
    self.assertAlmostEqual(found["change"]["mean"], 5 / 6)
    self.assertEqual(found["curve"], [[0, 0.16], [2, 1.0]])
    # Another config would mix runs: the workdir belongs to the first.
    main.remember(config, workdir)
    with self.assertRaisesRegex(ValueError, "continuations: 2 there, 3 now"):
      main.remember(small(parts=(0.5,), total_steps=2, continuations=3), workdir)


class StudyTest(parameterized.TestCase):

  def test_it_leaves_tables_numbers_and_picture(self):
    config = small(after=dict(source="tiny:student"))
    workdir, tables = self.create_tempdir().full_path, {}

    def finisher(config, policy):  # who answers, right now and then, without a model
      answer = lambda i, limit: policy.tokenizer.encode(f"#### {i % 3}")[:limit - 1]
      return lambda asked, limits, call: [
          [*answer(i + call, limit), policy.tokenizer.end_id] for i, limit in enumerate(limits)]

    def gap(config, policy, responses, **rest):
      mask = np.arange(44) < np.array([[len(x)] for x in responses])
      return {name: -np.ones(mask.shape) for name in ("reverse_kl", "student", "teacher")}, mask

    configs.validate(config)
    with (mock.patch.object(position_bias, "finisher", finisher),
          mock.patch.object(position_bias, "gap", gap),
          mock.patch.object(progress, "table", lambda title, *rest: tables.update({title: rest}))):
      main.pick(config.pipeline).run(config, workdir)
    found = json.loads(pathlib.Path(workdir, "position_bias.json").read_text())
    self.assertEqual((found["prompts"], found["responses"], found["continuations"]), (3, 6, 2))
    self.assertEqual(found["fractions"], [0.0, 0.5, 1.0])
    rescue = found["rescue"]
    self.assertEqual(rescue["student"]["mean"][2], rescue["teacher"]["mean"][2])
    self.assertEqual(rescue["student_of_wrong"]["mean"][2], 0.0)
    self.assertEqual(rescue["difference"]["mean"], [0.0, 0.0, 0.0])
    self.assertEqual(found["before"], found["after"])
    self.assertEqual(found["before"]["reverse_kl"]["mean"][-1], -1.0)
    self.assertEqual([len(rows) for _, rows in tables.values()], [3, 11, 12])
    self.assertEqual(pathlib.Path(workdir, "position_bias.png").read_bytes()[:4], b"\x89PNG")

  @parameterized.parameters(
      (dict(cuts=(0.5, 0.0)), r"cuts is \(0.5, 0.0\); it must be numbers, each above 0"),
      (dict(cuts=(1.5,)), r"cuts is \(1.5,\).* at most 1"),
      (dict(parts=(-0.3,)), r"parts is \(-0.3,\)"),
      (dict(continuations=0), "continuations is 0; it must be at least 1"),
      (dict(loss=dict(weight="iw_opd")), "unknown config key config.loss.weight"),
      (dict(parts=(0.3,), loss=dict(lam=2.0)), "loss.lam is 2.0, which has no effect"),
      (dict(teacher=dict(source="")), "teacher.source is ''; this study compares"),
      (dict(after=dict(source="tiny:teacher")),
       "after.source='tiny:teacher' cannot be student.source='tiny:student' once trained: it has "),
      (dict(after=dict(source="workdir:nowhere")), "nowhere is no workdir"),
      (dict(rollout=dict(max_response=500)), "32 . 500 = 532 tokens, but the student allows 512"),
  )
  def test_bad_input_is_refused_before_anything_is_sampled(self, changes, message):
    with mock.patch.object(position_bias, "own_responses") as sample:
      with self.assertRaisesRegex(ValueError, message):
        config = small(**changes)
        configs.validate(config)
        main.pick(config.pipeline).run(config, self.create_tempdir().full_path)
    sample.assert_not_called()

  def test_a_teacher_of_another_tokenizer_is_refused(self):
    folder = self.create_tempdir().full_path
    tokenizers.byte_tokenizer().save(folder)
    with self.assertRaisesRegex(ValueError, "tokenizer"):
      position_bias.run(small(teacher=dict(tokenizer=folder)), self.create_tempdir().full_path)


if __name__ == "__main__":
  absltest.main()
