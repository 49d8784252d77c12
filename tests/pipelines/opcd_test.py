"""OPCD: what is kept, what is learned of it, and that a killed run ends as an unbroken one."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, preemption, progress, sharding, train_state
from opd_jax.data import chat
from opd_jax.data import tokenizer as tokenizers
from opd_jax.losses import masked
from opd_jax.pipelines import critiques, judge, opcd, opd
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.responder import Response
from opd_jax.verifiers import Verdict

RUBRIC = "{question}\n{answer}\n{critique}\nIs it useful?"


def tiny(**changes):
  """Eight answers an epoch; two updates."""
  changes = {"loss": {}, **changes}
  loss = dict(surrogate="reverse_kl", aggregate="sequence_sum") | changes.pop("loss")
  return configs.opcd(**dict(
      total_steps=2, questions=4, triples=4, updates=2, student=dict(source="tiny:teacher"),
      data=dict(builder_kw=dict(train=20, test=20, mix=dict(plain=1.0), seed=11)),
      rollout=dict(prompts=2, group_size=2, max_prompt=40, max_response=64, top_k=20, top_p=0.95),
      context=dict(budget=280), critique=dict(max_response=80), loss=loss,
      optimizer=dict(learning_rate=1e-3), checkpoint=dict(every=1, keep_best=0), writers=("jsonl",),
      eval=dict(prompts=4, samples=2, ks=(1,), batch=4, every=1)) | changes)


def run(config, workdir):
  configs.validate(config)
  pathlib.Path(workdir).mkdir(exist_ok=True)
  opcd.run(config, workdir)


def lines(workdir):
  return [json.loads(x) for x in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]


def weights(workdir):
  return safetensors.load_file(f"{workdir}/export/model.safetensors")


def export_of(workdir):
  return pathlib.Path(workdir, "export")


@contextlib.contextmanager
def asked_to_stop(after):
  """SIGTERM before block or update number `after` of this run."""
  count = iter(range(10_000))
  with mock.patch.object(preemption, "guard", lambda: contextlib.nullcontext(
      lambda: next(count) == after)):
    yield


class RunTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = cls().create_tempdir().full_path
    cls.config = tiny()
    run(cls.config, cls.workdir)

  def test_what_is_kept_has_its_provenance(self):
    for epoch in range(2):
      triples = opcd.read(self.workdir, epoch)
      self.assertLen(triples, 8)
      for triple in triples:
        self.assertEqual(triple["epoch"], epoch)
        self.assertEqual(triple["kept"], triple["outcome"])
        self.assertEqual(triple["problem"], "")
        self.assertIsNone(triple["judge"])
    kept = sum(x["kept"] for epoch in range(2) for x in opcd.read(self.workdir, epoch))
    self.assertEqual(lines(self.workdir)[-1]["critique/all"], kept)
    self.assertGreater(kept, 0)

  def test_the_loss_is_the_kl_of_each_triple_summed_over_its_tokens(self):
    """Against each triple alone, over logits; in the first update both are the first student."""
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      student = policies.load(self.config.student, self.config.model, keys.root(0), mesh)
    rows = opcd.questions(self.config, student)
    messages = {row["id"]: json.loads(row["messages"]) for row in rows}
    kept = [x for x in opcd.read(self.workdir, 0) if x["kept"]]

    def logprobs(params, conversation, response):
      ids = student.tokenizer.encode_chat(conversation)
      tokens = jnp.array([ids + response])
      hidden, _ = student.model.apply({"params": params}, tokens,
                                      jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
      logits = student.model.apply({"params": params}, hidden, method="logits")[0]
      return np.asarray(jax.nn.log_softmax(logits[len(ids) - 1:-1]), np.float64)

    def divergence(params, triple):
      plain = messages[triple["prompt"]]
      p = logprobs(params, plain, triple["ids"])
      q = logprobs(student.params, chat.with_critique(plain, triple["critique"]), triple["ids"])
      return float(np.sum(np.exp(p) * (p - q)))

    def learned(updates):
      config = tiny(updates=updates)
      with jax.set_mesh(mesh):
        optimizer = train_state.make_optimizer(config.optimizer, 1)
        state = train_state.create(student.params, optimizer, False, mesh)
        update = jax.jit(train_state.make_train_step(
            lambda *args: opd.loss(student.model, config.loss, *args), opd.describe, optimizer,
            masked.COUNTS["sequence_sum"], 1, 0.0))
        learn = opcd.make_learn(config, student, update, messages, mesh, self.workdir)
        return learn(state, kept, 0, lambda: None)

    first, second = list(opcd.minibatches(self.config, kept, 0))
    state, metrics = learned(1)
    found = [divergence(student.params, x) for x in first]
    self.assertGreater(np.mean(found), 0.01)
    np.testing.assert_allclose(metrics["loss/total"], np.mean(found), rtol=2e-4)
    # The student has moved; who is shown the critique has not.
    found += [divergence(state.params, x) for x in second]
    moved = [divergence(student.params, x) for x in second]
    self.assertGreater(np.abs(np.sum(found[-len(second):]) / np.sum(moved) - 1), 1e-3)
    np.testing.assert_allclose(learned(2)[1]["loss/total"], np.mean(found), rtol=2e-4)

  def test_stopped_in_each_stage_it_ends_the_same(self):
    workdir = self.create_tempdir().full_path
    # Two blocks a stage: in the first epoch's answers, critiques, refinements, checks and
    # updates; each run goes on where the one before it was.
    for after in (1, 2, 2, 2, 2):
      with asked_to_stop(after):
        run(self.config, workdir)
      self.assertFalse(export_of(workdir).exists())
    answers = opcd.folder(workdir, 1) / "answers.jsonl"
    with asked_to_stop(3):  # two updates, and one block of the second epoch's
      run(self.config, workdir)
    self.assertLen(answers.read_text().splitlines(), 4)
    with answers.open("a") as file:  # and killed while it wrote
      file.write('{"epoch": 1, "prom')
    run(self.config, workdir)
    self.assert_same(workdir)

  def test_killed_in_an_update_it_ends_the_same(self):
    workdir = self.create_tempdir().full_path
    process = multiprocessing.get_context("spawn").Process(target=run, args=(self.config, workdir))
    process.start()
    triples = opcd.folder(workdir, 1) / critiques.TRIPLES
    while not triples.is_file() or len(triples.read_text().splitlines()) < 8:
      self.assertTrue(process.is_alive())
      time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)  # no time to tidy up
    process.join()
    self.assertFalse(export_of(workdir).exists())
    run(self.config, workdir)
    self.assert_same(workdir)

  def assert_same(self, workdir):
    for epoch in range(2):
      self.assertEqual(opcd.read(workdir, epoch), opcd.read(self.workdir, epoch))
    before, after = weights(self.workdir), weights(workdir)
    for name in before:
      np.testing.assert_array_equal(before[name], after[name], err_msg=name)


class KindsTest(parameterized.TestCase):

  def test_refinements_are_learned_as_given_responses(self):
    config = tiny(total_steps=1, updates=0, triples=8, loss=dict(
        surrogate="score_function", signal="verified", aggregate="sequence_sum"))
    workdir = self.create_tempdir().full_path
    run(config, workdir)
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      student = policies.load(config.student, config.model, keys.root(0), mesh)
    messages = {row["id"]: json.loads(row["messages"]) for row in opcd.questions(config, student)}
    found = []
    for triple in opcd.read(workdir, 0):
      if triple["kept"]:
        ids = student.tokenizer.encode_chat(messages[triple["prompt"]])
        tokens = jnp.array([ids + triple["refined_ids"]])
        hidden, _ = student.model.apply({"params": student.params}, tokens,
                                        jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        logits = student.model.apply({"params": student.params}, hidden, method="logits")[0]
        p = jax.nn.log_softmax(logits[len(ids) - 1:-1])
        found.append(-float(jnp.take_along_axis(
            p, jnp.array(triple["refined_ids"])[:, None], 1).sum()))
    self.assertNotEmpty(found)
    np.testing.assert_allclose(lines(workdir)[-1]["loss/total"], np.mean(found), rtol=1e-4)

  @parameterized.parameters("self", "none")
  def test_controls_have_no_critic(self, control):
    self.assertIn({"self": "the student itself", "none": "nobody"}[control], opcd.formula(
        tiny(control=control, critic=dict(source=""))))
    workdir = self.create_tempdir().full_path
    rubric = self.create_tempfile(content=RUBRIC).full_path
    run(tiny(total_steps=1, control=control, critic=dict(source=""), filter="both",
             rubric=rubric), workdir)
    triples = opcd.read(workdir, 0)
    if control == "none":
      self.assertTrue(all(x["critique"] == "" and x["problem"] == "" for x in triples))
    else:
      self.assertTrue(all(x["critique"] for x in triples if not x["problem"]))
    for x in triples:
      if not x["problem"]:
        self.assertEqual(x["rubric"], x["judge"][0] > x["judge"][1])
        self.assertEqual(x["kept"], x["rubric"] and x["outcome"])
    self.assertIn("judge/yes", lines(workdir)[-1])

  def test_a_judge_of_another_family_reads_in_its_own_tokens(self):
    folder, workdir = (self.create_tempdir().full_path for _ in range(2))
    tokenizers.byte_tokenizer().save(folder)
    rubric = self.create_tempfile(content=RUBRIC).full_path
    config = tiny(total_steps=1, updates=1, filter="rubric", rubric=rubric,
                  judge=dict(source="random:tiny_student", tokenizer=folder),
                  context=dict(budget=420), critic=dict(source="tiny:weak"))
    with asked_to_stop(7):  # in the middle of its checks
      run(config, workdir)
    self.assertLen((opcd.folder(workdir, 0) / critiques.TRIPLES).read_text().splitlines(), 4)
    run(config, workdir)
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      student = policies.load(config.student, config.model, keys.root(0), mesh)
      other = policies.load(config.judge, config.model, keys.at(keys.root(0), "init", 2), mesh)
    messages = {row["id"]: json.loads(row["messages"]) for row in opcd.questions(config, student)}
    triples = opcd.read(workdir, 0)
    self.assertLen(triples, 8)
    for triple in triples:
      prompt = other.tokenizer.encode_chat(judge.write(RUBRIC, judge.Case(
          messages[triple["prompt"]], triple["answer"], triple["critique"])))
      for word, found in zip(("yes", "no"), triple["judge"]):
        ids = other.tokenizer.encode(word)
        self.assertLen(ids, len(word))
        tokens = jnp.array([prompt + ids])
        hidden, _ = other.model.apply({"params": other.params}, tokens,
                                      jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        logits = other.model.apply({"params": other.params}, hidden, method="logits")
        p = jax.nn.log_softmax(logits[0, len(prompt) - 1:-1])
        self.assertAlmostEqual(found, float(sum(p[i, x] for i, x in enumerate(ids))), delta=1e-2)

  def test_critiques_that_are_cut_off_are_not_used(self):
    workdir = self.create_tempdir().full_path
    with self.assertRaisesRegex(ValueError, "epochs 1 and 2 kept no critique.*critique.max_resp"):
      run(tiny(critique=dict(max_response=4), total_steps=3), workdir)
    for x in opcd.read(workdir, 0):
      self.assertEqual((x["problem"], x["refinement"], x["kept"]), ("cut off", None, False))
    found = lines(workdir)[-1]
    self.assertEqual((found["critique/unusable"], found["critique/kept"]), (1.0, 0.0))
    self.assertNotIn("loss/total", found)

  def test_why_a_critique_cannot_be_used(self):
    for response, said, problem in (
        (None, "", "too long to be asked for"), (Response("x", [4], False), "x", "cut off"),
        (Response(" \n", [2], True), " \n", "empty"), (Response("x", [4, 2], True), "x", ""),
        (Response("<think>x", [4, 2], True), "", "empty")):
      self.assertEqual(critiques._problem(response, said), problem)

  def test_what_becomes_of_each_answer(self):
    """Eight answers with fates of their own, by models that are functions."""
    fates = ("kept", "tie", "no", "wrong", "thought", "long critique", "long refinement",
             "long case")
    rows = [dict(id=fate, messages=json.dumps(chat.question(fate)), answer=fate, prompt_ids=[])
            for fate in fates]
    which = lambda conversation: conversation[0]["content"].partition("\n")[0]

    def speaker(texts):
      def respond(params, conversations, key):
        found = [texts.get(which(x), texts[""]) for x in conversations]
        return [text and Response(text, [5], True) for text in found]
      return respond

    def judged(params, cases):
      self.assertNotIn("<think>", "".join(case.answer + case.critique for case in cases))
      return [{"tie": (-1.0, -1.0), "no": (-2.0, -1.0), "long case": None}.get(
          case.messages[0]["content"], (-1.0, -2.0)) for case in cases]

    itself = lambda params: params
    cast = critiques.Cast(
        speaker({"": "<think>hm</think>four"}),
        speaker({"": "five", "long refinement": None}),
        speaker({"": "Line 1.", "thought": "<think>so</think>", "long critique": None}),
        itself, judged, itself)
    config = tiny(filter="both", rubric="-", rollout=dict(prompts=8, group_size=1))
    verify = lambda texts, answers: [Verdict(float(text == "five" and answer != "wrong"), "")
                                     for text, answer in zip(texts, answers)]
    with jax.set_mesh(sharding.make_mesh(1, 1)):
      student = policies.load(config.student, config.model, keys.root(0), sharding.make_mesh(1, 1))
    triples = critiques.gather(config, cast, rows, None, 0, None, student.tokenizer, verify,
                               lambda: None)
    self.assertEqual([x["prompt"] for x in triples], list(fates))
    self.assertEqual([x["prompt"] for x in triples if x["kept"]], ["kept"])
    self.assertEqual([x["problem"] for x in triples], [
        "", "", "", "", "empty", "too long to be asked for", "too long to be refined",
        "too long to be judged"])
    self.assertEqual([x["rubric"] for x in triples], [True, False, False, True] + [False] * 4)
    self.assertEqual(set(critiques.reasons(config, triples).split(", ")), {
        "2 no by the judge", "1 refinement not right", "1 empty", "1 too long to be asked for",
        "1 too long to be refined", "1 too long to be judged"})

  def test_an_epoch_that_keeps_nothing_is_said_and_the_next_one_learns(self):
    workdir, gather, notes = self.create_tempdir().full_path, critiques.gather, []

    def first_all_wrong(config, cast, rows, params, epoch, *others):
      found = gather(config, cast, rows, params, epoch, *others)
      return [dict(x, kept=x["kept"] and epoch != 1) for x in found]

    with mock.patch.object(critiques, "gather", first_all_wrong), \
         mock.patch.object(progress, "note", notes.append):
      run(tiny(total_steps=3, updates=1), workdir)
    self.assertLen([x for x in notes if x.startswith("epoch 2: no critique stood the")], 1)
    found = [line for line in lines(workdir) if "critique/all" in line]
    self.assertEqual([line["critique/kept"] > 0 for line in found], [True, False, True])
    # S_e grows, and is learned from in an epoch that adds nothing to it.
    self.assertEqual(found[0]["critique/all"], found[1]["critique/all"])
    self.assertGreater(found[2]["critique/all"], found[1]["critique/all"])
    self.assertTrue(all(np.isfinite(line["loss/total"]) for line in found))

  def test_over_some_of_the_vocabulary(self):
    """With as many tokens as there are it is the whole; with fewer something else is learned."""
    losses = {}
    for top_k in (0, 320, 4):
      workdir = self.create_tempdir().full_path
      run(tiny(total_steps=1, updates=1, loss=dict(top_k=top_k)), workdir)
      losses[top_k] = lines(workdir)[-1]["loss/total"]
    np.testing.assert_allclose(losses[320], losses[0], rtol=1e-4)
    self.assertGreater(losses[0], losses[4] * 1.0001)  # merging tokens can only lose divergence
    self.assertGreater(losses[4], 0.0)

  @parameterized.parameters(("both", [True, False, False, False]),
                            ("outcome", [True, True, False, False]),
                            ("rubric", [True, False, True, False]), ("none", [True] * 4))
  def test_filters(self, name, wanted):
    cases = [dict(outcome=o, rubric=r) for o in (True, False) for r in (True, False)]
    self.assertEqual([critiques.passes(name, case) for case in cases], wanted)

  def test_metrics_of_a_table_made_by_hand(self):
    row = lambda reward, outcome, judged, refinement="x", problem="": dict(
        reward=reward, outcome=outcome, judge=judged, refinement=refinement, problem=problem,
        rubric=bool(judged and judged[0] > judged[1]), ended=True, kept=outcome)
    found = critiques.metrics([
        row(0.0, True, (-1.0, -2.0)),              # repaired; the judge says yes, by 1
        row(0.0, False, (-2.0, -1.0)),             # no, by 1
        row(0.0, False, (-1.0, -3.0)),             # yes, by 2, and wrongly
        row(1.0, True, (-1.0, -1.0)),              # neither
        row(1.0, False, None, None, "cut off")])   # never refined, so not spoiled
    self.assertAlmostEqual(found["refine/repaired"], 1 / 3)
    self.assertEqual(found["refine/spoiled"], 0.0)
    self.assertAlmostEqual(found["refine/outcome"], 2 / 5)
    self.assertAlmostEqual(found["critique/unusable"], 1 / 5)
    self.assertAlmostEqual(found["judge/yes"], 2 / 4)
    self.assertAlmostEqual(found["judge/undecided"], 1 / 4)
    self.assertAlmostEqual(found["judge/auc"], 0.5)  # 1 > -1, 1 < 2, 0 > -1, 0 < 2

  @parameterized.parameters((10, 4, 0, [4, 4, 2]), (10, 4, 2, [4, 4]), (5, 4, 5, [4, 1, 4, 1, 4]))
  def test_minibatches(self, kept, triples, updates, sizes):
    config = tiny(triples=triples, updates=updates)
    rows = [dict(place=i) for i in range(kept)]
    found = list(opcd.minibatches(config, rows, 3))
    self.assertEqual(list(map(len, found)), sizes)
    one_pass = sum(found[:-(-kept // triples)], [])
    self.assertEqual(len({x["place"] for x in one_pass}), len(one_pass))
    self.assertEqual(found, list(opcd.minibatches(config, rows, 3)))
    self.assertNotEqual(found, list(opcd.minibatches(config, rows, 4)))

  @parameterized.parameters(
      (dict(control="blind"), "control is 'blind'; it must be one of '', 'self', 'none'"),
      (dict(filter="most"), "filter is 'most'"),
      (dict(filter="both"), "name a file with a rubric, or set filter='outcome'"),
      (dict(rubric="r.txt"), "a rubric is of no use"),
      (dict(filter="rubric", rubric="/nowhere"), "rubric is '/nowhere', which cannot be read"),
      (dict(control="self"), "asks no critic, and critic.source 'tiny:weak'"),
      (dict(critic=dict(source="")), "name a critic, or set control='self'"),
      (dict(optimizer=dict(schedule="linear")), "set 'constant'"),
      (dict(teacher=dict(source="tiny:weak")), "teacher.source is 'tiny:weak', which has no"),
      (dict(loss=dict(updates_per_batch=2)), "loss.updates_per_batch is 2, which has no effect"),
      (dict(ema=dict(rate=0.1)), "ema.rate is 0.1, which has no effect"),
      (dict(refine=dict(temperature=-1.0)), "refine.temperature"),
      (dict(critique=dict(top_p=7.0)), "critique.top_p"),
      (dict(loss=dict(surrogate="clipped")), "what a critique changes is learned with"),
      (dict(context=dict(budget=20)), "context.budget is 20 tokens, but a prompt alone"),
      (dict(questions=21), "has 20 questions .* `questions` asks for 21"))
  def test_bad_input(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      run(tiny(**changes), self.create_tempdir().full_path)


class JudgeTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = tiny()
    cls.mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(cls.mesh):
      cls.policy = policies.load(config.student, config.model, keys.root(0), cls.mesh)

  def ask(self, cases, widths=(96, 200)):
    with jax.set_mesh(self.mesh):
      return judge.make(self.policy, RUBRIC, widths, 2, self.mesh)(self.policy.params, cases)

  def test_the_words_log_probabilities_are_those_of_the_model_alone(self):
    cases = [judge.Case(chat.question(f"Compute {i}+4."), "7", "Line 1 was wrong.")
             for i in range(3)]
    tokenizer = self.policy.tokenizer
    for case, pair in zip(cases, self.ask(cases)):
      prompt = tokenizer.encode_chat(judge.write(RUBRIC, case))
      for word, found in zip(("yes", "no"), pair):
        ids = tokenizer.encode(word)
        tokens = jnp.array([prompt + ids])
        hidden, _ = self.policy.model.apply(
            {"params": self.policy.params}, tokens, jnp.arange(tokens.shape[1])[None],
            jnp.ones_like(tokens))
        logits = self.policy.model.apply({"params": self.policy.params}, hidden, method="logits")
        p = jax.nn.log_softmax(logits[0, len(prompt) - 1:-1])
        want = float(sum(p[i, token] for i, token in enumerate(ids)))
        self.assertAlmostEqual(found, want, delta=1e-3)

  def test_too_long_is_not_judged_and_moves_no_other(self):
    short = judge.Case(chat.question("1+1="), "2", "No mistake.")
    long = judge.Case(chat.question("1+1="), "2" * 300, "No mistake.")
    alone, = self.ask([short])
    self.assertIsNone(self.ask([long])[0])
    found = self.ask([short, long, short])
    self.assertIsNone(found[1])
    np.testing.assert_allclose([found[0], found[2]], [alone, alone], rtol=1e-4)

  def test_a_judge_whose_numbers_are_broken_is_no_judge(self):
    case = judge.Case(chat.question("1+1="), "2", "No mistake.")
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), self.policy.params)
    with jax.set_mesh(self.mesh), self.assertRaisesRegex(
        FloatingPointError, "log-probabilities of yes, no are NaN; look at its weights"):
      judge.make(self.policy, RUBRIC, (96,), 2, self.mesh)(broken, [case])

  def test_placeholders_in_a_critique_are_text(self):
    case = judge.Case([dict(role="system", content="Be strict."), *chat.question("Q")], "A",
                      "{answer} {question} {critique}")
    self.assertEqual(judge.write(RUBRIC, case), [
        dict(role="system", content="Be strict."),
        dict(role="user", content="Q\nA\n{answer} {question} {critique}\nIs it useful?")])

  def test_triples_of_another_rubric_or_critic_are_not_gone_on_with(self):
    workdir = self.create_tempdir().full_path
    rubric = self.create_tempfile(content=RUBRIC)
    config = lambda **changes: tiny(filter="both", rubric=rubric.full_path, **changes)
    rows = [dict(id="1", messages="[]", answer="3", prompt_ids=[1])]
    opcd.begin_with(config(), workdir, rows)
    (opcd.folder(workdir, 0)).mkdir()
    (opcd.folder(workdir, 0) / "answers.jsonl").write_text("{}\n")
    opcd.begin_with(config(), workdir, rows)
    for who in ("student", "critic"):
      with self.assertRaisesRegex(ValueError, f"the {who}'s weights changed since the rows"):
        opcd.begin_with(config(**{who: dict(source="random:tiny_weak")}), workdir, rows)
    with self.assertRaisesRegex(ValueError, "the questions changed since the rows"):
      opcd.begin_with(config(), workdir, [dict(rows[0], answer="4")])
    rubric.write_text(RUBRIC + " Really?")
    with self.assertRaisesRegex(ValueError, "the rubric's words changed since the rows"):
      opcd.begin_with(config(), workdir, rows)

  def test_what_has_been_learned_from_must_still_be_there(self):
    workdir = self.create_tempdir().full_path
    path = opcd.folder(workdir, 0) / critiques.TRIPLES
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    self.assertLen(opcd.whole(workdir, 0, 1), 1)
    with self.assertRaisesRegex(ValueError, "has 1 of the 8 triples that were learned from"):
      opcd.whole(workdir, 0, 8)
    with self.assertRaisesRegex(ValueError, "has 0 of the 8 triples"):
      opcd.whole(workdir, 1, 8)

  def test_a_rubric_without_a_placeholder_is_refused(self):
    path = self.create_tempfile(content="{question} {answer}?").full_path
    with self.assertRaisesRegex(ValueError, r"lacks \{critique\}; it must hold \{question\}"):
      judge.read_rubric(path)

  def test_the_shipped_rubric_is_one(self):
    root = pathlib.Path(__file__).parents[2]
    self.assertIn("yes or no", judge.read_rubric(str(root / "configs/rubrics/critique.txt")))


if __name__ == "__main__":
  absltest.main()
