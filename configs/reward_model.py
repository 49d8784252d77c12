"""A reward model: a language model's trunk and a scalar head, fitted to pairs of responses.

    python -m opd_jax.main --config=configs/reward_model.py --workdir=runs/reward_model

The first stage of EVE: its rewards draw the preferences (configs/preferences.py) that a weak
teacher learns. It says how often it is right on held-out pairs; below min_accuracy nobody accepts
it. --config.reward.source=runs/reward_model gives it to configs made of `configs.responses`.

Forms: full (the default), notes, 2 CPU cores; quick, a few updates; smoke, for the tests; paper,
appendix 9.1: Llama-3.1-8B after its SFT, batch 128, learning rate 1e-6, one epoch of TL;DR.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.reward_model(
        total_steps=700,
        student=dict(source="hf:Llama-3.1-8B-sft", chat_template="chat.jinja"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="preferences.jsonl", test="held_out.jsonl", question="prompt", answer="id",
            chosen="chosen", rejected="rejected")),
        batch=dict(tokens=2 * 128 * 1024, buckets=(512, 768, 1024)),
        loss=dict(micro_batches=16),
        optimizer=dict(learning_rate=1e-6, schedule="cosine", warmup_steps=150),
        eval=dict(prompts=1024, every=100),
    )
  full, smoke = form == "", form == "smoke"
  return configs.reward_model(
      total_steps={"": 300, "quick": 20, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      data=dict(builder="notes", builder_kw=dict(
          kind="preferences", train=40_000 if full else 400, test=512, slips=(0, 1, 2, 3, 4))),
      batch=dict(tokens=272 if smoke else 4352, buckets=(34,), chunk=1024 if full else 64),
      optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup_steps=20, b2=0.98),
      eval=dict(prompts=512 if full else 16, every=100),
      checkpoint=dict(every=100),
      min_accuracy=0.0 if smoke else 0.55,
      log_every=10 if full else 1,
  )
