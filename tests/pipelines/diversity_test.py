"""Runs are compared on the same prompts, and a run's evaluations with each other."""

import json
import pathlib

from absl.testing import absltest
import numpy as np

from opd_jax import config as configs
from opd_jax.evals import diversity as metrics
from opd_jax.evals import saved
from opd_jax.pipelines import diversity, evaluate


def settings(prompts=4, **changes):
  return dict(student=dict(source="tiny:student"), writers=("jsonl",),
              data=dict(builder_kw=dict(train=1, test=8, mix=dict(plain=1.0))),
              rollout=dict(max_prompt=40, max_response=16),
              eval=dict(prompts=prompts, samples=4, ks=(1,), batch=4), **changes)


class DiversityTest(absltest.TestCase):

  def evaluated(self, **changes):
    workdir = self.create_tempdir().full_path
    config = configs.evaluate(**settings(**changes))
    pathlib.Path(workdir, "config.json").write_text(config.to_json())
    evaluate.run(config, workdir)
    return workdir

  def compare(self, **changes):
    workdir = self.create_tempdir().full_path
    config = configs.diversity(**settings(ks=(1, 4), **changes))
    configs.validate(config)
    diversity.run(config, workdir)
    return workdir, json.loads(pathlib.Path(workdir, "diversity.json").read_text())

  def test_two_runs_side_by_side(self):
    first, second = self.evaluated(), self.evaluated(seed=1)
    workdir, found = self.compare(runs=(first, f"{second}@eval"))
    self.assertEqual(found["against"], first)
    self.assertEqual(found["responses"], {first: 16, f"{second}@eval": 16})
    for run, place in ((first, first), (second, f"{second}@eval")):
      want = metrics.per_prompt(saved.read(run, "eval"), (1, 4))
      for name in ("self_bleu4", "unique", "pass@4"):
        self.assertAlmostEqual(found["means"][place][name]["mean"], np.nanmean(want[name]))
    self.assertIn("unique", found["differences"][f"{second}@eval"])
    self.assertTrue(pathlib.Path(workdir, "diversity.png").is_file())
    with self.assertRaisesRegex(ValueError, "has other prompts than"):
      self.compare(runs=(first, self.evaluated(prompts=3)))
    with self.assertRaisesRegex(ValueError, "no evaluation 'best'; there are: eval"):
      self.compare(runs=(f"{first}@best",))


if __name__ == "__main__":
  absltest.main()
