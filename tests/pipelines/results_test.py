"""The tables say what the cells say: numbers, verdicts, what is open, and nobody else's section."""

import pathlib

from absl.testing import absltest

from opd_jax import config as configs
from opd_jax.pipelines import markdown, results

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
      tune=dict(methods=("old", "new"), grid=(1e-4, 1e-3, 1e-2), follows=dict(half="new")),
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
      metrics={MEAN: mean, "gain/mean@8": mean - 0.2, "eval/length": 40.0, "domain/sort": sort,
               "domain/count": count}) | changes


def measured(**changes):
  found = dict(
      stages=dict(base=cell("base", 0.3, 0.3, 0.3), sorter=cell("sorter", 0.5, 0.6, 0.3),
                  counter=cell("counter", 0.5, 0.3, 0.7)),
      tuning=dict(old={1e-4: 0.3, 1e-3: 0.4, 1e-2: 0.1}, new={1e-4: 0.2, 1e-3: 0.3, 1e-2: 0.5}),
      values=dict(old=1e-3, new=1e-2, half=1e-2),
      methods=dict(
          old={seed: cell(f"old-{seed}", 0.4 + 0.01 * seed) for seed in range(3)},
          new={seed: cell(f"new-{seed}", 0.5 + 0.02 * seed, 0.7, 0.8 - 0.05 * seed)
               for seed in range(3)},
          half={seed: cell(f"half-{seed}", 0.3) for seed in range(2)})) | changes
  cells = [*found["stages"].values(),
           *(x for method in found["methods"].values() for x in method.values())]
  return results.Measured(**found, cells=cells)


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
    part = row(text, "half is all")  # 0.1 / 0.3, 0.1 / 0.32: not near 1
    self.assertEqual(part[3:], ["1.000 -+ 0.100", "0.323 [0.191, 0.455]", "2", "**not seen**"])

  def test_every_expert_is_to_be_beaten_where_it_is_one(self):
    text = results.render(make(), measured(), [])
    # Leads: sort 0.10; count 0.10, 0.05, 0.00. The smallest: 0.10, 0.05, 0.00.
    self.assertEqual(row(text, "beats every")[4:], ["+5.0 [-7.4, +17.4]", "3", "**inconclusive**"])
    self.assertEqual(row(text, "sort")[:4], ["sort", "30.0", "60.0", "+30.0: yes"])
    weak = measured(stages=measured().stages | dict(counter=cell("counter", 0.5, 0.3, 0.4)))
    text = results.render(make(), weak, [])
    self.assertEqual(row(text, "count")[3], "+10.0: **no**")
    self.assertEndsWith(row(text, "beats every")[2],
                        "smallest of sort; without count, whose expert is none")
    self.assertEqual(row(text, "beats every")[4:], ["+10.0 [+10.0, +10.0]", "3", "**reproduced**"])
    none = measured(stages={name: cell(name, 0.3, 0.3, 0.3) for name in measured().stages})
    self.assertEqual(row(results.render(make(), none, []), "beats every")[4:],
                     ["-", "0", "**no expert**"])

  def test_the_sweep_has_a_row_a_value_and_says_where_it_breaks(self):
    text = results.render(make(), measured(), [])
    self.assertEqual(row(text, "0.5"), ["0.5", "`half`", "2", "30.0 [30.0, 30.0]",
                                        "40.0 [40.0, 40.0]"])
    self.assertEqual(row(text, "rank"), ["rank correlation", "", "2", "1.000 [1.000, 1.000]",
                                         "0.000 [0.000, 0.000]"])
    self.assertEqual(row(text, "monotone?")[3:], ["**reproduced**", "**inconclusive**"])
    self.assertIn("Breaks: none.", text)
    worse = measured(methods=measured().methods | dict(
        new={seed: cell(f"new-{seed}", 0.3 + 0.02 * seed) for seed in range(3)}))
    self.assertIn("eval/mean@8 (points) turns between 1 and 2, by -9.0 [-11.5, -6.5]",
                  results.render(make(), worse, []))

  def test_learning_rates_are_said_with_what_was_tried(self):
    text = results.render(make(), measured(), [])
    _, _, below = text.partition("### Tuning")
    self.assertEqual(row(below, "`old`"), ["`old`", "30.0", "40.0", "10.0", "0.001"])
    self.assertIn("0.01, **at the edge of the grid**", row(below, "`new`")[4])
    self.assertEqual(row(below, "`half`")[4], "0.01, that of `new`")

  def test_budgets_come_from_the_cells(self):
    methods = measured().methods
    methods["old"][1] |= dict(student_tokens=2600, wall_s=45.0)
    methods["half"][1] |= dict(diverged="update 3", metrics={})
    text = results.render(make(), measured(methods=methods), [])
    _, _, below = text.partition("### Methods and budgets")
    self.assertEqual(row(below, "`old`")[3:], ["100", "64", "2,200 (2,000 to 2,600)", "0",
                                               "35 (30 to 45)", "0, 1, 2"])
    self.assertEqual(row(below, "`half`")[-1], "0, 1 (1 diverged)")
    self.assertIn("differ by the length of its responses alone: by up to 10% here.", text)
    self.assertIn("wall times are 6 minutes in all, 2 side by side: 3 minutes.", text)
    methods["new"][0]["metrics"]["loss/weight"] = 1.3
    _, _, below = results.render(make(), measured(methods=methods), []).partition("### Methods and")
    self.assertEqual([row(below, f"`{method}`")[3] for method in ("old", "new")],
                     ["1.000", "1.100"])

  def test_what_is_open_is_named_and_an_empty_table_is_one(self):
    nothing = results.Measured({}, {"old": {}, "new": {}}, dict.fromkeys(("old", "new", "half")),
                               {}, [])
    text = results.render(make(), nothing, ["methods/old-s0"])
    self.assertIn("**Not finished**: 1 cells are open", text)
    self.assertEqual(row(text, "new")[4:], ["-", "0, primary", "**open**"])

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
