"""Judging two sets of saved responses: who is preferred, the order drawn, and going on."""

import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as configs
from opd_jax import keys, main, sharding
from opd_jax.data import chat
from opd_jax.evals import position_bias
from opd_jax.pipelines import endpoint, evaluate, judged
from opd_jax.pipelines import judge as judges
from opd_jax.pipelines import policy as policies
from tests.pipelines import stub_endpoint
from tests.pipelines.stub_endpoint import says

RUBRIC = str(pathlib.Path(__file__).parents[2] / "configs/rubrics/preference.txt")
DATA = dict(builder="arithmetic", builder_kw=dict(train=1, test=20, mix=dict(plain=1.0), seed=7))
KEY = "sk-secret-1"


def pair(number, a, b, flipped=False):
  return judged.Pair(f"p{number}", chat.question(f"Question {number}"), a, b, flipped)


def shown(body):
  """The two responses in a request, as they stand."""
  _, _, rest = body["messages"][-1]["content"].partition("Response A:\n")
  first, _, rest = rest.partition("\n\nResponse B:\n")
  return first, rest.partition("\n\nWhich")[0]


def prefers_longer(n, body):
  first, second = shown(body)
  return says("A" if len(first) > len(second) else "**B**.")


class JudgedTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(os.environ, STUB_KEY=KEY, no_proxy="*"))
    self.enter_context(mock.patch.object(endpoint, "FIRST_PAUSE_S", 0.01))
    self.enter_context(mock.patch.object(position_bias, "RESAMPLES", 50))
    self.workdir = self.create_tempdir().full_path

  def rows(self, responses, question="Question"):
    """A file of rows."""
    return self.create_tempfile(content="".join(json.dumps(dict(
        id=f"p{i}", task="t", level=0, answer="", teacher="", group="", response=text,
        messages=json.dumps(chat.question(f"{question} {i}")))) + "\n"
        for i, text in responses.items())).full_path

  def config(self, url="", **changes):
    where = dict(endpoint=dict(url=url, model="judge-1", key_variable="STUB_KEY", retries=1))
    return configs.judged(**dict(rubric=RUBRIC, **(where if url else {})) | changes)

  def sides(self, count=20):
    return dict(a=dict(source=self.rows({i: "long " * (i + 2) for i in range(count)})),
                b=dict(source=self.rows({i: "short" for i in reversed(range(count))})))

  def run_(self, config):
    configs.validate(config)
    main.remember(config, self.workdir)
    main.pick(config.pipeline).run(config, self.workdir)
    return json.loads(pathlib.Path(self.workdir, "judged.json").read_text())

  def lines(self):
    text = pathlib.Path(self.workdir, "judgements.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  def test_an_endpoint_prefers_and_the_order_is_drawn(self):
    with stub_endpoint.Stub(prefers_longer) as stub:
      found = self.run_(self.config(stub.url, **self.sides()))
    self.assertEqual(found["means"]["win rate"], dict(mean=1.0, low=1.0, high=1.0, prompts=20))
    lines = self.lines()
    flips = {line["flipped"] for line in lines}
    self.assertEqual(flips, {True, False})
    self.assertLen(stub.asked, 20)
    asked = {asked["body"]["messages"][-1]["content"] for asked in stub.asked}
    for i, line in enumerate(lines):
      self.assertEqual((line["prompt"], line["question"]), (f"p{i}", f"Question {i}"))
      self.assertEqual((line["preferred"], line["how"], line["by"]), ("a", "chosen", "stub-2026"))
      self.assertEqual(line["said"], "**B**." if line["flipped"] else "A")
      a, b = "long " * (i + 2), "short"
      self.assertEqual((line["a"], line["b"]), (a, b))
      first, second = (b, a) if line["flipped"] else (a, b)
      self.assertTrue(any(f"Question {i}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n" in x
                          for x in asked))
    self.assertEqual({x["headers"]["Authorization"] for x in stub.asked}, {f"Bearer {KEY}"})
    for file in pathlib.Path(self.workdir).rglob("*"):
      if file.is_file():
        self.assertNotIn(KEY, file.read_text(), file)

  def test_what_is_on_disk_is_not_asked_again_and_the_order_stays(self):
    config = lambda stub, **changes: self.config(stub.url, **self.same, **changes)
    self.same = self.sides()
    whole = self.enter_context(stub_endpoint.Stub(prefers_longer))
    # An address of its own would be another config: one stub, which fails for a while.
    fails = [False]
    respond = lambda n, body: (500, {}, "down") if fails[0] and n >= 7 else prefers_longer(n, body)
    stub = self.enter_context(stub_endpoint.Stub(respond))
    first, self.workdir = self.workdir, self.create_tempdir().full_path
    self.run_(config(whole))
    wanted, self.workdir = self.lines(), first
    fails[0] = True
    with self.assertRaisesRegex(ValueError, "run the same command again"):
      self.run_(config(stub))
    path = pathlib.Path(self.workdir, "judgements.jsonl")
    kept = path.read_bytes()
    known = kept.count(b"\n")
    self.assertBetween(known, 7 - 4, 7)
    path.write_bytes(kept + b'{"prompt": "p7", "ques')  # a line that a kill has torn
    fails[0], before = False, len(stub.asked)
    self.run_(config(stub))
    self.assertEqual(self.lines(), wanted)
    self.assertStartsWith(path.read_text(), kept.decode())
    self.assertLen(stub.asked, before + 20 - known)
    self.run_(config(stub))  # all is there
    with mock.patch.dict(os.environ, STUB_KEY=""):
      self.run_(config(stub))  # not even a key is wanted
    self.assertLen(stub.asked, before + 20 - known)

  def test_fewer_at_once_may_go_on_but_another_judge_may_not(self):
    sides = self.sides(4)
    with stub_endpoint.Stub(prefers_longer) as stub:
      self.run_(self.config(stub.url, **sides))
      slower = self.config(stub.url, **sides)
      slower.endpoint.at_once, slower.endpoint.retries = 1, 9
      self.run_(slower)
      other = self.config(stub.url, **sides)
      other.endpoint.model = "judge-2"
      with self.assertRaisesRegex(ValueError, "endpoint.model: judge-1 there, judge-2 now"):
        self.run_(other)

  def test_other_responses_or_another_rubric_are_not_gone_on_with(self):
    sides, config = self.sides(4), lambda stub: self.config(stub.url, **sides)
    with stub_endpoint.Stub(prefers_longer) as stub:
      self.run_(config(stub))
      path = pathlib.Path(sides["a"]["source"])
      before = path.read_text()
      path.write_text(before.replace("long", "lang"))
      with self.assertRaisesRegex(ValueError, "the responses changed"):
        self.run_(config(stub))
      path.write_text(before)
      rubric = self.create_tempfile(content=pathlib.Path(RUBRIC).read_text()).full_path
      moved = config(stub)
      moved.rubric = rubric
      self.workdir = self.create_tempdir().full_path
      self.run_(moved)
      pathlib.Path(rubric).write_text("{question} {first} {second}?")
      with self.assertRaisesRegex(ValueError, "the rubric's words changed"):
        self.run_(moved)

  def test_what_cannot_be_read_is_counted_and_named(self):
    odd = {3: says("I like both."), 4: says(None, refusal="No."), 5: says("Well, A is", "length"),
           6: says("Tie.")}
    respond = lambda n, body: odd.get(
        int(body["messages"][-1]["content"].split("Question ")[1].split()[0]), says("A"))
    sides = self.sides(8)
    sides["b"]["source"] = self.rows({i: "long " * 3 if i == 1 else "short" for i in range(8)})
    with stub_endpoint.Stub(respond) as stub:
      found = self.run_(self.config(stub.url, **sides))
    self.assertLen(stub.asked, 7)  # one pair is of one text
    self.assertEqual(found["how"], dict(chosen=4, same=1, unreadable=1, refused=1,
                                        **{"cut off": 1}))
    self.assertEqual(found["unread"], [dict(prompt="p3", how="unreadable"),
                                       dict(prompt="p4", how="refused"),
                                       dict(prompt="p5", how="cut off")])
    self.assertEqual([x["preferred"] for x in self.lines()][1:7], ["tie"] + [
        "b" if self.lines()[2]["flipped"] else "a", None, None, None, "tie"])
    self.assertEqual(self.lines()[4]["said"], "No.")

  @parameterized.parameters(
      ("A", "A"), ("B", "B"), (" **A**\n", "A"), ("(B).", "B"), ("Response B", "B"),
      ("Shorter.\n\nAnswer: A", "A"), ("tie", "tie"), ("It is a Tie!", "tie"),
      ("<think>A? No, B.</think>A", "A"),
      ("", None), ("C", None), ("a", None), ("AB", None), ("I prefer B over A", None),
      ("A tie", None), ("A is better", None), ("neither", None), ("<think>so B", None))
  def test_a_choice_is_what_a_reply_ends_with(self, text, want):
    self.assertEqual(judged.choice(text, True), want)

  @parameterized.parameters(("A", "A"), ("B.", "B"), ("compare A", None), ("", None))
  def test_of_a_reply_cut_off_a_choice_alone_is_one(self, text, want):
    self.assertEqual(judged.choice(text, False), want)

  def test_pairs_are_of_the_prompts_that_both_have(self):
    a, b = self.rows({0: "x", 1: "y", 2: "z"}), self.rows({2: "Z", 5: "V", 0: "X"})
    config = self.config("http://x/v1", a=dict(source=a), b=dict(source=b))
    found = judged.read(config, self.workdir)
    self.assertEqual([(x.prompt, x.a, x.b) for x in found], [("p0", "x", "X"), ("p2", "z", "Z")])
    self.assertEqual([x[:4] for x in judged.read(self.config(
        "http://x/v1", a=dict(source=a), b=dict(source=b), prompts=1), self.workdir)],
                     [x[:4] for x in found[:1]])
    for other, message in ((self.rows({7: "x"}), "a has 3 prompts and b 1, and none"),
                           (self.rows({0: "x"}, "Another"), "prompt 'p0' is another in a"),
                           (self.workdir, "b.source .* has no evaluation"),
                           ("", "a.source .* is a file of rows; name b.source")):
      with self.assertRaisesRegex(ValueError, message):
        judged.read(self.config("http://x/v1", a=dict(source=a), b=dict(source=other)),
                    self.workdir)

  def test_flips_are_those_of_the_seed_and_half(self):
    sides = self.sides(200)
    flips = lambda seed: [x.flipped for x in judged.read(
        self.config("http://x/v1", seed=seed, **sides), self.workdir)]
    self.assertEqual(flips(3), flips(3))
    self.assertNotEqual(flips(3), flips(4))
    self.assertBetween(sum(flips(3)), 70, 130)

  @parameterized.parameters(dict(), dict(judge=dict(source="tiny:teacher"), url="http://x/v1"))
  def test_one_judge_is_named(self, url="", **changes):
    with self.assertRaisesRegex(ValueError, "one of them must name the judge"):
      judged.run(self.config(url, **self.sides(2), **changes), self.workdir)

  def test_a_rubric_without_a_placeholder_is_refused(self):
    path = self.create_tempfile(content="{question} {first}?").full_path
    with self.assertRaisesRegex(ValueError, r"lacks \{second\}; it must hold \{question\}"):
      judged.run(self.config("http://x/v1", **self.sides(2), rubric=path), self.workdir)

  def test_placeholders_in_a_response_are_text(self):
    one = pair(0, "{second} {question}", "{first}", flipped=True)
    self.assertEqual(judged.request("{question}|{first}|{second}", one),
                     chat.question("Question 0|{first}|{second} {question}"))


class LocalTest(parameterized.TestCase):
  """A model of ours as the judge, on evaluations of its own."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.source = cls().create_tempdir().full_path
    config = configs.evaluate(
        data=DATA, rollout=dict(max_prompt=40, max_response=24), writers=("jsonl",),
        eval=dict(prompts=6, batch=6, samples=1, ks=(1,)))
    main.remember(config, cls.source)
    evaluate.run(config, cls.source)

  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(position_bias, "RESAMPLES", 50))

  def config(self, **changes):
    return configs.judged(**dict(
        rubric=RUBRIC, judge=dict(source="tiny:teacher"), a=dict(source=self.source),
        eval=dict(batch=4)) | changes)

  def run_(self, config, workdir):
    main.remember(config, workdir)
    judged.run(config, workdir)
    return [json.loads(x) for x in pathlib.Path(workdir, "judgements.jsonl").read_text().split("\n")
            if x]

  def test_the_choice_is_the_likelier_label_of_the_model_alone(self):
    workdir, config = self.create_tempdir().full_path, self.config()
    lines = self.run_(config, workdir)
    records = json.loads(pathlib.Path(self.source, "eval/eval.json").read_text())["records"]
    self.assertEqual([x["a"] for x in lines], [x["texts"][0] for x in records])
    self.assertTrue(all(x["b"].rpartition("#### ")[1] for x in lines))  # the data's own
    rubric = judges.read_rubric(RUBRIC, judged.PLACEHOLDERS)
    with jax.set_mesh(sharding.make_mesh(1, 1)) as mesh:
      policy = policies.load(config.judge, config.model, keys.root(0), mesh)
      @jax.jit  # one shape: what is behind a token does not change what is said of it
      def whole(tokens):
        hidden, _ = policy.model.apply({"params": policy.params}, tokens,
                                       jnp.arange(500)[None], jnp.ones_like(tokens))
        return jax.nn.log_softmax(policy.model.apply(
            {"params": policy.params}, hidden, method="logits")[0])

      for compared, line in zip(judged.read(config, workdir), lines, strict=True):
        prompt = policy.tokenizer.encode_chat(judged.request(rubric, compared))
        for word, found in zip("AB", line["said"]):
          ids = policy.tokenizer.encode(word)
          p = whole(jnp.array([prompt + ids + [0] * (500 - len(prompt + ids))]))
          want = float(sum(p[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))
          self.assertAlmostEqual(found, want, delta=1e-3)
        first, second = line["said"]
        self.assertEqual(line["preferred"], "ab"[(second > first) != line["flipped"]])

  def test_broken_off_it_ends_the_same(self):
    workdir, config = self.create_tempdir().full_path, self.config()
    lines = self.run_(config, workdir)
    path = pathlib.Path(workdir, "judgements.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    self.assertEqual(self.run_(config, workdir), lines)

  def test_a_request_that_is_too_long_is_counted(self):
    workdir = self.create_tempdir().full_path
    lines = self.run_(self.config(context=dict(budget=100)), workdir)
    self.assertEqual({x["how"] for x in lines}, {"too long"})
    found = json.loads(pathlib.Path(workdir, "judged.json").read_text())
    self.assertLen(found["unread"], 6)
    self.assertIsNone(found["means"]["win rate"]["mean"])

  def test_a_tie_and_what_is_no_number(self):
    self.assertEqual(judged.of_logprobs((-1.0, -1.0)).label, "tie")
    self.assertEqual(judged.of_logprobs((-2.0, -1.0)).label, "B")
    self.assertEqual(judged.of_logprobs((np.nan, -1.0)).how, "unreadable")
    self.assertEqual(judged.of_logprobs(None).how, "too long")

  def test_of_several_evaluations_one_must_be_named(self):
    run = pathlib.Path(self.create_tempdir().full_path)
    (run / "eval").mkdir()
    for name in ("step_000000", "step_000200"):
      (run / f"eval/{name}.json").write_text(
          pathlib.Path(self.source, "eval/eval.json").read_text())
    (run / "config.json").write_text(pathlib.Path(self.source, "config.json").read_text())
    with self.assertRaisesRegex(ValueError, "name one of step_000000, step_000200 in a.evaluation"):
      judged.samples(str(run), "", "a")
    self.assertLen(judged.samples(str(run), "step_000200", "a"), 6)


if __name__ == "__main__":
  absltest.main()
