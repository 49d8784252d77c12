"""The tables say what the cells say: numbers, verdicts, what is open, and nobody else's section."""

import pathlib

from absl.testing import absltest

from opd_jax import config as configs
from opd_jax.claims import contrasts, markdown, results

MEAN = "eval/mean@8"
EXPERTS = dict(kind="experts", a="new", experts=dict(sort="sorter", count="counter"), base="base",
               effect=0.01)


def make(**changes):
  method = configs.on_policy(log_every=1)
  return configs.claims(**(dict(
      name="paper", title="A paper", command="python -m x",
      stages={name: method for name in ("base", "sorter", "counter")},
      methods=dict(old=method, new=method, half=method),
      seeds={name: (0, 1, 2) for name in ("old", "new", "half")},
      tune=dict(methods=("old", "new"), grid=(1e-4, 1e-3, 1e-2, 1e-1), follows=dict(half="new")),
      claims=dict(
          more=dict(text="new | old", paper="+9", a="new", b="old", metric=MEAN, effect=0.05,
                    primary=True),
          part=dict(text="half is all", kind="share", a="half", b="new", metric="gain/mean@8",
                    effect=1.0, margin=0.1),
          best=dict(text="beats every expert", **EXPERTS)),
      sweeps=dict(lam=dict(text="A sweep", parameter="lam", points=(0.5, 1.0, 2.0),
                           methods=("half", "old", "new"), metrics=(MEAN, "eval/length"))))
                           | changes))


def cell(name, mean, sort=0.5, count=0.5, **changes):
  return dict(
      cell=name, date="2026-11-21", commit="abc", wall_s=30.0, updates=100, rows=64,
      student_tokens=2000, teacher_tokens=0,
      machine=dict(cpu="a CPU", cores=2, workers=2, device="cpu", jax="0.10"),
      curve=[], config=dict(eval=dict(prompts=200, samples=8)),
      metrics={MEAN: mean, "gain/mean@8": mean - 0.2, "eval/length": 40.0, "domain/sort": sort,
               "domain/count": count}) | changes


def measured(**changes):
  found = dict(
      stages=dict(base=cell("base", 0.3, 0.3, 0.3), sorter=cell("sorter", 0.5, 0.6, 0.3),
                  counter=cell("counter", 0.5, 0.3, 0.7)),
      tuning=dict(old={1e-4: 0.3, 1e-3: 0.4, 1e-2: 0.1, 1e-1: 0.0},
                  new={1e-4: 0.2, 1e-3: 0.3, 1e-2: 0.5, 1e-1: 0.1}),
      values=dict(old=1e-3, new=1e-2, half=1e-2),
      methods=dict(
          old={seed: cell(f"old-{seed}", 0.4 + 0.01 * seed) for seed in range(3)},
          new={seed: cell(f"new-{seed}", 0.5 + 0.02 * seed, 0.7, 0.8 - 0.05 * seed)
               for seed in range(3)},
          half={seed: cell(f"half-{seed}", 0.3) for seed in range(3)})) | changes
  cells = [*found["stages"].values(),
           *(x for method in found["methods"].values() for x in method.values())]
  return contrasts.Measured(**found, cells=cells)


def row(text, start):
  """The cells of the first table row that begins so."""
  line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
  return [part.strip() for part in line.replace("\\|", "!").strip("|").split("|")]


class RenderTest(absltest.TestCase):

  def test_a_claim_has_its_interval_and_its_verdict(self):
    text = results.render(make(), measured(), [])
    # Differences 0.10, 0.11, 0.12: 0.11 -+ 4.303 * 0.01 / sqrt(3).
    self.assertEqual(row(text, "new"), [
        "new ! old", "+9", "`new` - `old`, eval/mean@8 (points)", "+5.0", "+11.0 [+8.5, +13.5]",
        "3, primary", "**reproduced**"])
    part = row(text, "half is all")  # 0.1 / 0.3, 0.1 / 0.32, 0.1 / 0.34: not near 1
    self.assertEqual(part[3:], ["1.000 -+ 0.100", "0.313 [0.265, 0.362]", "3", "**not seen**"])

  def test_a_contrast_without_common_rows_is_not_paired(self):
    config = make(claims=dict(more=dict(text="more", a="new", b="old", metric=MEAN, effect=0.05,
                                        paired=False)))
    # The same mean; t of 2.94 degrees of freedom, and sqrt(1 + 4) / 100 / sqrt(3).
    self.assertEqual(row(results.render(config, measured(), []), "more")[4:],
                     ["+11.0 [+6.8, +15.2], unpaired", "3", "**reproduced**"])

  def test_less_than_claimed_is_said(self):
    config = make(claims=dict(more=dict(text="more", a="new", b="old", metric=MEAN, effect=0.2)))
    self.assertEqual(row(results.render(config, measured(), []), "more")[-1],
                     "**reproduced, smaller than claimed**")

  def test_a_verdict_is_provisional_while_cells_are_open(self):
    methods = measured().methods
    del methods["new"][2]
    text = results.render(make(), measured(methods=methods), ["methods/new-s2"])
    self.assertEqual(row(text, "new")[-1], "reproduced (provisional: 2 of 3 seeds)")
    self.assertEqual(row(text, "beats every")[-1], "inconclusive (provisional: 2 of 3 seeds)")
    self.assertEqual(row(text, "direction")[3], "rises (provisional: 8 of 9 cells)")
    config = make(claims=dict(more=dict(text="more", a="new", b="old", metric=MEAN, effect=0.05,
                                        paired=False)))
    self.assertEqual(row(results.render(config, measured(methods=methods), []), "more")[-1],
                     "reproduced (provisional: 2 of 3 and 3 of 3 seeds)")

  def test_a_seed_that_diverged_counts_with_what_it_started_from(self):
    methods = measured().methods
    methods["new"][2] |= dict(diverged="update 3", metrics={})
    text = results.render(make(), measured(methods=methods), [])
    # What they start from is not measured here: no verdict, though two seeds would give one.
    self.assertEqual(row(text, "new")[4:],
                     ["+10.5 [+4.1, +16.9]", "2, 1 diverged, primary", "**1 diverged**"])
    # A gain of nothing is known of any start: shares 0.333, 0.313 and 0.1 / 0, which there is not.
    self.assertEqual(row(text, "half is all")[5:], ["2, 1 diverged", "**no clear gain of `new`**"])
    config = make()
    for method in config.methods.values():
      method.student.source = "stage:base"  # 0.3
    text = results.render(config, measured(methods=methods), [])
    self.assertEqual(row(text, "new")[4:],  # 0.10, 0.11, 0.3 - 0.42
                     ["+3.0 [-29.3, +35.3]", "3, 1 diverged, primary", "**inconclusive**"])
    self.assertIn("sort -3.3 [", row(text, "beats every")[4])  # 0.1, 0.1, 0.3 - 0.6
    self.assertEqual(row(text, "beats every")[5:], ["3, 1 diverged", "**inconclusive**"])
    self.assertEqual(row(text, "2")[2], "3, 1 diverged")

  def test_what_a_run_without_a_stage_started_from_is_the_first_of_a_curve(self):
    methods = measured().methods
    methods["new"][2] |= dict(diverged="update 3", metrics={})
    methods["old"][0]["curve"] = [(0, 0.4), (100, 0.5)]
    text = results.render(make(), measured(methods=methods), [])
    self.assertEqual(row(text, "new")[5], "3, 1 diverged, primary")  # 0.10, 0.11, 0.4 - 0.42
    self.assertStartsWith(row(text, "new")[4], "+6.3 [")

  def test_a_share_of_no_clear_gain_has_no_verdict(self):
    methods = measured().methods
    for seed, gain in enumerate((0.3, 0.1, -0.1)):
      methods["new"][seed]["metrics"]["gain/mean@8"] = gain
    text = results.render(make(), measured(methods=methods), [])
    self.assertEqual(row(text, "half is all")[-1], "**no clear gain of `new`**")

  def test_a_student_learns_nothing_of_a_teacher_that_has_not(self):
    claim = dict(text="more", a="new", b="old", metric=MEAN, effect=0.05, before="base",
                 after="sorter")
    config = make(claims=dict(more=claim), tune=dict(metric=MEAN))
    verdict = lambda found: row(results.render(config, found, []), "more")[-1]
    self.assertEqual(verdict(measured()), "**reproduced**")     # 0.3 to 0.5
    start, no_more = measured().stages, cell("sorter", 0.34)
    self.assertEqual(verdict(measured(stages=start | dict(sorter=no_more))),
                     "**no gain of the teacher**")
    more_samples = cell("sorter", 0.5)
    more_samples["metrics"]["eval/mean@32"] = more_samples["metrics"].pop(MEAN)
    self.assertEqual(verdict(measured(stages=start | dict(sorter=more_samples))), "**reproduced**")
    del start["sorter"]
    self.assertEqual(verdict(measured(stages=start)), "open")

  def test_what_is_recovered_of_a_gap(self):
    """PGR from 0.3 to 0.5: 0.4, 0.41, 0.42 are 50, 55 and 60 points, 0.5, 0.52, 0.54 100 to 120."""
    config = make(claims=dict(gap=dict(
        text="more", kind="recovered", a="new", b="old", metric=MEAN, effect=0.25,
        before="base", after="sorter")))
    stages = dict(base=cell("base", 0.3), sorter=cell("sorter", 0.5))
    for error, verdict in ((0.01, "**reproduced**"), (0.02, "**no gap**")):
      for stage in stages.values():  # the gap's half-interval: 1.96 sqrt(2) error, 4 times in 0.2?
        stage["metrics"]["eval/error"] = error
      text = results.render(config, measured(stages=stages), [])
      # Differences of PGR: 50, 55, 60 points: 55 -+ 4.303 * 5 / sqrt(3).
      self.assertEqual(row(text, "more")[2:], [
          "`new` - `old`, points of PGR, from `base` to `sorter`", "+25.0",
          "+55.0 [+42.6, +67.4]", "3", verdict])
    self.assertEqual(row(text, "`old`")[3], "55.0 [42.6, 67.4]")
    self.assertIn("floor) / (ceiling - floor)", text)
    self.assertNotIn("gain of the teacher", text)
    upside_down = dict(base=stages["sorter"], sorter=stages["base"])
    text = results.render(config, measured(stages=upside_down), [])
    self.assertEqual(row(text, "more")[4:], ["-", "0", "**no gap**"])
    self.assertEqual(row(text, "`old`")[3], "-")
    text = results.render(config, measured(stages={}), [])
    self.assertIn("open", row(text, "more")[6])

  def test_a_difference_may_be_claimed_to_be_greater_than_another(self):
    text = results.render(make(claims=dict(more=dict(
        text="it grows", a="new", b="old", over=("half", "old"), metric=MEAN, effect=0.05,
        paper=""))), measured(), [])
    # 0.20, 0.22, 0.24: 0.22 -+ 4.303 * 0.02 / sqrt(3).
    self.assertEqual(row(text, "it grows")[2:], [
        "(`new` - `old`) - (`half` - `old`), eval/mean@8 (points)", "+5.0", "+22.0 [+17.0, +27.0]",
        "3", "**reproduced**"])

  def test_every_expert_is_to_be_beaten_where_it_is_one(self):
    text = results.render(make(), measured(), [])
    # Leads: sort 0.10 thrice; count 0.10, 0.05, 0.00. An expert's error, of 100 prompts a domain
    # and 8 samples: sqrt(0.24 / 800) = 0.0173, sqrt(0.21 / 800) = 0.0162.
    self.assertEqual(row(text, "beats every")[4:], [
        "count +5.0 [-7.8, +17.8]; sort +10.0 [+6.6, +13.4]", "3", "**inconclusive**"])
    self.assertEqual(row(text, "sort")[:6],
                     ["sort", "30.0", "+30.0: yes", "+30.0", "`sorter`", "60.0 -+ 1.7"])
    self.assertEqual(row(text, "sort")[7], "+10.0 [+6.6, +13.4]")
    self.assertIn("one set of teachers or experts, and one set of held-out\nprompts", text)
    # Its training may have asked more of its domain's prompts than there are where all are asked.
    trained = lambda gain, **domains: dict(cell("x", 0.5), config=dict(
        student=dict(source="stage:base"), eval=dict(prompts=200, samples=8)),
                                           metrics={"gain/mean@8": gain} | domains)
    for gain, domains, lead in ((0.2, {"domain/count": 0.5}, "+20.0: yes"),
                                (0.1, {"domain/count": 0.5}, "+10.0: **no**"),
                                (0.1, {"domain/count": 0.5, "domain/sort": 0.5}, "+40.0: yes")):
      stages = measured().stages | dict(
          maker=trained(gain, **domains), base=cell("base", 0.3, 0.3, 0.3, config=dict(
              student=dict(source="stage:base"), eval=dict(prompts=200, samples=8))),
          counter=cell("counter", 0.5, 0.3, 0.7, config=dict(
              student=dict(source="stage:maker"), eval=dict(prompts=200, samples=8))))
      self.assertEqual(row(results.render(make(), measured(stages=stages), []), "count")[2:4],
                       [lead, "+40.0"])
    weak = measured(stages=measured().stages | dict(counter=cell("counter", 0.5, 0.3, 0.4)))
    text = results.render(make(), weak, [])
    self.assertEqual(row(text, "count")[2], "+10.0: **no**")
    self.assertEndsWith(row(text, "beats every")[2],
                        "there (points); without count, whose expert is none")
    self.assertEqual(row(text, "beats every")[4:],
                     ["sort +10.0 [+6.6, +13.4]", "3", "**reproduced**"])
    # What is made of an expert may be weak: the domain counts by the expert.
    made = make(claims=dict(best=dict(
        text="beats every", counting=EXPERTS["experts"], **EXPERTS | dict(
            experts=dict(sort="sorter", count="less")))))
    text = results.render(made, measured(
        stages=measured().stages | dict(less=cell("less", 0.5, 0.3, 0.35))), [])
    self.assertEqual(row(text, "count")[2:6], ["+40.0: yes", "+40.0", "`less`", "35.0 -+ 1.7"])
    self.assertIn("count +40.0 [", row(text, "beats every")[4])
    self.assertEndsWith(row(text, "beats every")[2], "what is made of the expert of each domain, "
                        "there (points)")
    none = measured(stages={name: cell(name, 0.3, 0.3, 0.3) for name in measured().stages})
    self.assertEqual(row(results.render(make(), none, []), "beats every")[4:],
                     ["-", "0", "**no expert**"])

  def test_the_sweep_has_a_row_a_value_and_says_where_it_breaks(self):
    text = results.render(make(), measured(), [])
    self.assertEqual(row(text, "0.5"), ["0.5", "`half`", "3", "30.0 [30.0, 30.0]",
                                        "40.0 [40.0, 40.0]"])
    self.assertEqual(row(text, "rank"), ["rank correlation", "", "3", "1.000 [1.000, 1.000]",
                                         "0.000 [0.000, 0.000]"])
    self.assertEqual(row(text, "direction")[3:], ["**rises**", "**unclear**"])
    self.assertIn("Steps: eval/mean@8 (points) between 0.5 and 1, by", text)
    self.assertNotIn("at the start", text)
    worse = measured(methods=measured().methods | dict(
        new={seed: cell(f"new-{seed}", 0.3 + 0.02 * seed) for seed in range(3)}))
    text = results.render(make(), worse, [])
    self.assertIn("between 1 and 2, by -9.0 [", text)
    self.assertEqual(row(text, "direction")[3], "**turns**")

  def test_points_of_a_sweep_are_of_the_same_seeds(self):
    methods = measured().methods
    methods["new"] |= {seed: cell(f"new-{seed}", 0.9) for seed in range(3, 10)}
    text = results.render(make(), measured(methods=methods), [])
    self.assertEqual(row(text, "2")[2:4], ["3", "52.0 [47.0, 57.0]"])

  def test_the_sweep_shows_what_it_starts_from(self):
    config = make()
    config.sweeps.lam.base = "base"
    config.sweeps.lam.metrics = (MEAN, "eval/length", "gain/mean@8")
    found = measured()
    found.stages["base"]["metrics"]["eval/mean@32"] = found.stages["base"]["metrics"].pop(MEAN)
    del found.stages["base"]["metrics"]["gain/mean@8"]
    self.assertEqual(row(results.render(config, found, []), "at the start"),
                     ["at the start", "`base`", "", "30.0", "40.0", "-"])

  def test_learning_rates_are_said_with_what_was_tried(self):
    text = results.render(make(), measured(), [])
    _, _, below = text.partition("### Tuning")
    self.assertEqual(row(below, "`old`"), ["`old`", "30.0", "40.0", "10.0", "0.0", "0.001"])
    self.assertEqual(row(below, "`half`")[5], "0.01, that of `new`")

  def test_who_was_tuned_to_the_edge_of_the_grid_has_no_last_word(self):
    for new, old, who in ((0.1, 1e-3, "`new`"), (1e-2, 1e-4, "`old`"),
                          (0.1, 0.1, "`new` and `old`")):
      text = results.render(make(), measured(values=dict(new=new, old=old, half=new)), [])
      self.assertEqual(row(text, "new")[-1],
                       f"reproduced (provisional: {who} tuned to the edge of the grid)")
      _, _, below = text.partition("### Tuning")
      for name, value in (("new", new), ("old", old)):
        self.assertEqual("**at the edge of the grid**" in row(below, f"`{name}`")[5],
                         value in (0.1, 1e-4))
    # What follows another's rate was not tuned.
    self.assertEqual(row(text, "half is all")[-1],
                     "not seen (provisional: `new` tuned to the edge of the grid)")

  def test_to_beat_what_ends_below_its_start_is_nothing(self):
    config = make()
    config.methods.old.student.source = "stage:base"
    for start, verdict in ((0.38, "**reproduced**"), (0.44, "**`old` ends below its start**")):
      stages = measured().stages | dict(base=cell("base", start, 0.3, 0.3))  # old: 0.40 to 0.42
      text = results.render(config, measured(stages=stages), [])
      self.assertEqual(row(text, "new")[4::2], ["+11.0 [+8.5, +13.5]", verdict])
    config.claims.more.may_fall = True  # `old` is claimed to do harm
    self.assertEqual(row(results.render(config, measured(stages=stages), []), "new")[6],
                     "**reproduced**")

  def test_a_metric_over_training(self):
    methods = measured().methods
    for seed, values in enumerate(([0.3, 0.5, 0.4], [0.3, 0.7, 0.4], [0.3, None, 0.4])):
      methods["new"][seed]["curves"] = {"step": [0, 5, 10], MEAN: values}
    for seed in range(2):  # of the steps between, so there is none at the first
      methods["new"][seed]["curves"]["critique/kept"] = [None, 0.5, 0.25]
    config = make(curves=dict(metrics=(MEAN, "critique/kept"), methods=("new", "old")))
    methods["new"].pop(2)
    _, below, kept = results.render(config, measured(methods=methods), []).split("over training")
    self.assertEqual(row(below, "method"), ["method", "seeds", "after 0", "after 5", "after 10",
                                            "peak"])
    self.assertEqual(row(below, "`new`")[:3], ["`new`", "2", "30.0 [30.0, 30.0]"])
    self.assertStartsWith(row(below, "`new`")[3], "60.0 [")
    self.assertEqual(row(below, "`new`")[5], "after 5")
    self.assertNotIn("`old`", below.partition("### ")[0])  # has none of it
    self.assertEqual(row(kept, "method")[2:], ["after 5", "after 10", "peak"])
    self.assertEqual(row(kept, "`new`"), ["`new`", "2", "50.0 [50.0, 50.0]", "25.0 [25.0, 25.0]",
                                          "after 5"])

  def test_every_way_to_use_a_critic_by_k(self):
    found = measured()
    found.methods["chains"] = {seed: cell("chains", 0.0, metrics={
        "eval/pass@1 S only": 0.25, "eval/pass@4 S only": 0.5,
        "eval/pass@1 S + W critic": 0.5, "eval/pass@4 S + W critic": 1.0}) for seed in range(2)}
    found.values["chains"] = None
    method = configs.on_policy(log_every=1)
    config = make(methods=dict(old=method, new=method, half=method, chains=configs.critique_refine(
        eval=dict(ks=(4, 1)))), seeds={name: (0, 1, 2) for name in ("old", "new", "half")}
                  | dict(chains=(0, 1)))
    _, _, below = results.render(config, found, []).partition("### `chains`")
    self.assertIn("| seeds | pass@1 | pass@4 |", below)
    self.assertEqual(row(below, "S only"), ["S only", "2", "25.0 [25.0, 25.0]",
                                            "50.0 [50.0, 50.0]"])
    self.assertEqual(row(below, "S + W critic")[2], "50.0 [50.0, 50.0]")

  def test_budgets_come_from_the_cells(self):
    methods = measured().methods
    methods["old"][1] |= dict(student_tokens=2600, wall_s=45.0)
    methods["half"][1] |= dict(diverged="update 3", metrics={})
    text = results.render(make(), measured(methods=methods), [])
    _, _, below = text.partition("### Methods and budgets")
    self.assertEqual(row(below, "`old`")[3:], ["100", "64", "2,200 (2,000 to 2,600)", "0",
                                               "35 (30 to 45)", "0, 1, 2"])
    self.assertEqual(row(below, "`half`")[-1], "0, 1, 2 (1 diverged)")
    self.assertIn("of its responses alone: by up to 10% in a claim here, by up to 10% in a sweep.",
                  text)
    self.assertIn("wall times are 6 minutes in all, 2 side by side: 3 minutes.", text)
    methods["new"][0]["metrics"]["loss/weight"] = 1.3
    _, _, below = results.render(make(), measured(methods=methods), []).partition("### Methods and")
    self.assertEqual([row(below, f"`{method}`")[3] for method in ("old", "new")],
                     ["1.000", "1.100"])

  def test_what_is_open_is_named_and_an_empty_table_is_one(self):
    nothing = contrasts.Measured({}, {"old": {}, "new": {}}, dict.fromkeys(("old", "new", "half")),
                               {}, [])
    text = results.render(make(), nothing, ["methods/old-s0"])
    self.assertIn("**Not finished**: 1 cells are open", text)
    self.assertEqual(row(text, "new")[4:], ["-", "0, primary", "open (0 of 3 seeds)"])

  def test_a_metric_that_was_not_measured_is_named(self):
    config = make(claims=dict(more=dict(a="new", b="old", metric="eval/mean@4", effect=0.1)))
    with self.assertRaisesRegex(ValueError, "new-0 has no metric 'eval/mean@4'.*'eval/mean@8'"):
      results.render(config, measured(), [])


class SectionTest(absltest.TestCase):

  def test_a_section_is_written_again_and_the_others_stay(self):
    path = pathlib.Path(self.create_tempdir().full_path, "RESULTS.md")
    markdown.write_section(path, "one", "first")
    markdown.write_section(path, "two", "second")
    path.write_text(path.read_text() + "\nA line by hand.\n")
    before = path.read_text()
    markdown.write_section(path, "one", "third\n")
    self.assertEqual(path.read_text(), before.replace("first", "third"))
    markdown.write_section(path, "one", "first")
    self.assertEqual(path.read_text(), before)
    self.assertStartsWith(before, "# Results\n")

  def test_numbers(self):
    self.assertEqual(markdown.points(0.1234, sign=True), "+12.3")
    self.assertEqual(markdown.plain(-0.5), "-0.500")
    self.assertEqual(markdown.plain(1234.56), "1234.6")
    self.assertEqual(markdown.span([1000, 1000]), "1,000")
    self.assertEqual(markdown.span([]), "-")


if __name__ == "__main__":
  absltest.main()
