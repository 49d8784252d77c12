"""IW-OPD: a token counts more before the student has drifted from its teacher than after.

    python -m opd_jax.main --config=configs/iw_opd.py --workdir=runs/iw_opd

As configs/opd.py, but a response's first token weighs 1.5 and its last about 1. That also raises
the effective learning rate; --config.loss.iw_opd.unit_mean=True takes this back.

Forms: full (the default), quick and smoke as configs/opd.py; paper, the setting of IW-OPD
(METHODS 3): Qwen3-4B from Qwen3-30B-A3B-Instruct-2507, batch 1024, responses of 16384 tokens, a
constant 1e-5, 32 GPUs there; micro-batches as for a v5p:4x4x8 (docs/compile_report.md).
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source="hf:Qwen3-30B-A3B-Instruct-2507"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        loss=dict(signal="opd", weight="iw_opd", surrogate="score_function",
                  iw_opd=dict(max_weight=1.5), micro_batches=8),  # a row a chip of v5p:4x4x8
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
      loss=dict(signal="opd", weight="iw_opd", surrogate="score_function",
                iw_opd=dict(max_weight=1.5)),
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
