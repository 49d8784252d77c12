"""SFT on the student's own verified successes, a baseline of MOPD (METHODS 4).

    python -m opd_jax.main --config=configs/verified_sft.py --workdir=runs/verified_sft

Of the eight responses of a prompt those that the verifier passes are learned, the others are not.

Forms: full (the default), the tiny student on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, as a baseline of MOPD for Qwen3-8B: 32 prompts x 8 responses of 4096 tokens, 1e-5
after 10 updates of warm-up. It wants a pod, the model's folder, and problems.jsonl.
"""

from opd_jax import config as configs

LOSS = dict(signal="verified")


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.on_policy(
        total_steps=400,
        student=dict(source="hf:Qwen3-8B"),
        teacher=dict(source=""),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=32, group_size=8, max_prompt=2048, max_response=4096),
        loss=dict(**LOSS, micro_batches=8),
        optimizer=dict(learning_rate=1e-5, warmup_steps=10),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
    )
  full = form == ""
  return configs.on_policy(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      teacher=dict(source=""),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=16 if full else 4, group_size=8 if full else 4, max_prompt=40,
                   max_response=80),
      loss=LOSS,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
