"""SFT on a teacher's samples: the off-policy baseline of on-policy distillation.

    python -m opd_jax.main --config=configs/sft.py --workdir=runs/sft

The teacher answers every prompt of the data once, before the first update; the student learns
these responses as text (so the teacher's tokenizer may be another), right or wrong. They stay in
WORKDIR/teacher_answers.jsonl.

Forms: full (the default), the tiny models on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, the SFT baseline of "Learning beyond Teacher" (METHODS 2): Qwen3-4B on responses
of up to 16384 tokens of an expert of its own size, in batches of 1.2 million tokens. The paper's
own learning rate of SFT is not in METHODS; 1e-5 is that of its other runs.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.offline(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source="hf:Qwen3-4B-expert"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        batch=dict(tokens=1_179_648, buckets=(4608, 9216, 18432)),
        loss=dict(micro_batches=2),
        optimizer=dict(learning_rate=1e-5),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
    )
  full = form == ""
  return configs.offline(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=12_800 if full else 48, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=64 if full else 16, group_size=1, max_prompt=40, max_response=80),
      batch=dict(tokens=7680 if full else 480, buckets=(80, 120), chunk=2048 if full else 48),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
