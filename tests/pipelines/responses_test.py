"""Rows made of rows: what is asked, what is kept, and that a run goes on where it was."""

import collections
import functools
import json
import math
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, main, sharding
from opd_jax.data import builders
from opd_jax.data.builders import rows as made
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responses
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer

DATA = dict(builder="arithmetic", builder_kw=dict(
    train=40, test=4, mix=dict(plain=1.0), seed=7))


def tiny(**changes):
  settings = dict(
      student=dict(source="tiny:student"), data=DATA, prompts=6, writers=("jsonl",),
      rollout=dict(prompts=4, group_size=3, max_prompt=96, max_response=48),
      batch=dict(tokens=1024, buckets=(64, 160), chunk=4))
  for key, value in changes.items():
    settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
  return configs.responses(**settings)


def run(config, workdir):
  configs.validate(config)
  main.remember(config, workdir)
  main.pick(config.pipeline).run(config, workdir)
  return read(workdir)


def read(workdir, name=made.FILE):
  return [json.loads(line) for line in pathlib.Path(workdir, name).read_text().splitlines()]


def row(id, text, response="", **more):
  return dict(id=id, task="t", level=0, answer="", teacher="", group="", response=response,
              messages=json.dumps([{"role": "system", "content": "S"},
                                   {"role": "user", "content": text}])) | more


keeping = functools.cache(lambda how: configs.responses(keep=how))


class KeepTest(parameterized.TestCase):
  """What stays of a row's responses, by hand."""

  def keep(self, how, *rewards, id="r", texts=None):
    members = [dict(response=text, reward=reward) for text, reward in zip(
        texts or "abcdefgh", rewards)]
    found = responses.keep(keeping(how), row(id, "q"), members)
    return found and [x["response"] for x in json.loads(found["group"])]

  @parameterized.parameters(
      ("all", (1.0, 2.0, math.nan), ["a", "b", "c"]),
      ("best", (1.0, 3.0, 2.0), ["b"]),
      ("best", (3.0, 3.0), ["a"]),
      ("best", (math.nan, -2.0, math.inf, -3.0), ["b"]),
      ("ranked_pair", (1.0, 5.0, 2.0), ["c", "a"]),
      ("ranked_pair", (2.0, 5.0, 2.0), ["a", "c"]),
      ("ranked_pair", (1.0, 5.0, -math.inf), ["b", "a"]),
      ("ranked_pair", (1.0, math.nan), None),
      ("best", (math.nan, math.nan), None),
      ("all", (), None),
  )
  def test_what_is_kept(self, how, rewards, want):
    self.assertEqual(self.keep(how, *rewards), want)

  def test_a_pair_differs(self):
    self.assertEqual(self.keep("ranked_pair", 1.0, 2.0, 1.0, texts="aba"), ["b", "a"])
    self.assertIsNone(self.keep("ranked_pair", 1.0, 1.0, texts="aa"))

  def test_the_first_is_the_rows_response(self):
    found = responses.keep(configs.responses(keep="best"), row("r", "q"), [
        dict(response="a", reward=0.0), dict(response="b", reward=1.0)])
    self.assertEqual(found["response"], "b")

  @parameterized.parameters(0.0, 0.7, -2.0)
  def test_preferences_are_drawn_as_bradley_and_terry_say(self, gap):
    first = [self.keep("drawn_pair", gap, 0.0, id=f"r{i}")[0] for i in range(4000)]
    want = 1.0 / (1.0 + math.exp(-gap))
    self.assertAlmostEqual(np.mean([x == "a" for x in first]), want,
                           delta=4 * math.sqrt(want * (1 - want) / 4000))
    self.assertEqual(first[:50], [self.keep("drawn_pair", gap, 0.0, id=f"r{i}")[0]
                                  for i in range(50)])  # and drawn once for all

  def test_rewards_that_lie_far_apart_are_no_overflow(self):
    self.assertEqual(self.keep("drawn_pair", 1e9, -1e9), ["a", "b"])
    self.assertEqual(self.keep("drawn_pair", -1e9, 1e9), ["b", "a"])


class RequestTest(absltest.TestCase):
  """What the student is asked, letter by letter."""

  def write(self, *rows):
    path = self.create_tempfile(content="".join(json.dumps(x) + "\n" for x in rows))
    return path.full_path

  def test_two_demonstrations_and_the_question(self):
    shots = self.write(row("d1", "one>", "1"), row("d2", "two>", "2"), row("d3", "three>", "3"))
    config = configs.responses(shots=dict(rows=shots))
    asked = responses.requests(config, [row("a", "two>"), *(row(f"b{i}", "q>") for i in range(40))])
    for messages in asked:
      self.assertEqual(messages[0], {"role": "system", "content": "S"})
    self.assertIn(asked[0][1]["content"], ("one>1\nthree>3\ntwo>", "three>3\none>1\ntwo>"))
    drawn = collections.Counter(messages[1]["content"] for messages in asked[1:])
    self.assertLen(drawn, 6)  # each prompt has its own, in any order
    self.assertEqual(asked, responses.requests(config, [
        row("a", "two>"), *(row(f"b{i}", "q>") for i in range(40))]))

  def test_another_response_to_the_same_question(self):
    weak = self.write(row("a", "x", "weak {question}"), row("b", "y", "other"))
    config = configs.responses(refine=dict(
        rows=weak, template="User: {question}\nWeak: {response}\nBetter?"))
    (_, asked), = responses.requests(config, [row("a", "why {response}")])
    self.assertEqual(asked["content"], "User: why {response}\nWeak: weak {question}\nBetter?")
    with self.assertRaisesRegex(ValueError, "no response for 1 rows .'c' is the first"):
      responses.requests(config, [row("a", "x"), row("c", "z")])

  def test_too_few_demonstrations(self):
    config = configs.responses(shots=dict(rows=self.write(row("d", "one>", "1"),
                                                          row("e", "two>", "2"))))
    with self.assertRaisesRegex(ValueError, "too few to draw shots.number=2"):
      responses.requests(config, [row("a", "two>")])


class RunTest(parameterized.TestCase):

  def test_scores_are_those_of_the_models_and_rewards_what_they_differ_by(self):
    workdir = self.create_tempdir().full_path
    found = run(tiny(scores=dict(weak_logprob=dict(source="tiny:teacher"),
                                 weak_reference_logprob=dict(source="tiny:weak")),
                     reward=dict(source="implicit", beta=0.5)), workdir)
    for one in found[:2]:
      for member in json.loads(one["group"])[:2]:
        for field, source in (("weak_logprob", "tiny:teacher"),
                              ("weak_reference_logprob", "tiny:weak")):
          np.testing.assert_allclose(
              member[field], self.alone(source, json.loads(one["messages"]), member["response"]),
              rtol=1e-4)
        self.assertAlmostEqual(member["reward"], 0.5 * (
            member["weak_logprob"] - member["weak_reference_logprob"]), places=5)
    # The rows are data for another run: K responses of which all that is needed is known.
    source = builders.open_source("rows", dict(train=f"{workdir}/rows.jsonl"), "train",
                                  self.create_tempdir().full_path)
    same = sorted((source[i] for i in range(len(source))), key=lambda x: x["id"])
    self.assertEqual(same, sorted(found, key=lambda x: x["id"]))
    # In the order of the file, which that of a source is not: parts of it have no row in common.
    part = lambda **which: list(builders.rows.splits(
        train=f"{workdir}/rows.jsonl", **which)["train"]())
    self.assertEqual(part(rows=1) + part(skip=1, rows=1) + part(skip=2), found)

  @functools.cache
  def policy(self, source):
    config, mesh = tiny(student=dict(source=source)), sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      return mesh, policies.load(config.student, config.model, keys.root(0), mesh)

  def alone(self, source, messages, text):
    """log pi(text), by the model on one row without any padding."""
    mesh, policy = self.policy(source)
    with jax.set_mesh(mesh):
      ids = policy.tokenizer.encode_chat(messages)
      said = [*policy.tokenizer.encode(text), policy.tokenizer.end_id]
      batch = batches.pair([ids], [said], len(ids), len(said), 0)
      return float(np.sum(scorer.logprobs(policy.model, policy.params, batch)[0]))

  def test_a_run_broken_off_in_any_stage_makes_the_same_rows(self):
    config = tiny(scores=dict(weak_logprob=dict(source="tiny:weak")), reward=dict(
        source="verifier"), keep="best")
    workdir = self.create_tempdir().full_path
    want = run(config, workdir)
    self.assertGreater(len(want), 2)
    for name in ("responses", "weak_logprobs", "rewards"):
      path = pathlib.Path(workdir, f"{name}.jsonl")
      whole = path.read_bytes()
      path.write_bytes(whole[:len(whole) * 5 // 6])  # in the middle of a line of the second block
      pathlib.Path(workdir, made.FILE).unlink()
      self.assertEqual(run(config, workdir), want)
      self.assertEqual(path.read_bytes(), whole)
    with mock.patch.object(policies, "load", side_effect=AssertionError):  # nobody is asked again
      self.assertEqual(run(config, workdir), want)
    with mock.patch.object(policies, "fingerprint", return_value="another"):
      with self.assertRaisesRegex(ValueError, "the student's weights changed since the rows"):
        run(config, workdir)

  def test_what_cannot_be_kept_is_counted(self):
    workdir = self.create_tempdir().full_path
    rows = run(tiny(prompts=12, rollout=dict(max_prompt=28, max_response=24)), workdir)
    metrics = read(workdir, "metrics.jsonl")[-1]
    said = [x for one in read(workdir, "responses.jsonl") for x in one["responses"]]
    self.assertEqual(metrics["rows/cut_off"], sum(not x["ended"] for x in said if x))
    self.assertEqual(metrics["rows/too_long"] * 3, said.count(None))
    self.assertEqual(metrics["rows/asked"], 12)
    self.assertEqual(metrics["rows/kept"], len(rows))
    self.assertBetween(len(rows), 1, 11)
    kept = [x for one in rows for x in json.loads(one["group"])]
    self.assertLen(kept, sum(bool(x and x["ended"] and x["response"]) for x in said))

  def test_rows_behind_those_of_another_run(self):
    first, second = (responses.read(tiny(skip=skip, prompts=4)) for skip in (0, 4))
    self.assertEmpty({x["id"] for x in first} & {x["id"] for x in second})
    self.assertLen(responses.read(tiny(skip=30, prompts=0)), 10)
    with self.assertRaisesRegex(ValueError, "ask for more rows than the 40"):
      responses.read(tiny(skip=38, prompts=4))

  @parameterized.parameters(
      (dict(keep="last"), "keep is 'last'; it must be one of all, best"),
      (dict(keep="best"), "chooses by rewards, and reward.source is ''"),
      (dict(reward=dict(source="implicit")), "a response without 'weak_logprob'"),
      (dict(student=dict(source=""), shots=dict(rows="x.jsonl")), "shots.rows is 'x.jsonl', which"),
      (dict(student=dict(source="")), "brings no `group` of responses, and student.source is ''"),
      (dict(shots=dict(template="{question}")), r"must hold \{response\}"),
      (dict(data=dict(builder="gpqa", builder_kw={})), "is guarded"),
      (dict(reward=dict(source="/nowhere"), keep="best"), "no workdir of a finished reward model"),
  )
  def test_what_does_not_go_together_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      run(tiny(**changes), self.create_tempdir().full_path)


if __name__ == "__main__":
  absltest.main()
