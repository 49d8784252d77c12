"""Cells run once, again when what they rest on has changed, and a failure stops no other."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from opd_jax import config as configs
from opd_jax import progress
from opd_jax.claims import crew, identity, ledger, measured
from opd_jax.pipelines import claims

ROOT = pathlib.Path(__file__).parents[2]

def load(name, form):
  spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/claims/{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(form)


def asking(source="tiny:student", **changes):
  """A method that only evaluates, in a second or two."""
  return configs.evaluate(**(dict(
      student=dict(source=source), writers=("jsonl",),
      data=dict(builder_kw=dict(train=1, test=8, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=8),
      eval=dict(prompts=4, samples=2, ks=(1,), batch=4)) | changes))


def small(methods, seeds=(0,), **changes):
  return configs.claims(
      name="small", title="Small", workers=1, methods=methods,
      seeds={name: seeds for name in methods}, tune=dict(metric="eval/mean@2"), **changes)


def run(config, workdir):
  """Runs the cells; returns the names of those that were run, and all that was said."""
  configs.validate(config)
  names, notes, give = [], [], crew.Worker.give

  def spy(worker, section, folder, rests_on):
    names.append(os.path.relpath(folder, workdir))
    give(worker, section, folder, rests_on)

  with mock.patch.object(crew.Worker, "give", spy), \
       mock.patch.object(progress, "note", notes.append):
    try:
      claims.run(config, workdir)
    except ChildProcessError as error:
      notes.append(str(error))
  return names, "\n".join(notes)


def running(process):
  try:
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def cells(workdir):
  folder = pathlib.Path(workdir, "results")
  return {str(path.relative_to(folder)).removesuffix(".json"): json.loads(path.read_text())
          for path in folder.glob("*/*.json")}


class ClaimsTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.config = load("g_opd", "smoke")
    cls.names, cls.notes = run(cls.config, cls.workdir)

  def test_1_stages_then_tuning_then_every_method_seed_by_seed(self):
    self.assertNotIn("failed", self.notes)
    stages = [name for name in self.names if name.startswith("stages/")]
    self.assertEqual(self.names[0], "stages/base")
    self.assertCountEqual(stages, [f"stages/{name}" for name in self.config.stages])
    tuned = [name for name in self.names if name.startswith("tune/")]
    self.assertCountEqual(tuned, ["tune/exopd-0.001-s1000", "tune/exopd-0.003-s1000"])
    methods = [name for name in self.names if name.startswith("methods/")]
    self.assertEqual([name[-1] for name in methods], list("0011"))
    found = cells(self.workdir)
    self.assertCountEqual(found, self.names)
    self.assertCountEqual(self.names, set(self.names))
    scores = {value: found[f"tune/exopd-{value:g}-s1000"]["metrics"]["eval/mean@2"]
              for value in (1e-3, 3e-3)}
    best = max(sorted(scores), key=scores.get)
    for name in ("methods/exopd-s0", "methods/exopd-s1"):
      self.assertEqual((found[name]["value"], found[name]["config"]["optimizer"]["learning_rate"]),
                       (best, best))
    self.assertEqual(found["methods/exopd-s1"]["config"]["seed"], 1)
    self.assertEqual(found["methods/exopd-s1"]["config"]["eval"]["seed"], 2)

  def test_2_a_cell_says_what_it_cost_and_what_it_rests_on(self):
    found = cells(self.workdir)
    cell, sft = found["methods/exopd-s0"], found["methods/sft-s0"]
    self.assertEqual((cell["updates"], cell["rows"], sft["updates"], sft["rows"]), (2, 4, 2, 4))
    lines = [json.loads(line) for line in pathlib.Path(
        self.workdir, "methods/exopd-s0/metrics.jsonl").read_text().splitlines()]
    lengths = [line["rollout/length"] for line in lines if "rollout/length" in line]
    self.assertEqual(cell["student_tokens"], round(4 * sum(lengths)))
    self.assertEqual((cell["teacher_tokens"], sft["student_tokens"]), (0, 0))
    self.assertGreater(sft["teacher_tokens"], 20)
    self.assertEqual(cell["identity"]["models"].keys(),
                     {"stage:base", *(f"stage:{name}" for name in ("expert_count",
                                                                   "expert_sort"))})
    self.assertEqual(cell["identity"]["models"]["stage:base"], found["stages/base"]["left"])
    self.assertEqual(cell["identity"]["jax"], jax.__version__)
    self.assertEqual(cell["identity"]["code"], found["methods/exopd-s1"]["identity"]["code"])
    self.assertNotEqual(cell["identity"]["code"], sft["identity"]["code"])
    self.assertContainsSubset({"eval/mean@2", "eval/length", "domain/count", "student/entropy",
                               "domain/sort", "gain/mean@2", "curve/area"}, cell["metrics"])
    self.assertEqual([step for step, _ in cell["curve"]], [0, 2])
    records = json.loads(pathlib.Path(
        self.workdir, "methods/exopd-s0/eval/step_000002.json").read_text())["records"]
    self.assertEqual(measured.by_domain(records).items() - cell["metrics"].items(), set())

  def test_3_the_tables_are_of_these_cells_and_in_the_workdir(self):
    text = pathlib.Path(self.workdir, "RESULTS.md").read_text()
    self.assertIn("configs/claims/g_opd.py:smoke", text)
    self.assertIn(f"From {len(self.names)} cells", text)
    for word in ("ExOPD > SFT, merging experts",
                 "### ExOPD's student beats every expert: domain by domain",
                 "### Tuning of `optimizer.learning_rate`", "| rank correlation |",
                 "teacher tokens"):
      self.assertIn(word, text)
    self.assertNotIn("Not finished", text)
    self.assertFalse((ROOT / "results/g_opd/methods").exists() and
                     any((ROOT / "results/g_opd").rglob("*.tmp")))

  def test_4_a_finished_sitting_runs_nothing_again(self):
    before = cells(self.workdir)
    names, notes = run(self.config, self.workdir)
    self.assertEqual(names, [])
    self.assertEqual(cells(self.workdir), before)
    self.assertIn(f"{len(before)} of {len(before)} cells", notes)

  def test_5_what_has_changed_runs_again_and_a_failure_stops_no_other(self):
    config = self.config.copy_and_resolve_references()
    config.methods.sft.eval.temperature = 0.9   # stale: its two cells
    config.methods.exopd.rollout.max_prompt = 1  # no prompt fits: its tuning fails at the start
    pathlib.Path(self.workdir, "stages/expert_count/export/model.safetensors").unlink()
    shutil.rmtree(pathlib.Path(self.workdir, "stages/base"))  # comes back from beside its JSON
    before = cells(self.workdir)
    names, notes = run(config, self.workdir)
    # The expert's weights are wanted, so it runs again; it comes out as it was, bit for bit.
    stale, tuned = ["methods/sft-s0", "methods/sft-s1"], "tune/exopd-0.001-s1000"
    self.assertCountEqual(
        names, ["stages/expert_count", tuned, "tune/exopd-0.003-s1000", *stale])
    self.assertRegex(notes, rf"2 cells failed: {tuned} \(ValueError: .*{tuned}/log.txt")
    self.assertIn("ValueError", pathlib.Path(self.workdir, tuned, "log.txt").read_text())
    after = cells(self.workdir)
    self.assertEqual(
        {name for name in after if after[name]["identity"] != before[name]["identity"]}, set(stale))
    # Those that are stale and could not run again are no part of the tables.
    text = pathlib.Path(self.workdir, "RESULTS.md").read_text()
    self.assertIn("**Not finished**: 4 cells are open", text)
    self.assertIn(f"From {len(after) - 4} cells", text)


class SittingTest(parameterized.TestCase):

  def test_a_process_that_dies_fails_its_cell_alone_and_sigterm_ends_a_sitting(self):
    workdir, give = self.create_tempdir().full_path, crew.Worker.give
    methods = dict(one=asking(), two=asking())

    def deadly(worker, section, folder, rests_on):
      give(worker, section, folder, rests_on)
      if folder.endswith("one-s0"):
        worker._process.kill()
      if folder.endswith("one-s1"):
        os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(crew.Worker, "give", deadly):
      names, notes = run(small(methods, (0, 1)), workdir)
    self.assertEqual(names, ["methods/one-s0", "methods/two-s0", "methods/one-s1"])
    self.assertIn("1 cells failed: methods/one-s0 (its process died (exit code -9)", notes)
    found = cells(workdir).keys() - {"methods/one-s1"}  # this may have been fast enough
    self.assertEqual(found, {"methods/two-s0"})
    self.assertRegex(notes, "open, for the same command to go on with: methods/one-s0, .*two-s1")
    self.assertIn("**Not finished**", pathlib.Path(workdir, "RESULTS.md").read_text())

  def test_tables_of_cells_that_no_longer_hold_are_kept_until_all_have_run_again(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    config = small(dict(one=asking()), (0, 1), results=f"{folder}/cells",
                   table=f"{folder}/TABLE.md")
    run(config, f"{folder}/first")
    whole = pathlib.Path(config.table).read_text()
    self.assertIn("From 2 cells", whole)
    config.methods.one.eval.temperature = 0.9
    config.minutes = 0.0
    _, notes = run(config, f"{folder}/second")
    self.assertIn("2 cells in", notes)
    self.assertIn("stays as it is", notes)
    self.assertEqual(pathlib.Path(config.table).read_text(), whole)
    self.assertIn("2 cells are open", (folder / "second/RESULTS.md").read_text())
    config.minutes, config.title = 60.0, "Measured anew"
    run(config, f"{folder}/second")
    text = pathlib.Path(config.table).read_text()
    self.assertIn("## Measured anew", text)
    self.assertIn("From 2 cells", text)

  def test_cells_hold_through_a_change_that_one_of_them_shows_to_be_harmless(self):
    workdir, config = self.create_tempdir().full_path, small(
        dict(one=asking(), two=asking(), three=asking(), four=asking()), (0, 1, 2))
    run(config, workdir)
    changes = {f"two-s{seed}": 0.01 for seed in range(3)} | {  # numbers that do change,
        "four-s0": 0.01,  # of one that chaos leads elsewhere,
        "one-s0": 1e-6}  # and as rounded elsewhere
    for name, change in changes.items():
      path = pathlib.Path(workdir, f"results/methods/{name}.json")
      cell = json.loads(path.read_text())
      cell["metrics"]["eval/length"] += change
      path.write_text(json.dumps(cell))
    before = cells(workdir)
    with mock.patch.object(identity, "code", lambda *modules: "other code"):
      config.workers = 2
      config.methods.three.eval.temperature = 0.9  # and here it is not the code alone
      names, _ = run(config, workdir)
      after = cells(workdir)
      self.assertContainsSubset(["methods/one-s0", "methods/four-s0", "methods/four-s1", *(
          f"methods/{name}-s{seed}" for name in ("two", "three") for seed in range(3))], names)
      self.assertNoCommonElements(["methods/one-s1", "methods/one-s2"], names)
      self.assertEqual(run(config, workdir)[0], [])
    for name, cell in after.items():
      self.assertEqual(cell["identity"]["code"], "other code")
      self.assertEqual("again" in cell, name not in names)
      if name in ("methods/one-s1", "methods/one-s2"):
        self.assertEqual(cell["metrics"], before[name]["metrics"])

  @parameterized.parameters("metrics", "curve", "student_tokens")
  def test_a_cell_that_repeats_a_part_of_its_numbers_shows_nothing(self, name):
    folder = pathlib.Path(self.create_tempdir().full_path)
    book = ledger.Ledger({}, folder, folder, dict(device="cpu", jax="0"))
    cell = ledger.Cell("methods/one-s0", "one", asking())
    numbers = dict(metrics={"eval/length": 8.0}, curve=[[0, 0.5]], student_tokens=7, left="",
                   wall_s=3.0)
    other = ledger.Cell("methods/one-s1", "one", asking(seed=1), seed=1)

    def run_again(code, **changes):
      with mock.patch.object(identity, "code", lambda *modules: code):
        book._identities.clear()
        stale = book.is_stale(other)
        self.assertEqual(bool(book.question(cell)), stale)
        book.add(cell, numbers | changes)
        return stale, book.current(other) is not None

    with mock.patch.object(identity, "code", lambda *modules: "first"):
      for each in (cell, other):
        book.add(each, numbers)
    self.assertEqual(run_again("second", wall_s=4.0, curve=[[0, 0.5 + 1e-6]]), (True, True))
    more = {"metrics": {"eval/length": 8.0, "eval/new": 1.0}}
    self.assertEqual(run_again("third", **more), (True, True))
    changed = {"metrics": {"eval/length": 8.01, "eval/new": 1.0}, "curve": [[0, 0.501]],
               "student_tokens": 8}
    self.assertEqual(run_again("fourth", **more | {name: changed[name]}), (True, False))

  def test_a_run_that_diverged_neither_shows_that_others_hold_nor_is_kept(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    book = ledger.Ledger({}, folder, folder, dict(device="cpu", jax="0"))
    cells = [ledger.Cell(f"methods/one-s{seed}", "one", asking(seed=seed), seed=seed)
             for seed in range(3)]
    good = dict(metrics={"eval/length": 8.0}, curves={"step": [1]}, left="")
    bad = dict(diverged="loss is nan", metrics={}, left="")
    for cell, result in zip(cells, (good, bad, bad)):
      book.add(cell, result)
    with mock.patch.object(identity, "code", lambda *modules: "other"):
      book._identities.clear()
      self.assertEqual(book.question(cells[1]), "")
      book.add(cells[1], bad)
      self.assertIsNone(book.current(cells[0]))
      book.add(cells[0], good)
      self.assertIsNone(book.current(cells[2]))
    with mock.patch.object(identity, "code", lambda *modules: "third"):
      book._identities.clear()
      book.add(cells[0], bad)  # what came to its end before
      self.assertEqual([value for since, value in book._harmless.items() if "third" in since],
                       [False])

  def test_a_model_that_is_kept_is_a_given_until_its_settings_change(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    book = lambda **settings: ledger.Ledger(
        dict(base=configs.offline(**settings), base_alone=asking("stage:base")),
        folder / "results", folder / "work", dict(device="cpu", jax="0"))
    first = book()
    model = folder / "work/stages/base/export/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    left = measured.left(configs.offline(), f"{folder}/work/stages/base")
    for name, left in (("base", left), ("base_alone", "")):
      first.add(first.stages[name], dict(metrics={"eval/length": 8.0}, left=left))
    with mock.patch.object(identity, "code", lambda *modules: "other"):
      second, third = book(), book(total_steps=7)
      self.assertTrue(second.has_left("base"))
      self.assertEqual(second.current(second.stages["base"])["identity"]["code"],
                       json.loads((folder / "results/stages/base.json").read_text())["identity"][
                           "code"])
      self.assertTrue(second.is_stale(second.stages["base_alone"]))  # what is measured of it is not
      self.assertTrue(third.is_stale(third.stages["base"]))

  def test_a_new_setting_is_harmless_only_for_cells_that_have_the_same_of_it(self):
    workdir = self.create_tempdir().full_path
    config = small(dict(one=asking()), (0, 1, 2))
    run(config, workdir)
    folder = pathlib.Path(workdir, "results/methods")
    for seed, name in ((0, "answers"), (1, "answers"), (2, "others")):  # as if of earlier code
      cell = json.loads((folder / f"one-s{seed}.json").read_text())
      cell["identity"]["config"] = "earlier"
      cell["config"].pop("mesh" if name == "others" else "student")
      (folder / f"one-s{seed}.json").write_text(json.dumps(cell))
    self.assertEqual(run(config, workdir)[0], ["methods/one-s0", "methods/one-s2"])

  def test_no_cell_begins_when_the_time_is_up(self):
    with mock.patch.object(crew, "Worker", autospec=True) as worker:
      worker.return_value.take.return_value = dict(device="cpu", jax="0", cpu="")
      _, notes = run(small(dict(one=asking()), minutes=0), self.create_tempdir().full_path)
    worker.return_value.give.assert_not_called()
    self.assertIn("0 of 1 cells", notes)

  def test_a_killed_sitting_leaves_whole_cells_and_no_process(self):
    workdir = self.create_tempdir().full_path
    code = ("import sys; sys.path[:0] = ['.', 'tests/pipelines']\n"
            "import claims_test as t\n"
            "if __name__ == '__main__':\n"
            f"  t.claims.run(t.small(dict(one=t.asking()), tuple(range(50))), {workdir!r})")
    script = self.create_tempfile("sitting.py", code).full_path
    process = subprocess.Popen([sys.executable, script], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(1200):
      if list(pathlib.Path(workdir).glob("results/methods/*.json")):
        break
      self.assertIsNone(process.poll(), "the sitting ended early")
      time.sleep(0.1)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    self.assertNotEmpty(children)
    process.kill()
    process.communicate()
    found = cells(workdir)  # each is read as JSON
    self.assertBetween(len(found), 1, 49)
    for _ in range(100):
      if not any(map(running, children)):
        break
      time.sleep(0.1)
    else:
      self.fail("a worker has outlived its sitting")

  def test_a_run_that_diverges_is_a_result(self):
    config = configs.on_policy(total_steps=4, log_every=1)
    lines = [{"step": i, "rollout/length": 10.0} for i in (1, 2)]
    with mock.patch.object(measured.writer, "read", return_value=lines):
      found = measured.diverged(config, "/none", "update 3: the loss is nan")
    self.assertEqual((found["updates"], found["student_tokens"], found["metrics"]), (2, 1280, {}))

  @parameterized.parameters(
      (dict(seeds=dict(one=())), "seeds.one is missing"),
      (dict(seeds=dict(one=(1000,))), r"seeds.one and tune.seeds share \[1000\]"),
      (dict(name="two words"), "name is 'two words'"),
      (dict(methods=dict(one=asking("stage:base"))), "methods.one names 'base'; there is nothing"),
      (dict(stages=dict(a=asking(), b=asking("stage:a"))), "stages.b names 'a'; there is nothing"),
      (dict(tune=dict(methods=("one",))), "methods.one is tuned, but has no key optimizer.learn"),
      (dict(tune=dict(follows=dict(two="one"))), "tune.follows names 'two'; there is one"),
      (dict(methods=dict(one=configs.on_policy())), "log_every=10; tokens are counted"),
      (dict(claims=dict(x=dict(a="one", b="two", effect=1))), "claims.x.b names 'two'; there is"),
      (dict(claims=dict(x=dict(a="one", b="one"))), "claims.x has neither an effect nor a margin"),
      (dict(claims=dict(x=dict(a="one", b="one", effect=1, over=("one", "two")))),
       "claims.x.over names 'two'"),
      (dict(claims=dict(x=dict(a="one", b="one", effect=1, over=("one",)))),
       r"claims.x.over is \('one',\); it must be two methods"),
      (dict(claims=dict(x=dict(a="one", b="one", effect=1, after="two", before="two"))),
       "claims.x.before names 'two'"),
      (dict(claims=dict(x=dict(a="one", b="one", effect=1, before="s")), stages=dict(s=asking())),
       "claims.x has one of `before` and `after`"),
      (dict(claims=dict(x=dict(a="one", b="one", effect=1, paired=False, kind="share"))),
       "claims.x is not paired"),
      (dict(claims=dict(x=dict(a="one", kind="experts", effect=-1, base="s")),
            stages=dict(s=asking())), "claims.x.effect is -1; a lead over experts"),
      (dict(claims=dict(x=dict(a="one", kind="experts", effect=1, base="s",
                               experts=dict(sort="s"), counting=dict(count="s"))),
            stages=dict(s=asking())), r"counting is of \['count'\], its experts of \['sort'\]"),
      (dict(sweeps=dict(x=dict(base="two"))), "sweeps.x.base names 'two'"),
      (dict(claims=dict(x=dict(a="one", kind="ratio"))), "claims.x.kind names 'ratio'"),
      (dict(sweeps=dict(x=dict(points=(2.0, 1.0), methods=("one", "one")))), "must be ascending"),
  )
  def test_a_config_that_names_what_there_is_not_is_refused_at_once(self, changes, message):
    config = configs.claims(**(dict(
        name="small", methods=dict(one=asking()), seeds=dict(one=(0,))) | changes))
    with mock.patch.object(crew, "Worker") as worker:
      with self.assertRaisesRegex(ValueError, message):
        claims.run(config, self.create_tempdir().full_path)
    worker.assert_not_called()

  @parameterized.product(name=("eve", "g_opd", "iw_opd", "mopd", "opcd"),
                         form=("", "quick", "smoke"))
  def test_the_configs_are_sound(self, name, form):
    config = load(name, form)
    configs.validate(config)
    claims.check(config)
    if not form:
      self.assertEqual((config.results, config.table), (f"results/{name}", "RESULTS.md"))
      self.assertLessEqual(sum(claim.primary for claim in config.claims.values()), 4)
      for claim in config.claims.values():
        if claim.primary:
          self.assertLen(config.seeds[claim.a], 10)
          for who in {claim.a, claim.b} & set(config.methods):
            if config.tune.key in dict(identity.leaves(config.methods[who])):
              self.assertIn(who, config.tune.methods)
      self.assertLen(config.tune.seeds, 2)
    else:
      self.assertEqual((config.results, config.table), ("", ""))
      self.assertLen(config.tune.seeds, 1)
    for claim in config.claims.values():  # SFT learns other rows, GRPO asks fewer prompts
      if claim.kind == "difference":
        sides = [config.methods[who] for who in (claim.a, claim.b) if who in config.methods]
        fewer = len({side.rollout.prompts for side in sides if side.pipeline == "opd"}) > 1
        self.assertEqual(claim.paired,
                         not fewer and not any(side.pipeline == "sft" for side in sides))
      self.assertNotIn(">=", claim.text)

  @parameterized.parameters("iw_opd", "mopd", "opcd")
  def test_the_smoke_form_runs_to_its_tables(self, name):  # those of g_opd and eve run elsewhere
    workdir, config = self.create_tempdir().full_path, load(name, "smoke")
    _, notes = run(config, workdir)
    self.assertNotIn("failed", notes)
    text = pathlib.Path(workdir, "RESULTS.md").read_text()
    self.assertNotIn("Not finished", text)
    for claim in config.claims.values():
      verdict = next(line for line in text.splitlines() if line.startswith(f"| {claim.text} |"))
      self.assertNotRegex(verdict, "open|provisional: [0-9]")
      self.assertRegex(verdict, r"\[.*, .*\]|no clear gain|below its start")

  def test_the_weak_to_strong_pipeline_alone_is_sound(self):
    config = load("eve", "once")
    configs.validate(config)
    claims.check(config)
    self.assertEqual((config.results, config.table), ("", ""))
    self.assertEqual(set(config.seeds.values()), {(0,)})
    self.assertEmpty(config.tune.methods)
    self.assertEqual(config.stages, load("eve", "").stages)

  def test_a_sweep_has_one_learning_rate(self):
    config = load("g_opd", "")
    sweep = config.sweeps.lam
    self.assertEqual(tuple(sweep.points), tuple(config.methods[x].loss.lam for x in sweep.methods))
    self.assertEqual({config.tune.follows.get(x, x) for x in sweep.methods}, {"exopd"})
    self.assertEqual(config.methods.lam_1, config.methods.opd)
    self.assertEqual(config.stages[sweep.base].student.source, "stage:base")

  def test_models_to_start_from_are_evaluated_with_more_samples(self):
    config = load("g_opd", "")
    cell = config.methods.exopd.eval
    for name, stage in config.stages.items():
      if name.endswith(("_on_all", "_expo")):
        self.assertEqual((stage.eval.samples, stage.eval.prompts), (32, cell.prompts))
        self.assertEqual(stage.eval.samples * stage.eval.batch, cell.samples * cell.batch)
    for claim in config.claims.values():
      if claim.a.startswith("s2w") and claim.b:  # who has no rival says only what it gained itself
        self.assertEqual((claim.before, claim.after),
                         ("teacher_before_on_all", "teacher_after_on_all"))


if __name__ == "__main__":
  absltest.main()
