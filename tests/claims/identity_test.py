"""What a measurement rests on: a changed number counts, a changed comment does not."""

import pathlib
from unittest import mock

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax.claims import identity, ledger

FILES = {
    "pipelines/run.py": "from opd_jax.losses import kernel\nimport opd_jax.rollouts\n"
                        "from opd_jax import progress\n",
    "losses/kernel.py": 'def f(x):\n  """Doc."""\n  return 2 * x\n',
    "rollouts/__init__.py": "def g():\n  from opd_jax.rollouts import late\n",
    "rollouts/late.py": "A = 1\n",
    "losses/other.py": "B = 1\n",
    "progress.py": "C = 1\n",
}


# What ast.dump shows differently in one Python and another, and what is new in one.
FORMS = '''
def f(x, /, *rest, y=None, **others) -> str:
  """Doc."""
  return f"{x!r:>{y}} and {x}" "more" if x else None

class Empty:
  """Doc."""
'''


class CodeTest(parameterized.TestCase):

  def code(self, **changes):
    root = pathlib.Path(self.create_tempdir().full_path, "opd_jax")
    for name, text in (FILES | {k.replace("__", "/"): v for k, v in changes.items()}).items():
      path = root / name if name.endswith(".py") else root / f"{name}.py"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    with mock.patch.object(identity, "PACKAGE", root):
      return identity.code.__wrapped__("opd_jax.pipelines.run")

  @parameterized.parameters(
      dict(losses__kernel='def f(x):\n  """Another."""\n  return 2 * x  # why\n'),
      dict(losses__kernel='"""Module."""\n\ndef f(x):\n  return (2\n          * x)\n'),
      dict(losses__other="B = 2\n"),     # nothing here imports it
      dict(progress="C = 2\n"))          # no number comes from it
  def test_what_cannot_change_a_number_changes_nothing(self, **changes):
    self.assertEqual(self.code(**changes), self.code())

  @parameterized.parameters(
      dict(losses__kernel="def f(x):\n  return 3 * x\n"),
      dict(rollouts__late="A = 2\n"),    # imported by what is imported, within a function
      dict(pipelines__run="from opd_jax.losses import kernel\n"))
  def test_what_may_change_a_number_does(self, **changes):
    self.assertNotEqual(self.code(**changes), self.code())

  def test_it_is_the_same_of_every_python(self):
    with mock.patch.dict(FILES, {"pipelines/run.py": FORMS}):
      self.assertEqual(self.code(), "92cb065838e45ebc")  # of 3.11, 3.12 and 3.13

  def test_of_a_list_of_all_there_is_the_functions_count(self):
    def code(names, makes):
      with mock.patch.dict(FILES, {
          "pipelines/run.py": "from opd_jax import verifiers\n",
          "verifiers/__init__.py": f"from opd_jax.verifiers import {names}\nALL = ({names},)\n"
                                   f"def make(x):\n  return {makes}\n"}):
        return self.code()
    self.assertEqual(code("a, b", "x"), code("a", "x"))
    self.assertNotEqual(code("a", "-x"), code("a", "x"))

  def test_a_pipeline_rests_on_the_rooms_below_it_and_not_on_the_runner_of_claims(self):
    seen = identity._trees(["opd_jax.pipelines.opd"])
    self.assertContainsSubset({"opd_jax.losses.signals", "opd_jax.rollouts.slots",
                               "opd_jax.models.layers", "opd_jax.data.builders"}, seen)
    self.assertNoCommonElements({"opd_jax.pipelines.claims", "opd_jax.evals.context_use",
                                 "opd_jax.verifiers.exact_match",
                                 "opd_jax.pipelines.offline"}, seen)


class NamedTest(absltest.TestCase):

  def test_of_verifiers_and_data_builders_the_one_that_is_named_counts(self):
    asked = []
    with mock.patch.object(identity, "code", lambda *modules: asked.extend(modules) or "hash"):
      identity.of(configs.on_policy(verifier=dict(name="math_answer")), "opd_jax.pipelines.opd", {})
    self.assertContainsSubset({"opd_jax.verifiers.math_answer", "opd_jax.data.builders.arithmetic"},
                              asked)
    self.assertIsNotNone(identity._file("opd_jax.verifiers.math_answer"))


class ConfigTest(parameterized.TestCase):

  def test_keys_that_change_nothing_do_not_count(self):
    settings = lambda **changes: identity.settings(configs.on_policy(**changes))
    for free in (dict(writers=("jsonl",)), dict(checkpoint=dict(every=7)), dict(export=False),
                 dict(data=dict(cache="/x"))):
      self.assertEqual(settings(**free), settings())
    for counts in (dict(seed=1), dict(optimizer=dict(learning_rate=2e-5)),
                   dict(eval=dict(ks=(1,))), dict(data=dict(builder_kw=dict(digits=(1,))))):
      self.assertNotEqual(settings(**counts), settings())

  def test_models_are_known_by_their_contents(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "model.safetensors").write_bytes(b"1")
    config = configs.on_policy(student=dict(source=f"hf:{folder}"),
                               teachers=dict(a=dict(source="stage:expert")),
                               reference=dict(source="tiny:student"))
    before = identity.models(config, {"expert": "abc"})
    self.assertEqual(before.keys(), {f"hf:{folder}", "stage:expert", "tiny:student"})
    self.assertEqual(before["stage:expert"], "abc")
    (folder / "model.safetensors").write_bytes(b"2")
    after = identity.models(config, {"expert": "abc"})
    self.assertEqual({name for name in after if after[name] != before[name]}, {f"hf:{folder}"})

  def test_files_that_the_data_come_from_count(self):
    file = self.create_tempfile("rows.jsonl", "{}")
    config = configs.on_policy(data=dict(builder="jsonl", builder_kw=dict(train=file.full_path)))
    before = identity.models(config, {})
    file.write_text("{} ")
    self.assertNotEqual(identity.models(config, {})[file.full_path], before[file.full_path])

  def test_stages_are_found_wherever_they_are_named_and_filled_in(self):
    config = configs.on_policy(
        student=dict(source="stage:base"), reference=dict(source="stage:base"),
        teachers=dict(a=dict(source="stage:expert")),
        data=dict(builder="rows", builder_kw=dict(train="stage:samples")))
    self.assertCountEqual(identity.asks(config), ("base", "expert", "samples"))
    made = dict(base=configs.offline(), expert=configs.on_policy(), judge=configs.reward_model(),
                samples=configs.responses(reward=dict(source="stage:judge")))
    book = ledger.Ledger(made, pathlib.Path("/none"), pathlib.Path("/w"), {})
    found = book.resolved(config)
    self.assertEqual(found.student.source, "hf:/w/stages/base/export")
    self.assertEqual(found.teachers.a.source, "hf:/w/stages/expert/export")
    self.assertEqual(found.data.builder_kw.train, "/w/stages/samples/rows.jsonl")
    self.assertEqual(book.resolved(made["samples"]).reward.source, "/w/stages/judge")
    self.assertEqual(config.student.source, "stage:base")


if __name__ == "__main__":
  absltest.main()
