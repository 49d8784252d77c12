"""Objectives of given responses: as the papers' formulas say, whatever the batches, and resumed."""

import functools
import json
import math
import os
import pathlib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import keys, main, sharding, train_state
from opd_jax.data import builders
from opd_jax.losses import weights
from opd_jax.pipelines import given, reward_model, scoring, stages
from opd_jax.pipelines import policy as policies

LENGTHS = ((9, 4, 1, 12), (3, 3, 7, 2), (5, 11, 8, 1), (2, 6, 6, 10))


def data(folder, groups):
  """Rows of sums, whose groups of responses are given as dicts."""
  path = pathlib.Path(folder, "rows.jsonl")
  path.write_text("".join(
      json.dumps(dict(id=f"r{i}", q=f"{i % 10}+2=?", a=str(i % 10 + 2), g=group)) + "\n"
      for i, group in enumerate(groups)))
  return dict(builder="jsonl", builder_kw=dict(
      train=str(path), test=str(path), question="q", answer="a", group="g"))


def groups(size, rows=12, seed=0):
  """Random responses with random log-probabilities under two models."""
  rng = np.random.default_rng(seed)
  text = lambda: "".join(rng.choice(list("0123456789+"), rng.integers(1, 20)))
  return [[dict(response=text(), weak_logprob=float(rng.normal(-9)),
                weak_reference_logprob=float(rng.normal(-9))) for _ in range(size)]
          for _ in range(rows)]


def config(objective, folder, made, **changes):
  settings = dict(
      total_steps=4, log_every=1, writers=("jsonl",), data=data(folder, made),
      reference=dict(source="tiny:weak" if objective == "dpo" else ""),
      rollout=dict(group_size=4, max_prompt=40, max_response=8),
      batch=dict(tokens=48 * 16, buckets=(48,), chunk=8),
      optimizer=dict(learning_rate=1e-3),
      eval=dict(prompts=4, samples=1, ks=(1,), batch=4),
      checkpoint=dict(every=2, best_metric="eval/mean@1"))
  for section, values in changes.items():
    settings[section] = ({**settings.get(section, {}), **values} if isinstance(values, dict)
                         else values)
  settings["loss"] = dict(objective=objective, **settings.get("loss", {}))
  return configs.offline(**settings)


def run(settings, workdir):
  configs.validate(settings)
  main.remember(settings, workdir)
  main.pick(settings.pipeline).run(settings, workdir)
  return [json.loads(line) for line in
          pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]


def weights_of(workdir):
  return safetensors.load_file(f"{workdir}/export/model.safetensors")


class FormulaTest(parameterized.TestCase):
  """The loss of the loop against the formula of the paper, term by term."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    settings = configs.offline(model=dict(remat="none"))
    cls.mesh = sharding.make_mesh(1, 1)
    cls.student = policies.load(settings.student, settings.model, keys.root(0), cls.mesh)

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path
    self.enter_context(jax.set_mesh(self.mesh))

  def made(self, settings, bad=()):
    """The groups as the loop gets them, and their members."""
    objective = given.of(settings)
    rng, members = np.random.default_rng(1), []
    for i, lengths in enumerate(LENGTHS):
      for j, length in enumerate(lengths[:objective.group_size]):
        members.append(None if (i, j) in bad else dict(
            prompt_ids=rng.integers(3, 320, 3 + i).tolist(),
            response_ids=rng.integers(3, 320, length).tolist(),
            reference_logprob=float(rng.normal(-20)), weak_logprob=float(rng.normal(-9)),
            weak_reference_logprob=float(rng.normal(-9))))
    batch = given.as_batch(members, 24, 0)
    return given.grouped(batch, members, objective, settings.loss), members

  def logps(self, params, members):
    """log p of each response, of logits and the rows as they are: f32[B], 0 where there is none."""
    rows = [m["prompt_ids"] + m["response_ids"] if m else [3, 3] for m in members]
    ids = np.array([row + [0] * (24 - len(row)) for row in rows])
    states, _ = self.student.model.apply(
        {"params": params}, ids, np.tile(np.arange(24), (len(ids), 1)), np.ones_like(ids))
    said = jax.nn.log_softmax(states @ params["embedding"].T)[:, :-1]
    each = jnp.take_along_axis(said, ids[:, 1:, None], 2)[..., 0]
    first = np.array([len(m["prompt_ids"]) if m else 99 for m in members])[:, None]
    length = np.array([len(row) for row in rows])[:, None]
    columns = np.arange(1, 24)[None]
    return jnp.sum(each * ((columns >= first) & (columns < length)), axis=1)

  def direct(self, settings, params, members):
    """The papers' losses, one response after the other."""
    logp = self.logps(params, members)
    total, count = 0.0, 0
    if settings.loss.objective == "dpo":  # DPO, equation 7
      for c in range(0, len(members), 2):
        if members[c]:
          gap = lambda i: logp[i] - members[i]["reference_logprob"]
          total -= jnp.log(1.0 / (1.0 + jnp.exp(-settings.loss.dpo.beta * (gap(c) - gap(c + 1)))))
          count += 1
      return total / count
    for start in range(0, len(members), 4):  # EVE, equation 8, over the responses that are there
      there = [i for i in range(start, start + 4) if members[i]]
      f = {i: settings.loss.eve.ratio * (members[i]["weak_logprob"]
                                         - members[i]["weak_reference_logprob"]) for i in there}
      for i in there:
        share = math.exp(f[i]) / sum(math.exp(x) for x in f.values())
        total -= len(there) * share * logp[i]
        count += 1
    return total / count

  def step(self, settings, micro_batches, batch):
    """The loop's own train step, by plain descent: the gradient."""
    optimizer = optax.sgd(1.0)
    state = train_state.create(self.student.params, optimizer, False, self.mesh)
    step = jax.jit(train_state.make_train_step(
        functools.partial(given.loss, self.student.model, settings.loss),
        functools.partial(given.describe, settings.loss), optimizer, given.count(settings),
        micro_batches, 0.0))
    after, metrics = step(state, batch, None)
    self.assertEqual(metrics["update/skipped"], 0.0)
    return jax.tree.map(jnp.subtract, state.params, after.params)

  @parameterized.parameters(
      ("dpo", dict(dpo=dict(beta=0.3)), (), 1), ("dpo", {}, ((1, 0), (1, 1)), 2),
      ("eve", dict(eve=dict(ratio=2.0)), (), 1),
      ("eve", {}, ((0, 1), *((2, j) for j in range(4))), 4))
  def test_the_loops_gradient_is_that_of_the_papers_loss(self, name, loss, bad, micro_batches):
    settings = config(name, self.folder, groups(4), loss=loss, model=dict(remat="none"))
    batch, members = self.made(settings, bad)
    want = jax.jit(jax.grad(lambda params: self.direct(settings, params, members)))(
        self.student.params)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    self.assertGreater(size, 1e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * size),
                 self.step(settings, micro_batches, batch), want)

  def test_weights_are_the_kernels_where_all_responses_are_there(self):
    rng = np.random.default_rng(0)
    weak, anchor = rng.normal(-50, 9, (2, 5, 6)).astype(np.float32)
    everywhere = np.ones((5, 6), bool)
    for ratio in (0.0, 0.5, 1.0, 2.0):
      np.testing.assert_allclose(given.weigh(weak, anchor, everywhere, ratio),
                                 weights.self_normalized(weak, anchor, ratio), rtol=1e-5, atol=1e-7)

  def test_without_weights_no_numbers_are_needed(self):
    settings = config("eve", self.create_tempdir().full_path, groups(4), loss=dict(
        eve=dict(ratio=0.0)))
    objective = given.of(settings)
    group = [dict(response="1", prompt_ids=[3, 4], response_ids=[5, 6])] * 3 + [None]
    found = given.grouped(given.as_batch(group, 8, 0), group, objective, settings.loss)
    np.testing.assert_array_equal(found.weight, [[1.0, 1.0, 1.0, 0.0]])
    self.assertIn("-log p, of a prompt's K = 4", given.formula(settings, "the data"))

  def test_weights_leave_out_what_is_not_there_and_are_never_nan(self):
    weak = np.array([[0.0, -1e30, 3.0, -2.0], [-900.0, 0.0, -901.0, 0.0], [0.0] * 4], np.float32)
    real = np.array([[True, False, True, True], [True, False, True, False], [False] * 4])
    for ratio in (0.0, 1.0, 50.0):
      found = given.weigh(weak, np.zeros_like(weak), real, ratio)
      np.testing.assert_array_equal(found[~real], 0.0)
      np.testing.assert_allclose(found.sum(axis=1), [3.0, 2.0, 0.0], rtol=1e-5)

  def test_the_pairs_of_a_reward_model(self):
    settings = config("dpo", self.folder, groups(2))
    batch, members = self.made(settings, ((1, 0), (1, 1)))
    model, width = self.student.model, self.student.model.config.embed_dim
    score = np.random.default_rng(2).normal(size=width).astype(np.float32)
    params = reward_model.with_head(self.student.params, width) | {"score": jnp.asarray(score)}

    def direct(params):
      rows = [m["prompt_ids"] + m["response_ids"] for m in filter(None, members)]
      ids = np.array([row + [0] * (24 - len(row)) for row in rows])
      states, _ = model.apply({"params": params["trunk"]}, ids,
                              np.tile(np.arange(24), (len(ids), 1)), np.ones_like(ids))
      r = [states[i, len(row) - 1] @ params["score"] for i, row in enumerate(rows)]
      return -sum(jnp.log(1.0 / (1.0 + jnp.exp(r[i + 1] - r[i])))
                  for i in range(0, len(r), 2)) / (len(r) // 2)

    found = jax.jit(jax.value_and_grad(
        lambda p: reward_model.loss(model, p, batch, None)[0]))(params)
    want = jax.jit(jax.value_and_grad(direct))(params)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * size),
                 found, want)


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path

  def workdir(self):
    return self.create_tempdir().full_path

  def resumed(self, made, name, **changes):
    """Metrics and workdir of an unbroken run, whose weights a run in two parts has had too."""
    whole, parts = self.workdir(), self.workdir()
    lines = run(config(name, self.folder, made, **changes), whole)
    for steps in (2, 4):
      run(config(name, self.folder, made, total_steps=steps, **changes), parts)
    for key, value in weights_of(whole).items():
      np.testing.assert_array_equal(value, weights_of(parts)[key], err_msg=key)
    return [line for line in lines if "loss/total" in line], whole

  def test_dpo_asks_its_reference_once_and_goes_on_bit_for_bit(self):
    lines, workdir = self.resumed(groups(2), "dpo", student=dict(source="tiny:weak"))
    # A student that begins as its reference has no margin before its first update.
    np.testing.assert_allclose(lines[0]["loss/total"], math.log(2), rtol=1e-5)
    np.testing.assert_allclose(lines[0]["loss/chosen_reward"], 0.0, atol=1e-5)
    self.assertLess(lines[-1]["loss/total"], lines[0]["loss/total"])
    rows = stages.read(pathlib.Path(workdir, "reference_logprobs.jsonl"))
    self.assertEqual([len(row["logprobs"]) for row in rows], [2] * 12)

  def test_eve_counts_what_cannot_be_weighed_and_goes_on_bit_for_bit(self):
    made = groups(4)
    made[0][1]["weak_logprob"] = -math.inf
    made[1][0]["weak_reference_logprob"] = math.nan
    made[2][3]["response"] = ""
    for member in made[3]:
      member["response"] = ""
    made[4] = made[4][:2]  # fewer were sampled: none of them is bad
    lines, _ = self.resumed(made, "eve")
    for line in lines:
      self.assertEqual(line["data/unusable_responses"], 7)
      self.assertEqual(line["data/unusable_groups"], 1)
      self.assertTrue(math.isfinite(line["loss/total"]))
      self.assertTrue(math.isfinite(line["update/gradient_norm"]))
      self.assertBetween(line["loss/effective_responses"], 1.0, 4.0)

  def test_eve_asks_for_the_numbers_that_the_data_does_not_bring(self):
    made = [[dict(response=m["response"]) for m in group] for group in groups(4)]
    asking = dict(scores=dict(weak_logprob=dict(source="tiny:teacher"),
                              weak_reference_logprob=dict(source="tiny:weak")))
    workdir = self.workdir()
    run(config("eve", self.folder, made, total_steps=2, **asking), workdir)
    found = [stages.read(pathlib.Path(workdir, f"{name}s.jsonl"))
             for name in ("weak_logprob", "weak_reference_logprob")]
    told = {a["id"]: [dict(response=m["response"], weak_logprob=x, weak_reference_logprob=y)
                      for m, x, y in zip(group, a["logprobs"], b["logprobs"])]
            for a, b in zip(*found) for group in [made[int(a["id"][1:])]]}
    other = self.workdir()  # the same, with the numbers brought by the data
    run(config("eve", self.folder, [told[f"r{i}"] for i in range(12)], total_steps=2), other)
    for key, value in weights_of(workdir).items():
      np.testing.assert_array_equal(value, weights_of(other)[key], err_msg=key)

  def test_data_without_a_usable_response_is_an_error(self):
    made = groups(4, rows=4)
    for member in sum(made, []):
      member["weak_logprob"] = math.nan
    with self.assertRaisesRegex(ValueError, "none of 4 rows brings responses.* 16 of them"):
      run(config("eve", self.folder, made), self.workdir())

  @parameterized.parameters(
      ("eve", 5, {}, "row 'r0' has 5 responses.*at most rollout.group_size=4"),
      ("dpo", 3, {}, "row 'r0' has 3 responses.*exactly 2, the better one first"),
      ("eve", 4, dict(loss=dict(eve=dict(fields=("logprob", "")))), "needs a number in 'logprob'"),
      ("eve", 4, dict(loss=dict(dpo=dict(beta=0.2))), "loss.dpo is .* no effect without"),
      ("dpo", 2, dict(reference=dict(source="")), "reference.source ''; DPO needs a reference"),
      ("eve", 4, dict(reference=dict(source="tiny:weak")), "others have no use for one"),
      ("eve", 4, dict(teacher=dict(source="tiny:weak")), "learned by 'sft' alone"),
      ("eve", 4, dict(scores=dict(logprob=dict(source="tiny:weak"))), "does not read; it reads weak"),
      ("best", 4, {}, "loss.objective is 'best'; it must be one of sft, dpo, eve"),
  )
  def test_what_cannot_be_learned_is_named(self, name, size, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      run(config(name, self.folder, groups(size, rows=4), **changes), self.workdir())

  def test_few_effective_responses_are_told(self):
    objective = given.Objective("eve", 16, (), False)
    self.assertIn("1.2 effective responses of the 16", given.warning(
        {"loss/effective_responses": 1.2}, objective))
    self.assertEqual(given.warning({"loss/effective_responses": 1.7}, objective), "")


class RewardModelTest(absltest.TestCase):

  def settings(self, made, **changes):
    return configs.reward_model(**(dict(
        total_steps=20, log_every=5, writers=("jsonl",), student=dict(source="tiny:weak"),
        data=data(self.create_tempdir().full_path, made),
        batch=dict(tokens=48 * 16, buckets=(48,), chunk=16),
        optimizer=dict(learning_rate=3e-3), eval=dict(prompts=16), checkpoint=dict(every=10))
        | changes))

  def test_it_learns_what_is_longer_is_saved_and_judges_texts(self):
    made = [sorted(g, key=lambda m: -len(m["response"])) for g in groups(2, rows=32)]
    workdir, settings = self.create_tempdir().full_path, self.settings(made)
    lines = run(settings, workdir)
    self.assertGreater(lines[-1]["eval/accuracy"], 0.9)
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      judge = reward_model.load(workdir, settings, mesh, 0.55)
      ask = [[{"role": "user", "content": "1+2=?"}]] * 2
      short, long = judge(ask, ["12", "12+34+56+78+9"])
    self.assertGreater(long, short)

  def test_one_that_cannot_tell_is_refused_unless_told(self):
    made = groups(2, rows=16)
    made = made + [pair[::-1] for pair in made]  # each pair both ways: nothing to learn
    workdir = self.create_tempdir().full_path
    with self.assertRaisesRegex(ValueError, "of the held-out pairs, and min_accuracy is 55.0%"):
      run(self.settings(made, total_steps=2, eval=dict(prompts=32)), workdir)
    self.assertIn("2", os.listdir(f"{workdir}/checkpoints"))
    mesh, settings = sharding.make_mesh(1, 1), self.settings(made)
    with jax.set_mesh(mesh):
      with self.assertRaisesRegex(ValueError, "set min_accuracy=0 to go on"):
        reward_model.load(workdir, settings, mesh, 0.55)
      reward_model.load(workdir, settings, mesh, 0.0)


class ScoringTest(absltest.TestCase):

  def test_empty_and_long_responses_are_not_a_number(self):
    made = groups(2, rows=3)
    made[0][0]["response"], made[1][1]["response"] = "", "1" * 99
    settings = config("dpo", self.create_tempdir().full_path, made)
    source = builders.open_source(settings.data.builder, settings.data.builder_kw, "train",
                                  self.create_tempdir().full_path)
    mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(mesh):
      found = scoring.of(settings, settings.reference, "logprob", source, mesh,
                         self.create_tempdir().full_path)
      rows = {row["id"]: json.loads(row["group"]) for row in (found[i] for i in range(3))}
    self.assertEqual([[math.isfinite(m["logprob"]) for m in rows[f"r{i}"]] for i in range(3)],
                     [[False, True], [True, False], [True, True]])


if __name__ == "__main__":
  absltest.main()
