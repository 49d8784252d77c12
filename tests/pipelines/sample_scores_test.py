"""What others say of a student's samples: by transformers, one text at a time; and who wins.

The weak models are GPT-2 with a byte-level BPE of their own, whose tokens are not the student's:
everything travels as text, in rows made once and in evaluations alike.
"""

import json
import pathlib
import tempfile

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

from opd_jax import config as configs
from opd_jax import keys, main, sharding
from opd_jax.data import builders
from opd_jax.data.builders import rows as made
from opd_jax.data.tokenizer import load as load_tokenizer
from opd_jax.models.source import TINY
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import sample_scores

DATA = dict(builder="arithmetic", builder_kw=dict(train=24, test=8, mix=dict(plain=1.0),
                                                  digits=(1,), max_steps=3))
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer: "
END = "<|endoftext|>"
BATCH = dict(tokens=1024, buckets=(64, 160), chunk=8)


def read(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def run(config, workdir):
  configs.validate(config)
  pathlib.Path(workdir).mkdir()
  main.remember(config, workdir)
  main.pick(config.pipeline).run(config, workdir)
  return workdir


def gpt2(folder, seed):
  """A random GPT-2, as transformers saves it, with a tokenizer trained on sums: "12" is one token.
  """
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator([f"Compute {i}+{j} mod 10.\n{i}+{j}={i + j}" for i in range(40)
                           for j in range(40)], vocab_size=340, special_tokens=[END],
                          show_progress=False)
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)
  tokenizer.chat_template = TEMPLATE
  torch.manual_seed(seed)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2,
      initializer_range=0.3, bos_token_id=tokenizer.eos_token_id,
      eos_token_id=tokenizer.eos_token_id)).eval()
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer


def likelihood(model, tokenizer, messages, text):
  """log p of a text and its end, by transformers, in the model's own tokens."""
  before = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "answer: "
  prompt = tokenizer.encode(before, add_special_tokens=False)
  ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
  with torch.no_grad():
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
  return float(torch.log_softmax(logits, -1)[range(len(ids)), ids].sum())


class AskerTest(absltest.TestCase):
  """The parts, without a run."""

  def test_a_model_is_asked_in_its_own_tokens(self):
    folder = self.create_tempdir().full_path
    model, tokenizer = gpt2(folder, 0)
    config, mesh = configs.offline(student=dict(source=f"hf:{folder}"), batch=BATCH), (
        sharding.make_mesh(1, 1))
    policy = policies.load(config.student, config.model, keys.root(0), mesh)
    messages = [[dict(role="user", content=f"Compute {i}+4 mod 10.")] for i in range(5)]
    texts = ["3+4=7\n#### 7", "", "12+34=46", "x" * 300, " é 7"]
    found = sample_scores.asker(config, policy, mesh)(policy.params, messages, texts)
    self.assertEqual([x is None for x in found], [False, True, False, True, False])
    for asked, text, one in zip(messages, texts, found):
      if one is not None:
        self.assertLen(one, len(policy.tokenizer.encode(text)) + 1)
        np.testing.assert_allclose(one.sum(), likelihood(model, tokenizer, asked, text), rtol=1e-4)

  def test_means_are_over_the_samples_of_which_all_is_known(self):
    p = [np.log([0.5, 0.25]), np.log([0.5]), None, np.log([0.1])]
    q = [np.log([0.25, 0.25]), np.array([-np.inf]), None, np.log([0.2])]
    records = [dict(texts=["a", "b"], ended=[True, True]), dict(texts=["", "d"], ended=[True] * 2)]
    rows = [dict(messages="[]")] * 2
    metrics = sample_scores.score(rows, records, {
        "student": lambda conversations, texts: p, "q": lambda conversations, texts: q}, ["q"])
    self.assertEqual(metrics["scored"], 0.5)
    np.testing.assert_allclose(metrics["logprob/student"], np.mean([np.log(0.125), np.log(0.1)]))
    k3 = [0.5 - 1 - np.log(0.5), 2.0 - 1 - np.log(2.0)]
    np.testing.assert_allclose(metrics["k3/q"], np.mean(k3), rtol=1e-5)
    self.assertEqual([record["logprobs"]["q"][0] is None for record in records], [False, True])
    none = sample_scores.score(rows[:1], [dict(texts=["a"], ended=[False])],
                               {"student": lambda conversations, texts: [None]}, [])
    self.assertEqual(none["scored"], 0.0)
    self.assertTrue(np.isnan(none["logprob/student"]))


class SampleScoresTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.weak = {name: gpt2(f"{cls.folder}/{name}", seed)
                for seed, name in enumerate(("weak", "weak_reference"))}
    weak = lambda name: dict(source=f"hf:{cls.folder}/{name}")
    common = dict(data=DATA, writers=("jsonl",), batch=BATCH)
    shape = dict(prompts=8, group_size=2, max_prompt=40, max_response=48)
    cls.rows = run(configs.responses(
        student=dict(source="tiny:student"), rollout=shape, prompts=16,
        scores=dict(weak_logprob=weak("weak"), weak_reference_logprob=weak("weak_reference")),
        **common), f"{cls.folder}/rows") + f"/{made.FILE}"
    rival = run(configs.responses(
        student=dict(source="tiny:weak"), rollout=shape | dict(group_size=1),
        **common | dict(data=DATA | dict(train_split="test"))), f"{cls.folder}/rival")
    cls.rival = f"{rival}/{made.FILE}"
    cls.workdir = run(configs.offline(
        total_steps=2, log_every=1, student=dict(source="tiny:student"), rollout=shape,
        loss=dict(objective="eve"), optimizer=dict(learning_rate=1e-3),
        checkpoint=dict(best_metric="eval/mean@2"), **common | dict(
            data=dict(builder="rows", builder_kw=dict(train=cls.rows), eval_builder="arithmetic",
                      eval_builder_kw=DATA["builder_kw"])),
        eval=dict(prompts=8, samples=2, ks=(1,), batch=8, at=(0.0,), rival=dict(rows=cls.rival),
                  scores=dict(weak=weak("weak"), weak_reference=weak("weak_reference"),
                              base=dict(source="tiny:student")))), f"{cls.folder}/eve")

  def said(self, name, messages, text):
    return likelihood(*self.weak[name], messages, text)

  def records(self, name):
    return json.loads(pathlib.Path(self.workdir, "eval", f"{name}.json").read_text())

  def asked(self, split):
    source = builders.open_source(DATA["builder"], DATA["builder_kw"], split)
    return {source[i]["id"]: source[i] for i in range(len(source))}

  def test_texts_are_other_tokens_for_the_weak_models(self):
    ours, theirs = load_tokenizer(TINY / "student"), load_tokenizer(f"{self.folder}/weak")
    self.assertFalse(sample_scores.read_alike(ours, theirs))
    self.assertTrue(sample_scores.read_alike(ours, load_tokenizer(TINY / "weak")))
    self.assertLess(len(theirs.encode("12+34=46")), len(ours.encode("12+34=46")))

  def test_rows_have_the_log_probabilities_of_the_text_in_the_weak_models_own_tokens(self):
    found = [(json.loads(row["messages"]), member) for row in read(self.rows)
             for member in json.loads(row["group"])]
    self.assertGreater(len(found), 16)
    for messages, member in found:
      for name in self.weak:
        np.testing.assert_allclose(member[f"{name}_logprob"],
                                   self.said(name, messages, member["response"]), rtol=1e-4)

  def test_evaluations_have_them_of_the_students_own_samples(self):
    asked, whole = self.asked("test"), self.records("step_000002")
    sums = {name: [] for name in self.weak}
    for record in whole["records"]:
      messages = json.loads(asked[record["id"]]["messages"])
      for i, (text, ended) in enumerate(zip(record["texts"], record["ended"])):
        for name in self.weak:
          value = record["logprobs"][name][i]
          self.assertEqual(value is not None, ended and bool(text))
          if value is not None:
            np.testing.assert_allclose(value, self.said(name, messages, text), rtol=1e-4)
            sums[name].append(value)
    for name, values in sums.items():
      self.assertAlmostEqual(whole["metrics"][f"logprob/{name}"], np.mean(values), places=4)
    self.assertAlmostEqual(whole["metrics"]["scored"], len(sums["weak"]) / 16)
    self.assertGreater(len(sums["weak"]), 8)
    self.assertNotIn("k3/weak", whole["metrics"])  # which does not read as the student does
    line = [line for line in read(f"{self.workdir}/metrics.jsonl") if "eval/scored" in line]
    self.assertEqual([x["step"] for x in line], [0, 2])
    self.assertEqual(line[-1]["eval/k3/base"], whole["metrics"]["k3/base"])

  def test_k3_to_the_base_is_that_of_the_formula_token_by_token(self):
    self.assertEqual(self.records("step_000000")["metrics"]["k3/base"], 0.0)  # nothing learned yet
    mesh, asked = sharding.make_mesh(1, 1), self.asked("test")
    settings = lambda source: configs.offline(student=dict(source=source))
    both = [policies.load(settings(source).student, settings(source).model, keys.root(0), mesh)
            for source in (f"hf:{self.workdir}/export", "tiny:student")]

    def logprobs(policy, messages, text):
      prompt = policy.tokenizer.encode_chat(messages)
      ids = np.array(prompt + policy.tokenizer.encode(text) + [policy.tokenizer.end_id])
      states, _ = policy.model.apply({"params": policy.params}, ids[None],
                                     np.arange(len(ids))[None], np.ones((1, len(ids)), np.int32))
      logits = np.asarray(states[0] @ jnp.asarray(policy.params["embedding"]).T, np.float64)
      logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
      return logits[np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt):]]

    record = next(x for x in self.records("step_000002")["records"] if x["k3"]["base"][0])
    p, q = (logprobs(policy, json.loads(asked[record["id"]]["messages"]), record["texts"][0])
            for policy in both)
    np.testing.assert_allclose(record["logprobs"]["student"][0], p.sum(), rtol=1e-4)
    np.testing.assert_allclose(record["k3"]["base"][0], np.sum(np.exp(q - p) - 1 - (q - p)),
                               rtol=2e-3, atol=1e-5)

  def test_who_wins_is_said_by_the_rewards(self):
    whole, asked = self.records("step_000002"), self.asked("test")
    theirs = {row["id"]: row["response"] for row in read(self.rival)}
    right = lambda id, text: float(f"#### {asked[id]['answer']}" in text)
    wins = []
    for record in whole["records"]:
      other = right(record["id"], theirs.get(record["id"], ""))
      wins += [1.0 if x > other else 0.5 if x == other else 0.0 for x in record["rewards"]]
    self.assertAlmostEqual(whole["metrics"]["win_rate"], np.mean(wins))

  def test_a_rival_of_other_prompts_is_refused(self):
    with self.assertRaisesRegex(ValueError, "no response to any of the 2 held-out prompts"):
      sample_scores.rival_rewards(self.rival, [dict(id="a"), dict(id="b")], None)


if __name__ == "__main__":
  absltest.main()
