"""launch/weak_to_strong.sh: from nothing to the table, and on from wherever it was."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from unittest import mock

from absl.testing import absltest
import matplotlib
import ml_collections

from opd_jax.evals import weak_to_strong
from opd_jax.pipelines import responses

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ["bash", "launch/weak_to_strong.sh", "smoke"]
WHERE = dict(cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def read(folder, name):
  return [json.loads(line) for line in pathlib.Path(folder, name).read_text().splitlines()]


@absltest.skipUnless((ROOT / ".venv").exists(), "the launch scripts need .venv")
class LaunchTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.before = cls.launch_and_kill(cls.result("stages/weak_sft.json"))
    cls.notes = cls.launch()

  @classmethod
  def launch(cls):
    done = subprocess.run(LAUNCH + [cls.workdir], capture_output=True, text=True, **WHERE)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout

  @classmethod
  def launch_and_kill(cls, there):
    """Kills a launch, with all that it has started, once a file is there; the stages then done."""
    process = subprocess.Popen(LAUNCH + [cls.workdir], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True, **WHERE)
    end = time.monotonic() + 600
    while not there.exists() and not process.poll() and time.monotonic() < end:
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {path.stem for path in there.parent.glob("*.json")}

  @classmethod
  def result(cls, name):
    return pathlib.Path(cls.workdir, "results", name)

  def stage(self, name):
    return pathlib.Path(self.workdir, "stages", name)

  def test_0_it_was_killed_in_the_middle_and_has_gone_on(self):
    run = {line.split(":")[0].removeprefix("stages/") for line in self.notes.splitlines()
           if line.startswith("stages/")}
    made = {path.stem for path in self.result("stages").glob("*.json")}
    self.assertContainsSubset({"gold", "preferences", "weak_sft"}, self.before)
    self.assertContainsSubset({"weak", "samples"}, run)
    self.assertEmpty(run & self.before)
    self.assertEqual(run | self.before, made)

  def test_1_every_stage_reads_what_another_has_left(self):
    self.assertIn("28 of 28 cells", self.notes)
    groups = [json.loads(row["group"]) for row in read(self.stage("samples"), "rows.jsonl")]
    self.assertNotEmpty(groups)
    for member in (member for group in groups for member in group):
      self.assertLess(member["weak_logprob"], 0.0)
      self.assertLess(member["weak_reference_logprob"], 0.0)
    # The base was shown what the weak model had written of other records, and never gold's.
    demonstrations = {responses.question(row): row["response"]
                      for row in read(self.stage("demonstrations"), "rows.jsonl")}
    for name, other in (("samples", ""), ("refined", "labels")):
      config = json.loads(self.result(f"stages/{name}.json").read_text())["config"]
      config["shots"]["rows"] = str(self.stage("demonstrations") / "rows.jsonl")
      if other:
        config["refine"]["rows"] = str(self.stage(other) / "rows.jsonl")
      config = ml_collections.ConfigDict(config)
      rows = responses.read(config)
      asked = responses.requests(config, rows)
      weak = {row["id"]: row["response"] for row in read(self.stage(other), "rows.jsonl")} if (
          other) else {}
      for row, messages in zip(rows, asked, strict=True):
        record = responses.question(row)
        lines = [f"{there}{note}\n" for there, note in demonstrations.items() if there != record]
        end = (f"{record}{weak[row['id']]}\n" if other else "") + record
        self.assertEndsWith(messages[-1]["content"], end)
        shown = messages[-1]["content"].removesuffix(end)
        for _ in range(config.shots.number):  # a note of odd characters may have line breaks
          line = next((line for line in lines if shown.startswith(line)), "")
          self.assertNotEmpty(line, shown)
          shown = shown.removeprefix(line)
        self.assertEmpty(shown)
      metrics = read(self.stage(name), "metrics.jsonl")[-1]
      # A model that has hardly learned writes notes of odd characters, of more tokens than notes.
      self.assertLess(metrics["rows/too_long"], 0.1 * metrics["rows/asked"])
    for row in read(self.stage("pairs"), "rows.jsonl"):
      first, second = json.loads(row["group"])
      self.assertGreaterEqual(first["reward"], second["reward"])
      self.assertAlmostEqual(first["reward"], first["weak_logprob"]
                             - first["weak_reference_logprob"], places=4)
    table = pathlib.Path(self.workdir, "RESULTS.md").read_text()
    self.assertIn("PGR (points), 95%", table)
    self.assertIn("EVE > SFT on weak labels", table)

  def test_2_a_manifest_says_what_each_rests_on(self):
    found = json.loads(self.result("methods/eve-s0.json").read_text())
    self.assertEqual(found["identity"]["models"].keys(), {
        "stage:base", "stage:samples", "stage:weak", "stage:weak_sft", "stage:weak_answers"})
    samples = json.loads(self.result("stages/samples.json").read_text())
    self.assertEqual(found["identity"]["models"]["stage:samples"], samples["left"])
    self.assertEqual(samples["identity"]["models"].keys(), {
        "stage:base", "stage:demonstrations", "stage:weak", "stage:weak_sft"})
    self.assertEqual([step for step, _ in found["curve"]], [0, 1, 2])

  def test_2_the_weak_reward_has_learned_what_another_labels(self):
    gold = read(self.stage("preferences"), "rows.jsonl")
    config = json.loads(self.result("stages/proxy.json").read_text())["config"]
    self.assertEqual(config["data"]["builder_kw"]["rows"], 40)  # the others are labelled
    labels = read(self.stage("weak_labels"), "rows.jsonl")
    self.assertCountEqual([row["id"] for row in labels], [row["id"] for row in gold[40:]])
    for row in labels:
      first, second = json.loads(row["group"])
      self.assertGreaterEqual(first["reward"], second["reward"])
    found = json.loads(self.result("methods/rl-s0.json").read_text())
    self.assertEqual(found["identity"]["models"].keys(), {
        "stage:base", "stage:labels", "stage:weak_reward"})
    self.assertEqual((found["updates"], found["rows"]), (2, 64))

  def test_2_the_figures_are_made_of_the_cells(self):
    study = weak_to_strong.read(f"{self.workdir}/results")
    for name in (weak_to_strong.WEAK, weak_to_strong.KL, weak_to_strong.WINS, "eval/scored"):
      self.assertLen(study.methods["eve"][0]["curves"][name], 3)
    self.assertEqual(study.methods["eve"][0]["curves"][weak_to_strong.KL][0], 0.0)
    for picture in (weak_to_strong.implicit_reward, weak_to_strong.overfitting,
                    weak_to_strong.recovered, weak_to_strong.ratios, weak_to_strong.scaling,
                    weak_to_strong.over_optimization):
      self.assertNotEmpty(picture(study).axes)

  def test_2_the_notebook_draws_them(self):
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "notebooks/06_weak_to_strong.ipynb").read_text())["cells"]
    folders, scope = iter([self.workdir, self.create_tempdir().full_path]), {}
    with mock.patch.object(tempfile, "mkdtemp", lambda: next(folders)):  # nothing is run again
      for cell in cells:
        if cell["cell_type"] == "code":
          exec("".join(cell["source"]), scope)
    self.assertIn("eve", scope["study"].methods)
    weak = scope["mistakes"]["means"]["weak"]
    self.assertEqual(weak["reward"]["prompts"], scope["ASKED"])
    self.assertLess(weak["reward"]["mean"], 1.0)

  def test_3_what_is_gone_is_made_again_and_nothing_else(self):
    left = (self.stage("samples") / "rows.jsonl").read_bytes()
    (self.stage("samples") / "rows.jsonl").unlink()
    self.result("methods/eve-s1.json").unlink()
    notes = self.launch()
    self.assertEqual([line.split(":")[0] for line in notes.splitlines() if " s" in line
                      and line.startswith(("stages/", "methods/", "tune/"))],
                     ["stages/samples", "methods/eve-s1"])
    self.assertEqual((self.stage("samples") / "rows.jsonl").read_bytes(), left)


if __name__ == "__main__":
  absltest.main()
