"""Every config's smoke form runs, and leaves what the README promises."""

import importlib.util
import json
import os
import pathlib

from absl.testing import absltest, parameterized

from opd_jax import config as configs
from opd_jax import main
from opd_jax.data import loader
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders import domains
from opd_jax.models.source import TINY

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NEEDS_DATA = ("gsm8k_smollm2", "mopd_smollm2", "opcd_smollm2")
INSTALLED = all(map(importlib.util.find_spec, ("if_verifiable", "llama_index")))


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
    if config.get("verifier", {}).get("name") == "instructions" and not INSTALLED:
      self.skipTest("EXTRAS=ifeval bash launch/env.sh brings the checks")
    configs.validate(config)
    workdir = self.create_tempdir().full_path
    main.remember(config, workdir)
    main.pick(config.pipeline).run(config, workdir)
    left = set(os.listdir(workdir))
    if config.pipeline == "responses":
      self.assertContainsSubset({"rows.jsonl", "metrics.jsonl"}, left)
      self.assertEqual("responses.jsonl" in left, bool(config.student.source))
      return
    if config.pipeline in ("context_use", "position_bias", "teacher_signal", "critique_refine",
                           "diversity", "judged"):
      self.assertContainsSubset({f"{config.pipeline}.json"}, left)
      return
    self.assertContainsSubset({"metrics.jsonl", "eval", "tensorboard"}, left)
    if config.pipeline == "reward_model":  # which writes nothing, and is no folder for transformers
      self.assertContainsSubset({"report.png", "checkpoints", "model"}, left)
      return
    self.assertContainsSubset({"samples"}, left)
    if config.pipeline != "evaluate":
      self.assertContainsSubset({"report.png", "checkpoints", "export", "model"}, left)
      self.assertContainsSubset({"config.json", "model.safetensors", "tokenizer.json"},
                                set(os.listdir(f"{workdir}/export")))
      lines = [json.loads(x) for x in pathlib.Path(workdir, "metrics.jsonl").read_text().split("\n")
               if x]
      self.assertEqual(lines[-1]["step"], config.total_steps)

  def test_no_question_of_the_domains_is_too_long_for_who_asks_them(self):
    tokenizer = tokenizers.load(TINY / "weak")
    encode = loader.encode_answered(tokenizer)
    rows = [encode(row) for row in domains.splits(train=3000, test=10)["train"]()]
    prompt = max(len(row["prompt_ids"]) for row in rows)
    self.assertEqual(prompt, 41)  # to count in ten digits
    whole = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    claims = load("claims/g_opd", "")
    asking = [load("domains", "base"), load("domains", "count"), load("exopd_multi_teacher", ""),
              *claims.stages.values(), *claims.methods.values()]
    for config in asking:
      self.assertEqual(config.data.builder, "domains")
      self.assertGreaterEqual(config.rollout.max_prompt, prompt)
      if config.pipeline == "sft":
        self.assertGreaterEqual(max(config.batch.buckets), whole)
    for name in ("sft", "s2w_sft"):  # whatever a teacher says
      config = claims.methods[name]
      self.assertGreaterEqual(max(config.batch.buckets),
                              config.rollout.max_prompt + config.rollout.max_response)
      self.assertEqual(config.batch.tokens, config.rollout.prompts * max(config.batch.buckets))

  @parameterized.parameters(("gsm8k", dict(solution="Add.")), ("svamp", dict(equation="1 + 1")))
  def test_eval_of_word_problems_takes_any_jsonl_file_and_model(self, form, more):
    rows = [json.dumps(dict(id=str(i), question=f"{i} + 1 = ?", answer=str(i + 1), **more))
            for i in range(8)]
    file = self.create_tempfile("rows.jsonl", "\n".join(rows)).full_path
    config = load("eval", form)
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
