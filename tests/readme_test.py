"""The README's table of configs is of those that there are, in all their forms."""

import pathlib
import re
import runpy

from absl.testing import absltest, parameterized

from opd_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]


def listed():
  """File -> the forms that its row says."""
  found, forms = {}, []
  for line in (ROOT / "README.md").read_text().splitlines():
    if not line.startswith("| `configs/"):
      continue
    files, _, said = (part.strip() for part in line.strip("|").split("|"))
    if said != "the same":
      forms = ["" if form == "(full)" else form.strip("`") for form in said.split(", ")]
    found |= dict.fromkeys(re.findall(r"`(configs/[\w/]+\.py)`", files), forms)
  return found


LISTED = listed()


class TableTest(parameterized.TestCase):

  def test_every_config_is_in_it_and_nothing_else(self):
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    self.assertEqual(set(LISTED), there)

  @parameterized.parameters(*LISTED.items())
  def test_a_config_has_the_forms_that_it_says(self, file, forms):
    get_config = runpy.run_path(str(ROOT / file))["get_config"]
    for form in forms:
      configs.validate(get_config(form))
    with self.assertRaisesRegex(ValueError, "no form 'grand'; it has ") as refused:
      get_config("grand")
    self.assertCountEqual(re.findall(r"'(\w*)'", str(refused.exception))[1:], forms)


if __name__ == "__main__":
  absltest.main()
