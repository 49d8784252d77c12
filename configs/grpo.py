"""GRPO: rewards of a verifier, compared within a prompt's group of responses; no teacher.

    python -m opd_jax.main --config=configs/grpo.py --workdir=runs/grpo

Makes the experts that the other methods learn from. A batch serves two updates, by PPO's clipped
surrogate with the dual clip.

Forms: full (the default), the tiny student on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, the setting of "DeepSeekMath" for Qwen3-4B: 16 questions x 64 responses of 1024
tokens, one update a batch, 1e-6, KL to the initial weights with coefficient 0.04. It wants a pod,
the model's folder, and problems.jsonl.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source=""),
        reference=dict(source="hf:Qwen3-4B"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=16, group_size=64, max_prompt=1024, max_response=1024),
        loss=dict(signal="group_advantage", surrogate="clipped", normalize_std=True,
                  clipped=dict(low=0.2, high=0.2), reference_kl=0.04, aggregate="sequence_mean",
                  micro_batches=8),
        optimizer=dict(learning_rate=1e-6),
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
      rollout=dict(prompts=16 if full else 4, group_size=4, max_prompt=40, max_response=80),
      loss=dict(signal="group_advantage", surrogate="clipped", normalize_std=True,
                clipped=dict(low=0.2, high=0.2, dual=3.0), updates_per_batch=2),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
