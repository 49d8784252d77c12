"""EVE's figures show what the cells say."""

import json
import math
import pathlib

from absl.testing import absltest
import numpy as np

from opd_jax.evals import weak_to_strong

MEAN = "eval/mean@2"


def cell(name, kind="methods", seed=0, reward=0.5, ratio=1.0, curves=None, rows=64, objective="eve",
         fields=("a", "b"), responses=4):
  return dict(
      cell=f"{kind}/{name}" + f"-s{seed}" * (kind == "methods"), who=name, seed=seed,
      metrics={MEAN: reward}, curves=curves or {}, config=dict(
          eval=dict(samples=2), total_steps=200, data=dict(builder_kw=dict(
              train="x", rows=rows, responses=responses)),
          loss=dict(objective=objective, dpo=dict(beta=0.05), eve=dict(ratio=ratio,
                                                                       fields=list(fields)))))


class FiguresTest(absltest.TestCase):

  def study(self, *cells):
    folder = self.create_tempdir().full_path
    for one in (cell("weak", "stages", reward=0.2), cell("ceiling", "stages", reward=0.8), *cells):
      path = pathlib.Path(folder, f"{one['cell']}.json")
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps(one))
    return weak_to_strong.read(folder)

  def test_pgr_is_the_share_of_the_gap(self):
    study = self.study(*(cell("eve", seed=i, reward=x) for i, x in enumerate((0.1, 0.2, 0.5, 0.9))))
    np.testing.assert_allclose(weak_to_strong.ends(study, "eve"), [-100 / 6, 0.0, 50.0, 700 / 6],
                               atol=1e-9)

  def test_without_a_gap_it_is_undefined(self):
    study = self.study(cell("eve"), cell("ceiling", "stages", reward=0.2))
    self.assertTrue(np.isnan(weak_to_strong.ends(study, "eve")).all())

  def test_rewards_and_divergences_are_differences_of_the_means(self):
    curves = {"step": [0, 20, 200], MEAN: [0.2, 0.8, 0.5], weak_to_strong.WEAK: [-9.0, -5.0, None],
              weak_to_strong.REFERENCE: [-8.0, -7.0, None],
              weak_to_strong.STUDENT: [-3.0, -4.0, None]}
    figure = weak_to_strong.implicit_reward(self.study(cell("sft", curves=curves)))
    drawn = [axis.lines[-1].get_xydata() for axis in figure.axes]
    np.testing.assert_array_equal(drawn[0][:, 0], [0.0, 10.0, 100.0])
    np.testing.assert_array_equal(drawn[0][:, 1], [-1.0, 2.0, math.nan])
    np.testing.assert_array_equal(drawn[1][:, 1], [5.0, 3.0, math.nan])
    np.testing.assert_allclose(drawn[2][:, 1], [0.0, 100.0, 50.0])

  def test_points_of_the_sweeps_are_those_that_differ_in_nothing_else(self):
    study = self.study(cell("eve"), cell("ratio_2", ratio=2.0), cell("strong_sft", ratio=0.0),
                       cell("bayes", fields=("a", "")), cell("eve_x2", rows=128),
                       cell("eve_k1", responses=1),
                       cell("sft", ratio=0.0, fields=("c", "d")), cell("rl", objective="none"))
    self.assertEqual([x.get_text() for x in weak_to_strong.ratios(study).axes[0].get_xticklabels()],
                     ["0", "1", "2"])
    prompts, samples = weak_to_strong.scaling(study).axes
    self.assertEqual([x.get_text() for x in prompts.get_legend().get_texts()], ["eve", "sft"])
    self.assertEqual([x.get_text() for x in samples.get_legend().get_texts()], ["eve"])
    self.assertEqual([x.get_text() for x in samples.get_xticklabels()], ["1", "4"])
    bars = weak_to_strong.recovered(study).axes[0]
    self.assertEqual([x.get_text() for x in bars.get_xticklabels()],
                     ["bayes", "eve", "rl", "sft", "strong_sft"])

  def test_win_rates_stand_over_the_kl(self):
    curves = {"step": [0, 200], weak_to_strong.KL: [0.0, 3.0], weak_to_strong.WINS: [0.4, 0.6]}
    study = self.study(cell("dpo", objective="dpo", curves=curves), cell("eve", curves=curves),
                       cell("rl", objective="none", curves={"step": [0]}))
    axis = weak_to_strong.over_optimization(study).axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), [[0.0, 40.0], [3.0, 60.0]])
    self.assertEqual([x.get_text() for x in axis.get_legend().get_texts()],
                     ["dpo (beta 0.05)", "eve (beta / lambda 1)"])

  def test_benchmarks_of_both_kinds_stand_side_by_side(self):
    checked, judged, silent = (pathlib.Path(self.create_tempdir().full_path) for _ in range(3))
    (checked / "eval").mkdir()
    (checked / "eval" / "eval.json").write_text(json.dumps(
        {"records": [{"rewards": [1.0, 0.0]}] * 30 + [{"rewards": [0.0, 0.0]}] * 10}))
    for folder, mean in ((judged, {"mean": 0.6, "low": 0.5, "high": 0.75}),
                         (silent, {"mean": None, "low": None, "high": None})):
      (folder / "judged.json").write_text(json.dumps({"means": {
          "win rate": {"mean": 0.1}, "length-controlled win rate": mean}}))
    share = weak_to_strong.following(checked)
    self.assertEqual(share["mean"], 0.375)
    # The bootstrap's interval is near that of a normal mean of 40 prompts.
    half = 1.96 * np.std([0.5] * 30 + [0.0] * 10) / math.sqrt(40)
    np.testing.assert_allclose([share["low"], share["high"]], [0.375 - half, 0.375 + half],
                               atol=0.015)
    found = {name: weak_to_strong.following(folder) for name, folder in (
        ("judged", judged), ("silent", silent))}
    axes = weak_to_strong.instructions({"ifeval": {"eve": share}, "alpaca": found,
                                        "none": {"eve": found["silent"]}}).axes
    self.assertEqual([[bar.get_height() for bar in axis.patches] for axis in axes],
                     [[37.5], [60.0], []])
    self.assertEqual([x.get_text() for x in axes[1].get_xticklabels()], ["judged", "silent"])
    np.testing.assert_array_equal(axes[1].collections[0].get_segments()[0], [[0, 50], [0, 75]])
    self.assertEqual(axes[2].texts[0].get_text(), "not measured")

  def test_what_has_not_been_measured_says_so(self):
    study = self.study(cell("eve"))
    for figure in (weak_to_strong.implicit_reward(study, ("sft",)),
                   weak_to_strong.overfitting(study, ("sft",))):
      for axis in figure.axes:
        self.assertEqual(axis.texts[0].get_text(), "not measured")
    with self.assertRaisesRegex(ValueError, "run configs/claims/eve.py to its end"):
      weak_to_strong.read(self.create_tempdir().full_path)


if __name__ == "__main__":
  absltest.main()
