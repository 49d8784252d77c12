"""SDPO: a model taught by one success of its peers; the baseline of MOPD (METHODS 4).

    python -m opd_jax.main --config=configs/sdpo.py --workdir=runs/sdpo

configs/mopd.py with one right response in the teacher's context, and nothing wrong.

Forms: full (the default), the tiny student on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, MOPD's setting of it for Qwen3-8B: 32 prompts x 8 responses of 4096 tokens, 1e-5
after 10 updates of warm-up. It wants a pod, the model's folder, and problems.jsonl.
"""

from opd_jax import config as configs

LOSS = dict(surrogate="jsd", beta=0.5, top_k=100, top_of="student", tail="bucket",
            divergence_importance=True, importance_cap=2.0)


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.peers(
        total_steps=400,
        student=dict(source="hf:Qwen3-8B"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=32, group_size=8, max_prompt=2048, max_response=4096),
        context=dict(peers="success", budget=10240, buckets=(2048, 4096, 6144), tokens=1 << 19),
        ema=dict(rate=0.05),
        loss=dict(**LOSS, micro_batches=8),
        optimizer=dict(learning_rate=1e-5, warmup_steps=10),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
    )
  full = form == ""
  return configs.peers(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=16 if full else 4, group_size=8 if full else 4, max_prompt=40,
                   max_response=80),
      context=dict(peers="success", budget=320, buckets=(160, 240) if full else ()),
      ema=dict(rate=0.05),
      loss=LOSS,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
