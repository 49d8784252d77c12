"""Every config's smoke form runs, and leaves what the README promises."""

import importlib.util
import json
import os
import pathlib

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax import main

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NEEDS_DATA = ("gsm8k_smollm2",)


def load(name, form):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(form)


class SmokeTest(parameterized.TestCase):

  @parameterized.parameters(*sorted(p.stem for p in CONFIGS.glob("*.py")))
  def test_smoke_form_runs(self, name):
    if name in NEEDS_DATA and "OPD_JAX_DATA" not in os.environ:
      self.skipTest("OPD_JAX_DATA is not set")
    config = load(name, "smoke")
    configs.validate(config)
    workdir = self.create_tempdir().full_path
    main.pick(config.pipeline).run(config, workdir)
    left = set(os.listdir(workdir))
    if config.pipeline in ("context_use", "position_bias"):
      self.assertContainsSubset({f"{config.pipeline}.json"}, left)
      return
    self.assertContainsSubset({"metrics.jsonl", "eval", "samples", "tensorboard"}, left)
    if config.pipeline != "evaluate":
      self.assertContainsSubset({"report.png", "checkpoints", "export", "model"}, left)
      self.assertContainsSubset({"config.json", "model.safetensors", "tokenizer.json"},
                                set(os.listdir(f"{workdir}/export")))
      lines = [json.loads(x) for x in pathlib.Path(workdir, "metrics.jsonl").read_text().split("\n")
               if x]
      self.assertEqual(lines[-1]["step"], config.total_steps)

  def test_eval_of_gsm8k_takes_any_jsonl_file_and_model(self):
    rows = [json.dumps(dict(id=str(i), question=f"{i} + 1 = ?", solution="Add.", answer=str(i + 1)))
            for i in range(8)]
    file = self.create_tempfile("rows.jsonl", "\n".join(rows)).full_path
    config = load("eval", "gsm8k")
    config.data.builder_kw.update(train=file, test=file)
    config.update(dict(student=dict(source="tiny:student"), teacher=dict(source="tiny:teacher"),
                       rollout=dict(max_response=8), eval=dict(prompts=4, batch=4)))
    configs.validate(config)
    workdir = self.create_tempdir().full_path
    main.pick(config.pipeline).run(config, workdir)
    found = json.loads(pathlib.Path(workdir, "eval/eval.json").read_text())["metrics"]
    self.assertContainsSubset({"mean@1", "reverse_kl"}, found)


if __name__ == "__main__":
  absltest.main()
