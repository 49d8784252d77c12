"""Fits a weak critic by SFT, before configs/opcd.py (2606.00424, section 5).

    python -m opd_jax.main --config=configs/critic_sft.py --workdir=runs/critic
    python -m opd_jax.main --config=configs/opcd.py --config.critic.source=workdir:runs/critic ...

Forms: full (the default), tiny:weak on worked critiques of the arithmetic task, 2 CPU cores; quick
and smoke, the same in seconds; paper, Phi-4-mini on the half of the alignment data that the strong
model never sees (critic.jsonl), learning rate 1e-6 and the checkpoint of step 40; what its
evaluation counts says nothing of critiques.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.offline(
        total_steps=40,
        student=dict(source="hf:Phi-4-mini-instruct"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(
            builder="jsonl", builder_kw=dict(
                train="critic.jsonl", question="question", answer="answer", response="response"),
            eval_builder="instructions", eval_builder_kw=dict(test="ifeval.jsonl")),
        verifier=dict(name="instructions"),
        rollout=dict(max_prompt=4096, max_response=8192),
        batch=dict(tokens=128 * 8192, buckets=(2048, 4096, 8192, 12288)),
        loss=dict(micro_batches=32),
        optimizer=dict(learning_rate=1e-6, weight_decay=0.01),
    )
  full = form == ""
  return configs.offline(
      total_steps={"": 300, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:weak"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(critic=1.0), seed=13)),
      rollout=dict(max_prompt=200, max_response=96),
      batch=dict(tokens=6144 if full else 1200, buckets=(160, 256, 400),
                 chunk=2048 if full else 64),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=20, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4),
      log_every=20 if full else 1,
  )
