"""Every notebook runs from top to bottom."""

import json
import pathlib

from absl.testing import absltest, parameterized
import matplotlib

# Those that another test runs, behind the run that they are about.
ELSEWHERE = ("06_weak_to_strong.ipynb",)  # pipelines/weak_to_strong_test.py
NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"


class NotebooksTest(parameterized.TestCase):

  @parameterized.parameters([(p.name,) for p in sorted(NOTEBOOKS.glob("*.ipynb"))
                             if p.name not in ELSEWHERE])
  def test_notebook_runs(self, name):
    matplotlib.use("Agg")
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    scope = {}
    for cell in cells:
      if cell["cell_type"] == "code":
        exec("".join(cell["source"]), scope)


if __name__ == "__main__":
  absltest.main()
