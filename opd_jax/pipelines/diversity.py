"""How unlike the saved responses of runs are, side by side: evals/diversity.py on any runs.

    saved groups of each run -> metrics by prompt -> means, differences from the first, intervals
"""

from collections.abc import Sequence
import json
import pathlib

import ml_collections

from opd_jax import progress
from opd_jax.evals import diversity, paired, saved
from opd_jax.pipelines import evaluate
from opd_jax.verifiers import unit_tests


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Compares evaluations of `config.runs`; leaves tables and a picture.

  Without runs the student is evaluated, and stands alone.

  Raises: ValueError if a run has no such evaluation, or they are not of the same prompts.
  """
  if not config.runs and not saved.names(workdir):
    evaluate.run(config, workdir)
  groups = read(config.runs or (workdir,))
  results = diversity.study(groups, config.ks, config.seed,
                            unit_tests.extract if config.programs else None)
  told = ", ".join(f"{name} {count}" for name, count in results["responses"].items())
  progress.table(f"responses to {results['prompts']} prompts ({told}), [95% interval over prompts]",
                 *paired.table(results["means"]))
  if results["differences"]:
    progress.table(f"differences from {results['against']}",
                   *paired.table(results["differences"], sign=True))
  path = pathlib.Path(workdir, "diversity.json")
  path.write_text(json.dumps(results, indent=1, allow_nan=False))
  diversity.picture(results).savefig(path.with_suffix(".png"))
  progress.note(f"the numbers are in {path}; their picture is beside it")


def read(runs: Sequence[str]) -> dict[str, list[saved.Group]]:
  """The groups of "WORKDIR", its last evaluation, or "WORKDIR@NAME", each under its name here."""
  found = {}
  for run in runs:
    workdir, _, name = run.partition("@")
    found[run] = saved.read(workdir, name or saved.last(workdir))
  return found
