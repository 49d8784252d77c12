"""On-policy distillation, the base case of the family: the sampled reverse KL to one teacher.

    python -m opd_jax.main --config=configs/opd.py --workdir=runs/opd

Forms: full (the default), the tiny models on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, the setting of the baseline in "Learning beyond Teacher" (METHODS 2): Qwen3-4B
towards an expert of its own size, 1024 prompts with one response each, prompts of 2048 and
responses of 16384 tokens, 3 epochs, AdamW at a constant 1e-5. It wants a pod, the two model
folders, and problems.jsonl; total_steps = 3 x rows / 1024. Its micro-batches are for 128 chips, a
row each; on n chips set loss.micro_batches to 1024 / n, as for the other methods' paper forms.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source="hf:Qwen3-4B-expert"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        loss=dict(signal="opd", surrogate="score_function", micro_batches=8),
        optimizer=dict(learning_rate=1e-5),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
        checkpoint=dict(every=10),  # that many steps take half an hour and more
    )
  full = form == ""
  return configs.on_policy(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=40, max_response=80),
      loss=dict(signal="opd", surrogate="score_function"),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
