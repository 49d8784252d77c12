"""The OPD family: who is asked, what is learned from the answer, and what is refused."""

import contextlib
import functools
import gc
import importlib.util
import json
import math
import os
import pathlib
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, main, preemption, sharding, train_state
from opd_jax.data import builders, loader
from opd_jax.pipelines import objective, opd, peers
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import stages, teacher_samples
from opd_jax.rollouts import scorer
from opd_jax.rollouts.batch import Batch

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TWO = dict(poor=dict(source="tiny:weak"), strong=dict(source="tiny:teacher"))

ROWS = dict(train=64, test=8, mix=dict(plain=1.0))
TO_TWO = dict(**ROWS, teachers={"1": "poor", "2": "strong"})


def tiny(**changes):
  """A run of a few seconds."""
  settings = dict(
      total_steps=2, log_every=1, writers=("jsonl",), export=True,
      data=dict(builder_kw=ROWS),
      rollout=dict(prompts=4, group_size=4, max_prompt=40, max_response=24),
      optimizer=dict(learning_rate=1e-3), eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
      checkpoint=dict(best_metric="eval/mean@2"))
  for section, values in changes.items():
    merge = isinstance(values, dict) and section in settings
    settings[section] = {**settings[section], **values} if merge else values
  return configs.on_policy(**settings)


def load(name, form):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(form)


def run(config, workdir):
  """The learned weights, and what was measured but for times and compilations."""
  configs.validate(config)
  main.pick(config.pipeline).run(config, workdir)
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  lines = [{name: value for name, value in json.loads(line).items()
            if not name.startswith(("time/", "compile/"))} for line in text.splitlines()]
  return safetensors.load_file(f"{workdir}/export/model.safetensors"), lines


def updates(lines):
  return [line for line in lines if "loss/total" in line]


def ragged():
  """Two groups of random tokens, of rows of every length, off-policy by up to two nats."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 320, (8, 16), np.int32)
  mask = np.arange(12) < np.array([12, 1, 3, 5, 12, 7, 2, 9])[:, None]
  return Batch(tokens[:, :4], np.ones((8, 4), bool), tokens[:, 4:], mask, mask,
               rng.uniform(-9.0, -7.0, mask.shape).astype(np.float32))


def row(batch, i):
  return jax.tree.map(lambda x: x[i:i + 1], batch)


def grpo(**loss):
  return dict(teacher=dict(source=""), loss={
      "signal": "group_advantage", "surrogate": "clipped", **loss})


class FamilyTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    self.enter_context(jax.set_mesh(mesh))
    self.mesh = mesh

  def build(self, config):
    student = policies.load(config.student, config.model, keys.root(0), self.mesh)
    return opd.build(config, student, self.mesh)

  def workdir(self):
    return self.create_tempdir().full_path

  def gradient(self, method, batch):
    params = method.student.params
    step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (total, _), grads = step(params, self.score(method, batch), method.constants(None))
    return float(total), grads

  def score(self, method, batch):
    state = train_state.TrainState(0, method.student.params, None, None)
    scored = method.score(state, batch)
    return scored if batch.reward is None else method.grade(state, scored, None, None)[0]

  def assert_same_answers(self, found, want, tolerance=1e-5):
    np.testing.assert_array_equal(found.learn, want.learn)
    for name in ("teacher_logprobs", "teacher_hidden", "reference_logprobs", "old_logprobs"):
      a, b = getattr(found, name), getattr(want, name)
      self.assertEqual(a is None, b is None, name)
      if a is not None:
        a, b = (np.asarray(x)[np.asarray(want.mask)] for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


class SignalTest(FamilyTest):

  def test_lam_1_is_opd_bit_for_bit_whatever_the_reference(self):
    want, measured = run(tiny(), self.workdir())
    found, also = run(tiny(loss=dict(signal="g_opd", lam=1.0),
                           reference=dict(source="tiny:weak")), self.workdir())
    self.assertEqual(also, measured)
    for name, value in want.items():
      np.testing.assert_array_equal(found[name], value, name)

  def test_another_lam_moves_the_target_by_the_gap_between_teacher_and_reference(self):
    config = tiny(loss=dict(signal="g_opd", lam=1.5), reference=dict(source="tiny:weak"))
    batch = self.score(self.build(config), ragged())
    signal = objective.SIGNALS["g_opd"](batch.sampler_logprobs, batch, config.loss)
    teacher, reference = np.float64(batch.teacher_logprobs), np.float64(batch.reference_logprobs)
    want = 1.5 * (teacher - reference) - (np.float64(batch.sampler_logprobs) - reference)
    mask = np.asarray(batch.learn)
    np.testing.assert_allclose(np.asarray(signal)[mask], want[mask], rtol=1e-5, atol=1e-5)
    self.assertGreater(np.abs(teacher - reference)[mask].mean(), 0.1)


class PositionTest(FamilyTest):

  @parameterized.product(surrogate=("score_function", "reverse_kl"), side=("prefix", "suffix"))
  def test_a_part_of_each_response_is_all_that_is_learned(self, surrogate, side):
    def gradient(learn, **loss):
      method = self.build(tiny(loss=dict(surrogate=surrogate, **loss)))
      scored = self.score(method, batch).replace(learn=learn)
      step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
      (total, _), grads = step(method.student.params, scored, method.constants(None))
      return float(total), grads

    def part(fraction):
      return dict(weight="position", position=dict(fraction=fraction, side=side))

    batch = ragged()
    uniform, whole = gradient(batch.mask), gradient(batch.mask, **part(1.0))
    self.assertEqual(whole[0], uniform[0])
    jax.tree.map(np.testing.assert_array_equal, whole[1], uniform[1])
    # ceil(0.3 n) of each row's n tokens; their sum is over the number of all tokens.
    lengths = batch.mask.sum(axis=1, keepdims=True)
    there, size = np.arange(12)[None], np.ceil(0.3 * lengths)
    learn = there < size if side == "prefix" else (there >= lengths - size) & batch.mask
    total, grads = gradient(batch.mask, **part(0.3))
    alone, wanted = gradient(learn)
    share = learn.sum() / batch.mask.sum()
    np.testing.assert_allclose(total, share * alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, share * b, rtol=2e-4, atol=2e-6),
                 grads, wanted)
    self.assertNotAlmostEqual(total, uniform[0], places=3)


class RoutingTest(FamilyTest):

  @parameterized.parameters("score_function", "jsd")
  def test_a_batch_whose_rows_go_to_different_teachers_equals_each_row_alone(self, surrogate):
    settings = dict(surrogate=surrogate, aggregate="sequence_sum")
    whole = self.build(tiny(teachers=TWO, data=dict(builder_kw=TO_TWO), loss=settings))
    alone = {name: self.build(tiny(teacher=section, loss=settings))
             for name, section in TWO.items()}
    batch = jax.tree.map(lambda x: x[:4], ragged())
    ids = np.array([1, 0, 0, 1], np.int32)
    total, grads = self.gradient(whole, batch.replace(teacher_id=ids))
    owners = [alone[sorted(TWO)[i]] for i in ids]
    each = [self.gradient(owner, row(batch, i)) for i, owner in enumerate(owners)]
    np.testing.assert_allclose(total, np.mean([t for t, _ in each]), rtol=1e-5)
    mean = jax.tree.map(lambda *x: sum(x) / 4, *(g for _, g in each))
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(mean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size),
                 grads, mean)
    exact = np.asarray(whole.reverse_kl(whole.student.params, batch.replace(teacher_id=ids)))
    for i, owner in enumerate(owners):
      np.testing.assert_allclose(exact[i:i + 1], owner.reverse_kl(
          whole.student.params, row(batch, i)), rtol=1e-4, atol=1e-5)

  def data(self, *names):
    rows = [dict(id=str(i), question=f"Compute {i}+1 mod 10.", answer=str((i + 1) % 10),
                 expert=names[i % len(names)]) for i in range(16)]
    file = self.create_tempfile(content="\n".join(map(json.dumps, rows))).full_path
    return dict(builder="jsonl", builder_kw=dict(
        train=file, test=file, question="question", answer="answer", teacher="expert"))

  def test_rows_are_sent_to_the_teachers_they_name_and_every_teacher_is_measured(self):
    workdir = self.workdir()
    _, lines = run(tiny(data=self.data("strong", "poor"), teachers=TWO,
                        teacher_memory="host"), workdir)
    self.assertEqual(updates(lines)[-1]["teacher/dropped_tokens"], 0)
    for name in TWO:
      json.loads(open(f"{workdir}/eval/teacher_{name}.json").read())

  def test_a_row_that_names_no_teacher_of_the_config_is_refused_before_the_first_step(self):
    for names, pattern in (
        (("strong", "wise"), "row '.*' names the teacher 'wise'.*'poor', 'strong'"),
        (("strong", ""), "row '.*' names no teacher.*poor, strong")):
      workdir = self.workdir()
      with self.assertRaisesRegex(ValueError, pattern):
        run(tiny(data=self.data(*names), teachers=TWO), workdir)
      self.assertFalse(pathlib.Path(workdir, "metrics.jsonl").exists())
    workdir = self.workdir()
    with self.assertRaisesRegex(ValueError, "names the teacher 'wise'.*one `teacher` without"):
      run(tiny(data=self.data("", "wise")), workdir)
    self.assertFalse(pathlib.Path(workdir, "metrics.jsonl").exists())

  def test_a_row_without_a_name_has_the_only_teacher(self):
    self.assertEqual(loader.teacher_id(dict(id="a", teacher=""), ("strong",)), 0)
    self.assertEqual(loader.teacher_id(dict(id="a", teacher=""), ("",)), 0)
    self.assertEqual(loader.teacher_id(dict(id="a", teacher="poor"), ("strong", "poor")), 1)


class PartsTest(FamilyTest):

  @parameterized.parameters(
      dict(loss=dict(signal="g_opd", lam=1.5, surrogate="clipped", updates_per_batch=2),
           reference=dict(source="tiny:weak")),
      dict(loss=dict(surrogate="reverse_kl"), teachers=TWO, data=dict(builder_kw=TO_TWO)))
  def test_the_number_of_micro_batches_changes_no_answer(self, loss, **who):
    batch = ragged().replace(teacher_id=np.array([1, 0, 0, 1, 1, 1, 0, 1], np.int32))
    self.assert_same_answers(*(self.score(self.build(tiny(
        loss=dict(micro_batches=count, **loss), **who)), batch) for count in (1, 4)))

  def test_parts_take_less_memory_than_the_whole(self):
    config, whole = tiny(), ragged()
    policy = policies.load(config.teacher, config.model, keys.root(0), self.mesh)
    batch = jax.tree.map(lambda x: np.tile(x, (8, 4)), whole)  # 64 rows of 64 tokens
    taken = []
    for config.loss.micro_batches in (1, 8):
      ask = jax.jit(functools.partial(opd.score, policy.model, (policy.model,), None, config.loss))
      compiled = ask.lower(policy.params, (policy.params,), None, batch).compile()
      taken.append(compiled.memory_analysis().temp_size_in_bytes)
    self.assertLess(taken[1], taken[0] / 4)


class MemoryTest(FamilyTest):

  THREE = dict(own=dict(source="tiny:student"), **TWO)

  def on_device(self):
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind != sharding.HOST)

  @contextlib.contextmanager
  def watched(self):
    """What more is in device memory, before and after every move of parameters from here on."""
    start, found = self.on_device(), []

    def watch(move):
      def moved(tree):
        found.append(self.on_device() - start)
        tree = jax.block_until_ready(move(tree))
        found.append(self.on_device() - start)
        return tree
      return moved

    with mock.patch.object(sharding, "to_host", watch(sharding.to_host)), \
         mock.patch.object(sharding, "to_device", watch(sharding.to_device)):
      yield found

  def test_asked_in_turn_teachers_say_the_same_and_one_is_on_the_device_at_a_time(self):
    config = tiny(
        teachers=self.THREE, reference=dict(source="tiny:weak"), data=dict(builder_kw=TO_TWO),
        loss=dict(surrogate="reverse_kl", reference_kl=0.1, micro_batches=2))
    together = self.build(config)
    student = together.student
    config.teacher_memory = "host"
    with self.watched() as loading:
      in_turn = opd.build(config, student, self.mesh)
    batch = ragged().replace(teacher_id=np.array([1, 0, 2, 1, 2, 2, 0, 1], np.int32))
    with self.watched() as asking:
      said = self.score(in_turn, batch)
      gaps = in_turn.reverse_kl(student.params, batch)
    self.assert_same_answers(said, self.score(together, batch), tolerance=0)
    np.testing.assert_array_equal(
        np.asarray(gaps)[batch.mask],
        np.asarray(together.reverse_kl(student.params, batch))[batch.mask])

    room = 2**16  # for the batch
    largest = max(sum(x.nbytes for x in jax.tree.leaves(teacher.params))
                  for teacher in together.teachers.values())
    self.assertLen(loading, 2 * (4 + 3))  # three teachers and the reference; heads
    for one in loading[:8:2]:  # loaded, and now it goes to the host
      self.assertBetween(one, room, largest + room)
    heads = sum(x.nbytes for x in in_turn.constants(None))
    self.assertLess(max(loading), largest + heads + room)
    self.assertLen(asking, 2 * (4 + 3))
    self.assertLess(max(asking[::2]), room)  # nobody is there when the next comes
    self.assertBetween(max(asking[1::2]), largest, largest + room)


class GRPOTest(FamilyTest):

  @parameterized.parameters(
      (True, 0.0, "token_mean"), (False, 1.5, "token_mean"), (True, 1.5, "sequence_sum"))
  def test_the_loss_is_that_of_a_loop(self, normalize_std, dual, aggregate):
    config = tiny(**grpo(normalize_std=normalize_std, clipped=dict(dual=dual), reference_kl=0.1,
                         aggregate=aggregate, updates_per_batch=2),
                  reference=dict(source="tiny:weak"))
    method = self.build(config)
    batch = ragged().replace(reward=np.array([1, 0, 0, 1, 1, 1, 1, 0.5], np.float32))
    now, _ = scorer.logprobs(method.student.model, method.student.params, batch)
    now = np.asarray(now, np.float64)
    noise = np.random.default_rng(1).uniform(-1.0, 1.0, (2, *now.shape))
    batch = batch.replace(sampler_logprobs=np.float32(now + noise[0]))
    scored = self.score(method, batch)
    np.testing.assert_allclose(scored.old_logprobs, now, rtol=1e-5)
    scored = scored.replace(old_logprobs=np.float32(now + noise[1]))  # as if updated since
    total, _ = jax.jit(method.loss)(method.student.params, scored, None)

    sampler, anchor = np.float64(batch.sampler_logprobs), np.float64(scored.reference_logprobs)
    old = np.float64(scored.old_logprobs)
    rows = []
    for i, reward in enumerate(batch.reward):
      group = np.float64(batch.reward[i // 4 * 4:i // 4 * 4 + 4])
      advantage = reward - sum(group) / 4
      if normalize_std:
        advantage /= math.sqrt(sum((r - sum(group) / 4) ** 2 for r in group) / 3) + 1e-6
      row = []
      for t in range(now.shape[1]):
        if not batch.mask[i, t]:
          continue
        signal = advantage * min(math.exp(old[i, t] - sampler[i, t]), config.loss.importance_cap)
        ratio = math.exp(now[i, t] - old[i, t])
        value = max(-ratio * signal, -min(max(ratio, 0.8), 1.2) * signal)
        if dual and signal < 0:
          value = min(value, -dual * signal)
        gap = anchor[i, t] - now[i, t]
        row.append(value + 0.1 * (math.exp(gap) - 1 - gap))
      rows.append(row)
    want = (sum(map(sum, rows)) / sum(map(len, rows)) if aggregate == "token_mean"
            else sum(map(sum, rows)) / 8)
    np.testing.assert_allclose(total, want, rtol=1e-4)

  def test_groups_that_agree_teach_nothing_and_the_update_is_skipped(self):
    batch = ragged().replace(reward=np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32))
    self.assertFalse(np.any(self.score(self.build(tiny(**grpo())), batch).learn))

  def test_the_only_update_of_a_batch_scores_nothing_twice_and_descends_the_same(self):
    batch = ragged().replace(reward=np.array([1, 0, 0, 1, 1, 1, 1, 0.5], np.float32))
    once, plain = (self.build(tiny(**grpo(surrogate=surrogate)))
                   for surrogate in ("clipped", "score_function"))
    self.assertIsNone(self.score(once, batch).old_logprobs)
    _, ours = self.gradient(once, batch)
    _, theirs = self.gradient(plain, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours, theirs)

  def test_micro_batches_do_not_cut_groups(self):
    found = []
    for micro in (1, 4):
      _, lines = run(tiny(**grpo(updates_per_batch=2, micro_batches=micro)), self.workdir())
      found.append([[line[name] for name in ("loss/total", "loss/signal", "ratio/max")]
                    for line in updates(lines)])
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-6)
    self.assertGreater(found[0][0][2], 1.0001)  # of the second update: the first has moved p


class MixtureTest(FamilyTest):

  def test_batches_are_the_students_and_the_datas_and_resume_in_the_same_order(self):
    config = dict(student_share=0.5, loss=dict(surrogate="jsd"), total_steps=6,
                  rollout=dict(group_size=1, max_response=64), checkpoint=dict(every=2))
    unbroken = self.workdir()
    weights, lines = run(tiny(**config), unbroken)
    own = [line["rollout/own"] for line in updates(lines)]
    self.assertContainsSubset({0.0, 1.0}, own)
    for line in updates(lines):
      self.assertEqual("rollout/reward" in line, line["rollout/own"] == 1.0)
      self.assertEqual("importance/max" in line, line["rollout/own"] == 1.0)
    broken = self.workdir()
    stop = lambda: os.path.exists(f"{broken}/metrics.jsonl") and len(
        pathlib.Path(broken, "metrics.jsonl").read_text().splitlines()) == 1 + own.index(0.0)
    with mock.patch.object(preemption, "guard", lambda: contextlib.nullcontext(stop)):
      main.pick("opd").run(tiny(**config), broken)  # the first batch of the data's was next
    self.assertFalse(os.path.exists(f"{broken}/export"))
    again, also = run(tiny(**config), broken)
    self.assertEqual(also, lines)
    for name, value in weights.items():
      np.testing.assert_array_equal(again[name], value, name)

  @parameterized.parameters(0.0, 1.0)
  def test_the_ends_of_the_mixture(self, share):
    _, lines = run(tiny(student_share=share, loss=dict(surrogate="forward_kl"),
                        rollout=dict(group_size=1, max_response=64)), self.workdir())
    self.assertEqual({line.get("rollout/own", 1.0) for line in updates(lines)}, {share})


class TeacherSamplesTest(FamilyTest):

  def test_responses_are_the_teachers_that_rows_name_and_a_resumed_run_keeps_them(self):
    config = configs.offline(
        total_steps=2, log_every=1, writers=("jsonl",), export=True, teachers=TWO,
        data=dict(builder_kw=TO_TWO),
        rollout=dict(prompts=4, group_size=2, max_prompt=40, max_response=80),
        batch=dict(tokens=240, buckets=(120,), chunk=8),
        eval=dict(prompts=4, samples=2, ks=(1,), batch=4),
        checkpoint=dict(best_metric="eval/mean@2"))
    workdir = self.workdir()
    run(config, workdir)
    file = pathlib.Path(workdir, teacher_samples.FILE)
    said = stages.read(file)
    source = builders.open_source("arithmetic", TO_TWO, "train")
    rows = {row["id"]: row for row in (source[i] for i in range(len(source)))}
    self.assertCountEqual([x["id"] for x in said], rows)
    self.assertEqual({len(x["responses"]) for x in said}, {2})
    # The two write like nobody else: each has answered its own rows.
    owners = [rows[x["id"]]["teacher"] for x in said]
    self.assertEqual(owners, sorted(owners, key=("poor", "strong").index))
    right = {name: np.mean([text.endswith(rows[x["id"]]["answer"]) for x, owner in zip(said, owners)
                            for text in x["responses"] if owner == name])
             for name in ("poor", "strong")}
    self.assertLess(right["poor"], right["strong"])
    at = file.stat().st_mtime_ns
    config.total_steps = 3
    run(config, workdir)
    self.assertEqual(file.stat().st_mtime_ns, at)

    # Broken off while a teacher answers: it goes on behind the last whole block, with the same.
    broken, append = self.workdir(), stages._append

    def once(path, made):
      append(path, made)
      raise KeyboardInterrupt

    with mock.patch.object(stages, "_append", once), self.assertRaises(KeyboardInterrupt):
      run(config, broken)
    half = pathlib.Path(broken, teacher_samples.FILE)
    self.assertLen(stages.read(half), 4)
    run(config, broken)
    self.assertEqual(half.read_bytes(), file.read_bytes())
    config.teachers.poor.source = "tiny:student"
    with self.assertRaisesRegex(ValueError, "poor's weights changed since the rows"):
      run(config, broken)

  @parameterized.parameters("exopd", "exopd_multi_teacher", "exopd_reward_correction", "iw_opd",
                            "grpo", "sft")
  def test_a_run_that_is_broken_off_goes_on_as_if_nothing_had_happened(self, name):
    config = load(name, "smoke")
    config.update(dict(total_steps=4, log_every=1, export=True, writers=("jsonl",),
                       checkpoint=dict(every=100)))
    weights, lines = run(config, self.workdir())
    broken = self.workdir()
    stop = lambda: os.path.exists(f"{broken}/metrics.jsonl") and len(
        pathlib.Path(broken, "metrics.jsonl").read_text().splitlines()) == 3
    with mock.patch.object(preemption, "guard", lambda: contextlib.nullcontext(stop)):
      main.pick(config.pipeline).run(config, broken)
    self.assertFalse(os.path.exists(f"{broken}/export"))
    again, also = run(config, broken)
    self.assertEqual(also, lines)
    for name, value in weights.items():
      np.testing.assert_array_equal(again[name], value, name)

  def test_responses_that_never_end_are_not_learned(self):
    config = load("sft", "quick")
    config.rollout.max_response = 4
    with self.assertRaisesRegex(ValueError, "no response of a teacher ended.*max_response=4"):
      run(config, self.workdir())


class BadInputTest(FamilyTest):

  @parameterized.parameters(
      (dict(loss=dict(signal="g_opd", lam=1.25)), "loss.lam is 1.25.*reference.source is ''"),
      (dict(loss=dict(lam=1.25)), "loss.lam is 1.25, which has no effect without .*'g_opd'"),
      (dict(loss=dict(normalize_std=False)), "normalize_std is False.*'group_advantage'"),
      (dict(loss=dict(iw_opd=dict(signed=True))), "loss.iw_opd is {.*no effect.*'iw_opd'"),
      (dict(loss=dict(clipped=dict(high=0.3))), "loss.clipped is {.*no effect.*'clipped'"),
      (dict(loss=dict(surrogate="clipped", clipped=dict(high=0.3))), "updates_per_batch > 1"),
      (dict(loss=dict(beta=0.1)), "loss.beta is 0.1, .*no effect without loss.surrogate='jsd'"),
      (dict(loss=dict(top_k=8)), "loss.top_k is 8, .*no effect.*'forward_kl'"),
      (dict(loss=dict(surrogate="jsd", tail="renormalize")), "no effect without loss.top_k > 0"),
      (dict(loss=dict(surrogate="jsd", importance_cap=2.0)), "importance_cap is 2.0.*no effect"),
      (dict(reference=dict(source="tiny:weak")), "reference.source is 'tiny:weak'.*no effect"),
      (dict(student_share=1.5), "student_share is 1.5; it must be at least 0 and at most 1"),
      (dict(student_share=0.5), "student_share is 0.5.*the student's own samples alone"),
      (dict(student_share=0.5, loss=dict(surrogate="jsd")), "one response a prompt"),
      (dict(student_share=0.5, loss=dict(surrogate="jsd", reference_kl=0.1),
            reference=dict(source="tiny:weak")), "estimated from the student's own samples"),
      (dict(loss=dict(signal="g_opd", lam=-0.5)), "loss.lam is -0.5; it must be 0 or more"),
      (dict(loss=dict(reference_kl=0.1)), "loss.reference_kl is 0.1.*needs a reference"),
      (dict(loss=dict(weight="iw")), "loss.weight is 'iw'.*uniform, iw_opd, position"),
      (dict(loss=dict(weight="position", position=dict(fraction=0.0))), "fraction is 0.0; .*above"),
      (dict(loss=dict(weight="position", position=dict(fraction=1.5))), "fraction is 1.5; .*at most 1"),
      (dict(loss=dict(position=dict(side="middle"))), "side is 'middle'.*prefix, suffix"),
      (dict(loss=dict(iw_opd=dict(max_weight=0.5))), "max_weight is 0.5; .*at least 1"),
      (dict(loss=dict(clipped=dict(dual=0.5))), "dual is 0.5; .*above 1, or 0"),
      (dict(loss=dict(updates_per_batch=0)), "updates_per_batch is 0"),
      (dict(loss=dict(signal="group_advantage", surrogate="jsd")),
       "loss.signal is 'group_advantage', which has no effect"),
      (dict(grpo(), rollout=dict(group_size=1)), "group_size is 1: nothing would be learned"),
      (dict(teacher=dict(source="")), "learn from a teacher, and there is none"),
      (dict(teacher=dict(source="tiny:teacher"), teachers=TWO), "both `teachers`"),
      (dict(teachers={"a/b": dict(source="tiny:weak")}), "the name 'a/b'"),
  )
  def test_choices_that_do_not_go_together(self, changes, pattern):
    with self.assertRaisesRegex(ValueError, pattern):
      run(tiny(**changes), self.workdir())

  def test_a_section_with_a_key_that_teachers_do_not_have(self):
    with self.assertRaisesRegex(ValueError, "config.teachers.math.sauce.*'source'"):
      tiny(teachers=dict(math=dict(sauce="tiny:weak")))


class FormulaTest(parameterized.TestCase):

  @parameterized.parameters(
      ("opd", "loss = token_mean(-A w log p),  A = log q - log p,  w = min(p / mu, 5);  "
              "q: tiny:teacher"),
      ("exopd", "loss = token_mean(-A w log p),  A = 1.25 (log q - log b) - (log p - log b),  "
                "w = min(p / mu, 5);  q: tiny:teacher;  b: tiny:student"),
      ("iw_opd", "loss = token_mean(-A w log p),  A = log q - log p,  w = g min(p / mu, 5),  "
                 "g = 1 + 0.5 clip(1 - F, 0, 1),  F_t = sum_(k<t) d_k / sum_k d_k,  "
                 "d = |log q - log p|;  q: tiny:teacher"),
      ("grpo", "loss = token_mean(max(-r A w, -clip(r, 0.8, 1.2) A w); at most -3 A w where A < 0),"
               "  r = p / p_old,  A = (R - mean R) / (std R + 1e-6) over a prompt's 4 responses,  "
               "w = min(p_old / mu, 5),  2 updates a batch"),
      ("gkd", "loss = token_mean(w JSD_0.5(q, p) over the vocabulary),  w = 1,  50% of the batches "
              "the student's own, the others the data's;  q: tiny:teacher"))
  def test_the_formula_says_everything_in_force(self, name, want):
    self.assertEqual(objective.formula(load(name, "smoke")), want)

  def test_weights_and_several_teachers_are_said_too(self):
    said = objective.formula(tiny(teachers=TWO, reference=dict(source="tiny:weak"), loss=dict(
        weight="position", position=dict(side="suffix"), reference_kl=0.01)))
    for part in ("w = g min(p / mu, 5),  g = 1 in the last 30% of a response, 0 elsewhere",
                 " + 0.01 k3)",
                 "q: poor tiny:weak or strong tiny:teacher;  b: tiny:weak"):
      self.assertIn(part, said)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters("opd", "exopd", "exopd_multi_teacher", "exopd_reward_correction",
                            "iw_opd", "gkd", "grpo", "sft", "mopd", "sdpo", "dpo_online", "simpo",
                            "verified_sft")
  def test_every_form_is_valid_and_some_quick_ones_run(self, name):
    for form in ("paper", "quick", ""):
      configs.validate(load(name, form))
      if name in ("mopd", "sdpo"):
        peers.check(load(name, form))
      elif name != "sft":
        objective.check(load(name, form))
    paper = load(name, "paper")
    batches = ([loader.rows_in(size, paper.batch.tokens) for size in paper.batch.buckets]
               if name == "sft" else [paper.rollout.prompts * paper.rollout.group_size])
    for data in (8, 32):  # devices of a small pod, and the paper's
      for rows in batches:
        policies.check_rows("rows", rows, SimpleNamespace(shape=dict(replica=1, data=data)),
                            paper.loss.micro_batches)
    if name in ("exopd_multi_teacher", "sft"):  # the others' smoke forms run in configs_test
      config = load(name, "quick")
      _, lines = run(config, self.create_tempdir().full_path)
      self.assertEqual(lines[-1]["step"], config.total_steps)

  @parameterized.parameters("", "quick", "paper")
  def test_the_distillations_differ_in_their_loss_and_nothing_else_that_counts(self, form):
    base = load("opd", form).to_dict()
    for name, more in (("exopd", set()), ("iw_opd", {"teacher"}), ("gkd", {"student_share", "data"})):
      other = load(name, form).to_dict()
      differ = {key for key in base if base[key] != other[key]}
      self.assertContainsSubset(differ, {"loss", "reference"} | more)


if __name__ == "__main__":
  absltest.main()
