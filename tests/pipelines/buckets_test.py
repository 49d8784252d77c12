"""Buckets of lengths change what is computed on padding, and nothing that is learned."""

import json
import pathlib

from absl.testing import absltest
import numpy as np
from safetensors import numpy as safetensors

from opd_jax import config as configs
from opd_jax import main


class BucketsTest(absltest.TestCase):

  def run_with(self, **buckets):
    workdir = self.create_tempdir().full_path
    config = configs.on_policy(
        total_steps=3, log_every=1, writers=("jsonl",),
        data=dict(builder_kw=dict(train=64, test=8, mix=dict(plain=1.0))),
        rollout=dict(prompts=8, group_size=1, max_prompt=40, max_response=96, **buckets),
        loss=dict(surrogate="reverse_kl"), eval=dict(prompts=4, samples=1, ks=(1,), batch=4),
        checkpoint=dict(keep_best=0))
    configs.validate(config)
    main.pick(config.pipeline).run(config, workdir)
    lines = [json.loads(line) for line in
             pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return ([line for line in lines if "loss/total" in line],
            safetensors.load_file(f"{workdir}/export/model.safetensors"))

  def test_the_same_losses_rewards_and_weights_from_less_padding(self):
    whole, weights = self.run_with()
    cut, of_cut = self.run_with(prompt_buckets=(24,), response_buckets=(48, 64, 80))
    for one, other in zip(whole, cut, strict=True):
      for name in ("loss/total", "rollout/reward", "rollout/length", "teacher/reverse_kl"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
      self.assertGreater(other["rollout/useful"], one["rollout/useful"])
    for name in weights:
      np.testing.assert_allclose(weights[name], of_cut[name], atol=2e-5, err_msg=name)


if __name__ == "__main__":
  absltest.main()
