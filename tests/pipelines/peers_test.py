"""MOPD: each rollout is heard behind its own context, by the student in one of its forms."""

import contextlib
import functools
import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, preemption, sharding, train_state, verifiers
from opd_jax.pipelines import in_context, on_policy, opd, peers, teachers
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches
from opd_jax.rollouts import scorer
from opd_jax.teachers import contexts
from opd_jax.teachers import params as teacher_params
from opd_jax.verifiers import Verdict, sandbox
from tests.verifiers import sandbox_test, unit_tests_test

JSD = dict(surrogate="jsd", top_k=100)
# Of one prompt all three kinds of verdicts, of the other none that a peer could learn from.
QUESTIONS = ("Compute 3+4 mod 10.", "Compute 9*2-5 mod 10.")
TEXTS = ("3+4=7\n#### 7", "7\n#### 7", "3+4=8\n#### 8", "#### 7",
         "9*2=8\n8-5=3\n#### 3", "9*2=8", "8-5=3\n#### 3", "#### 3")
REWARDS = (1, 1, 0, 1, 0, 0, 0, 0)


def log_softmax(logits):
  top = logits - logits.max(-1, keepdims=True)
  return top - np.log(np.exp(top).sum(-1, keepdims=True))


def tiny(**changes):
  """A run of a few seconds."""
  settings = dict(
      total_steps=2, log_every=1, writers=("jsonl",), ema=dict(rate=0.05),
      data=dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0))),
      rollout=dict(prompts=4, group_size=4, max_prompt=40, max_response=32),
      context=dict(budget=240), loss=JSD, optimizer=dict(learning_rate=1e-2),
      eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
      checkpoint=dict(best_metric="eval/mean@2"))
  for section, values in changes.items():
    merge = isinstance(values, dict) and section in settings
    settings[section] = {**settings[section], **values} if merge else values
  return configs.peers(**settings)


class HeardTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.mesh = sharding.make_mesh(1, 1)
    cls.enterClassContext(jax.set_mesh(cls.mesh))
    config = tiny()
    cls.student = policies.load(config.student, config.model, keys.root(0), cls.mesh)
    encode, mark = cls.student.tokenizer.encode, cls.student.tokenizer.eos_ids[0]
    prompts = [cls.student.tokenizer.encode_chat([{"role": "user", "content": text}])
               for text in QUESTIONS]
    cls.responses = [[*encode(text), mark] for text in TEXTS]
    cls.batch = batches.answered(
        batches.prompts(prompts, 4, (40,), cls.student.tokenizer.pad_id), cls.responses, (32,),
        cls.student.tokenizer.pad_id)
    cls.verified = on_policy.Verified(
        [{"messages": json.dumps([{"role": "user", "content": text}])} for text in QUESTIONS],
        TEXTS, [Verdict(float(reward), "") for reward in REWARDS])
    # As if it had been trained: the average differs from what is trained, both from the start.
    moved = lambda scale: jax.tree.map(lambda x: x * scale, cls.student.params)
    cls.state = train_state.TrainState(jnp.zeros((), jnp.int32), moved(1.05), None, moved(0.9))

  def grade(self, **changes):
    config = tiny(**changes)
    asked = teachers.Asked(self.student, {}, None, [])
    teacher = peers.choose(config, asked)
    grade = peers.make_grade(config, self.student, teacher, self.mesh)
    return grade(self.state, self.batch, self.verified, keys.at(keys.root(7), "context", 3))

  def alone(self, config, i, params):
    """Log-probabilities of response i behind its own context, in a batch of its own."""
    made = contexts.make(peers.groups(self.verified, 4), contexts.Settings(config.context.budget),
                         self.student.tokenizer, keys.at(keys.root(7), "context", 3))
    ids, response = made[i].ids, self.responses[i]
    pair = batches.pair([ids], [response], 200, 20, self.student.tokenizer.pad_id)
    ask = jax.jit(scorer.logprobs, static_argnums=0)
    return np.asarray(ask(self.student.model, params, pair)[0][0])[:len(response)]

  @parameterized.product(buckets=((), (120, 160)), tokens=(0, 400))
  def test_each_row_is_heard_behind_its_own_context(self, buckets, tokens):
    changes = dict(context=dict(budget=240, buckets=buckets, tokens=tokens))
    batch, metrics = self.grade(**changes)
    np.testing.assert_array_equal(batch.learn, self.batch.mask)  # a failure is shown, if no success
    for i, response in enumerate(self.responses):
      np.testing.assert_allclose(np.asarray(batch.teacher_logprobs)[i, :len(response)],
                                 self.alone(tiny(**changes), i, self.state.ema),
                                 rtol=1e-5, atol=5e-5)
    self.assertEqual(metrics["context/without"], 0.0)
    self.assertGreaterEqual(metrics["context/tokens_computed"], metrics["context/tokens_needed"])

  def test_a_peers_summary_stands_in_its_place(self):
    changes = dict(context=dict(budget=240, summary=10))
    config, key = tiny(**changes), keys.at(keys.root(7), "context", 3)
    summarize = peers.make_summarize(config, self.student, self.mesh)
    told = dict(zip(TEXTS, summarize(self.state.params, key, TEXTS)))
    self.assertGreater(len(set(told.values())), 1)
    for summary in told.values():
      self.assertLessEqual(len(self.student.tokenizer.encode(summary)), 10)
    made = contexts.make(peers.groups(self.verified, 4), contexts.Settings(240),
                         self.student.tokenizer, key, lambda texts: [told[x] for x in texts])
    batch, _ = self.grade(**changes)
    ask = jax.jit(scorer.logprobs, static_argnums=0)
    for i, response in enumerate(self.responses):
      if made[i].shown:
        pair = batches.pair([made[i].ids], [response], 200, 20, self.student.tokenizer.pad_id)
        want = np.asarray(ask(self.student.model, self.state.ema, pair)[0][0])[:len(response)]
        np.testing.assert_allclose(np.asarray(batch.teacher_logprobs)[i, :len(response)], want,
                                   rtol=1e-5, atol=5e-5)

  def test_a_rollout_that_gained_nothing_carries_no_loss(self):
    batch, metrics = self.grade(context=dict(peers="success"))
    learn = np.asarray(batch.learn)
    np.testing.assert_array_equal(learn[:4], self.batch.mask[:4])
    self.assertFalse(learn[4:].any())
    self.assertEqual(metrics["context/without"], 0.5)
    np.testing.assert_array_equal(np.asarray(batch.teacher_logprobs)[4:], 0.0)

  @parameterized.parameters("current", "frozen", "ema", "trust_region")
  def test_whose_parameters_read_the_contexts(self, kind):
    rate = 0.05 if kind == "ema" else 0.0
    config = tiny(teacher_params=kind, ema=dict(rate=rate), trust=0.25)
    batch, _ = self.grade(teacher_params=kind, ema=dict(rate=rate), trust=0.25)
    one = {"current": self.state.params, "frozen": self.student.params, "ema": self.state.ema}
    found = np.asarray(batch.teacher_logprobs)[0, :len(self.responses[0])]
    if kind in one:
      np.testing.assert_allclose(found, self.alone(config, 0, one[kind]), rtol=1e-5, atol=5e-5)
      return
    np.testing.assert_allclose(found, self.mixed(config), rtol=1e-5, atol=5e-5)
    self.assertEqual(batch.teacher_hidden.shape[2], 2 * self.student.model.config.embed_dim)

  def mixed(self, config):
    """NumPy's log-softmax of interpolated logits."""
    made = contexts.make(peers.groups(self.verified, 4), contexts.Settings(config.context.budget),
                         self.student.tokenizer, keys.at(keys.root(7), "context", 3))
    ids, response = made[0].ids, self.responses[0]
    mixed = (0.75 * self.logits(self.student.params, ids, response)
             + 0.25 * self.logits(self.state.params, ids, response))
    return log_softmax(mixed)[np.arange(len(response)), response]

  def logits(self, params, ids, response):
    """f64[T, V] at the tokens of a response, in a batch of its own."""
    tokens, apply = np.array([[*ids, *response]]), self.student.model.apply
    hidden = apply({"params": params}, tokens, np.arange(tokens.shape[1])[None],
                   np.ones_like(tokens))[0]
    logits = apply({"params": params}, hidden, method="logits")
    return np.asarray(logits, np.float64)[0, len(ids) - 1:-1]

  @parameterized.parameters(1, 2)
  def test_the_loss_is_the_divergence_over_likely_tokens_by_importance(self, updates):
    loss = dict(surrogate="jsd", beta=0.5, top_k=5, top_of="student", tail="bucket",
                divergence_importance=True, importance_cap=2.0, updates_per_batch=updates)
    config = tiny(loss=loss)
    batch, _ = self.grade(loss=loss)
    model, params = self.student.model, self.state.params
    now = np.asarray(scorer.logprobs(model, params, self.batch)[0])
    ratio = np.random.default_rng(0).choice([0.5, 1.0, 3.0], now.shape)
    batch = batch.replace(sampler_logprobs=np.float32(now - np.log(ratio)))
    head = in_context.heads(model, self.state.ema)
    compute = jax.jit(functools.partial(opd.loss, model, config.loss))
    total, columns = compute(params, batch, (head,))

    made = contexts.make(peers.groups(self.verified, 4), contexts.Settings(config.context.budget),
                         self.student.tokenizer, keys.at(keys.root(7), "context", 3))
    weighted = []
    for i, response in enumerate(self.responses):
      plain = self.student.tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[i // 4]}])
      own = np.exp(log_softmax(self.logits(params, plain, response)))
      taught = np.exp(log_softmax(self.logits(self.state.ema, made[i].ids, response)))
      for t in range(len(response)):
        top = np.argsort(-own[t])[:5]
        p, q = (np.append(x[t, top], 1.0 - x[t, top].sum()) for x in (own, taught))
        middle = (p + q) / 2
        value = (p @ np.log(p / middle) + q @ np.log(q / middle)) / 2
        np.testing.assert_allclose(columns["loss/divergence"][i, t], value, rtol=2e-3, atol=2e-6)
        weighted.append(value * min(ratio[i, t], 2.0))
    np.testing.assert_allclose(total, np.mean(weighted), rtol=1e-3)

  def test_what_is_kept_of_the_student_is_a_copy(self):
    whose = teacher_params.of_student("frozen", {"w": (w := jnp.ones(3))})
    w.delete()  # as a donating train step does
    np.testing.assert_array_equal(whose(None)["w"], np.ones(3))
    with self.assertRaisesRegex(ValueError, "teacher_params is 'half'; it must be one of current"):
      teacher_params.of_student("half", {})


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(rollout=dict(group_size=1)), "group_size is 1"),
      (dict(teacher=dict(source="tiny:teacher")), "set teacher_params='frozen'"),
      (dict(teacher_params="current"), "the one is of no use without the other"),
      (dict(ema=dict(rate=0.0)), "the one is of no use without the other"),
      (dict(context=dict(budget=30)), "budget is 30 tokens, but a prompt alone"),
      (dict(context=dict(budget=481)), "481 \\+ 32 tokens, but the teacher allows 512"),
      (dict(context=dict(peers="friends")), "context.peers is 'friends'; it must be one of"),
      (dict(context=dict(control="none")), "context.control is 'none'"),
      (dict(context=dict(buckets=(300,))), "context.buckets"),
      (dict(loss=dict(surrogate="clipped", top_k=0, divergence_importance=True)),
       "loss.divergence_importance is True, which has no effect"))
  def test_what_cannot_be_is_refused_before_the_first_step(self, changes, message):
    config = tiny(**changes)
    with self.assertRaisesRegex(ValueError, message):
      configs.validate(config)
      peers.run(config, self.create_tempdir().full_path)


class RunTest(parameterized.TestCase):

  def test_the_defaults_go_together(self):
    peers.check(configs.peers(loss=JSD))

  def test_a_larger_teacher_is_shown_the_peers(self):
    workdir, asked = self.create_tempdir().full_path, []

    def build(*arguments):
      method = peers.build(*arguments)
      constants = lambda state: asked.append(int(state.step)) or method.constants(state)
      return method._replace(constants=constants)

    on_policy.run(tiny(
        teacher=dict(source="tiny:teacher"), teacher_params="frozen", ema=dict(rate=0.0),
        loss=dict(signal="opd", surrogate="score_function", top_k=0, updates_per_batch=2),
        export=False), workdir, build)
    self.assertEqual(asked, [0, 2])  # the head belongs to the states of the whole batch
    last = json.loads(pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()[-2])
    self.assertTrue(np.isfinite(last["loss/total"]))
    self.assertGreater(last["context/parts"], 0.0)
    self.assertEqual(last["teacher/dropped_tokens"], 0.0)  # of no loss, but not dropped

  def test_a_larger_teacher_may_wait_on_the_host(self):
    def run(memory):
      workdir = self.create_tempdir().full_path
      peers.run(tiny(
          total_steps=1, teacher=dict(source="tiny:teacher"), teacher_params="frozen",
          teacher_memory=memory, ema=dict(rate=0.0), reference=dict(source="tiny:weak"),
          loss=dict(signal="opd", surrogate="score_function", top_k=0, reference_kl=0.1),
          export=False), workdir)
      lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
      return {name: x for line in map(json.loads, lines) for name, x in line.items()
              if not name.startswith(("time/", "compile/"))}

    found = run("host")
    self.assertEqual(found, run("device"))
    self.assertIn("loss/total", found)

  def programs(self, **verifier):
    """A run on an exercise: double a number."""
    file = self.create_tempfile(content=json.dumps(dict(
        question_id="a", question_content="Double it.", starter_code="", metadata="{}",
        public_test_cases='[{"input": "3\\n", "output": "6\\n", "testtype": "stdin"}]',
        private_test_cases="")) + "\n").full_path
    return tiny(
        data=dict(builder="programs", builder_kw=dict(train=file, test=file)),
        verifier=dict(name="unit_tests", timeout_s=1.0, workers=2) | verifier, export=False,
        rollout=dict(prompts=1, group_size=8, max_prompt=80),
        eval=dict(prompts=1, samples=2, ks=(1,), batch=1))

  def test_a_run_goes_on_whatever_programs_it_writes(self):
    sandbox_test.isolated(self)
    written = ["print(2 * int(input()))", "print(2 * int(input()) if True else 0)", *(
        unit_tests_test.HOSTILE[name][0].format(home="/root/x", port=80) + "\nf()" for name in (
            "fork_bomb", "endless_print", "kill_everyone", "read_home", "open_socket",
            "ten_gigabytes"))]
    make, heard = verifiers.make, []

    @contextlib.contextmanager
    def writes(**settings):
      with make(**settings) as verify:
        def judge(texts, answers):
          verdicts = verify((written * len(texts))[:len(texts)], answers)
          heard.append(verdicts)
          return verdicts
        yield judge

    workdir = self.create_tempdir().full_path
    with mock.patch.object(verifiers, "make", writes):
      peers.run(self.programs(), workdir)
    steps = [verdicts for verdicts in heard if len(verdicts) == 8]
    self.assertLen(steps, 2)
    for verdicts in steps:
      self.assertEqual([verdict.reward for verdict in verdicts], [1.0] * 2 + [0.0] * 6)
      self.assertTrue(all(verdict.feedback.startswith("Test 1 of 1 failed") for verdict
                          in verdicts[2:]), verdicts)
    lines = [json.loads(line) for line in
             pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    self.assertEqual([line["rollout/reward"] for line in lines if "rollout/reward" in line],
                     [0.25, 0.25])
    self.assertEmpty(sandbox_test.jails())

  def test_without_isolation_a_run_on_code_does_not_start_unless_told(self):
    with mock.patch.object(sandbox, "missing", lambda: "no such namespaces"):
      workdir = self.create_tempdir().full_path
      with self.assertRaisesRegex(ValueError, "no such namespaces.*allow_unsafe_code"):
        peers.run(self.programs(), workdir)
      self.assertFalse(pathlib.Path(workdir, "metrics.jsonl").exists())
      with verifiers.make(**self.programs(allow_unsafe_code=True).verifier) as verify:
        answer = json.dumps(dict(stdins=["3\n"], stdouts=["6\n"]))
        self.assertEqual([verdict.reward for verdict in verify(
            ["print(2 * int(input()))", "print(7)"], [answer] * 2)], [1.0, 0.0])

  @parameterized.parameters("ema", "trust_region")
  def test_resumed_it_chooses_the_same_peers_and_has_the_same_teacher(self, kind):
    config = tiny(total_steps=4, checkpoint=dict(every=1), teacher_params=kind, trust=0.25,
                  ema=dict(rate=0.05 if kind == "ema" else 0.0))

    def run(workdir):
      peers.run(config, workdir)
      lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
      kept = [{name: value for name, value in json.loads(line).items()
               if not name.startswith(("time/", "compile/"))} for line in lines]
      return kept, safetensors.load_file(f"{workdir}/export/model.safetensors")

    want, weights = run(self.create_tempdir().full_path)
    broken = self.create_tempdir().full_path
    two_done = lambda: os.path.exists(f"{broken}/checkpoints/2")
    with mock.patch.object(preemption, "guard", lambda: contextlib.nullcontext(two_done)):
      peers.run(config, broken)
    self.assertFalse(os.path.exists(f"{broken}/export"))
    found, again = run(broken)
    self.assertEqual(found, want)
    solved = [line["rollout/ever_solved"] for line in want if "rollout/ever_solved" in line]
    self.assertEqual(solved, sorted(solved))
    best = [line["rollout/reward"] > 0 for line in want if "rollout/reward" in line]
    self.assertEqual(solved[-1] > 0, any(best))
    for name, value in weights.items():
      np.testing.assert_array_equal(again[name], value, name)


if __name__ == "__main__":
  absltest.main()
