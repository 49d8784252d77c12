"""ExOPD: on-policy distillation beyond the teacher, by extrapolation from a reference.

    python -m opd_jax.main --config=configs/exopd.py --workdir=runs/exopd

As configs/opd.py, but the target is lam = 1.25 times as far from the reference, the student's
initial weights, as the teacher is. With --config.loss.lam=1 it is configs/opd.py bit for bit; lam
between 0 and 1 interpolates. Reward correction names the teacher before its own training instead:
--config.reference.source=hf:DIR.

Forms: full (the default), quick and smoke as configs/opd.py; paper, the setting of "Learning
beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation" (METHODS 2): lam =
1.25, Qwen3-4B towards an expert of its own size, 1024 prompts with one response each of up to 16384
tokens, 3 epochs, a constant 1e-5; files and micro-batches as in configs/opd.py:paper.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source="hf:Qwen3-4B-expert"),
        reference=dict(source="hf:Qwen3-4B"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        loss=dict(signal="g_opd", lam=1.25, surrogate="score_function", micro_batches=8),
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
      reference=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=40, max_response=80),
      loss=dict(signal="g_opd", lam=1.25, surrogate="score_function"),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
