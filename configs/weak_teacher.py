"""EVE's weak teacher: SFT on the chosen responses, then DPO against that.

    python -m opd_jax.main --config=configs/weak_teacher.py:sft --workdir=runs/weak_sft
    python -m opd_jax.main --config=configs/weak_teacher.py --workdir=runs/weak

The preferences are those of configs/preferences.py, about records that begin, nine times in ten,
with what matters most (data/builders/notes). EVE weighs by the log-ratio of the two models.

Forms: full (the default), DPO with beta 0.1 after the first command; sft; quick and smoke, DPO of
tiny:weak against itself on pairs of no reward model; paper_sft and paper, appendix 9.2:
Llama-3.2-1B, batch 128, learning rate 1e-6.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "sft", "quick", "smoke", "paper_sft", "paper")
  sft = form.endswith("sft")
  if form.startswith("paper"):
    return configs.offline(
        total_steps=1000,
        student=dict(source="hf:Llama-3.2-1B" if sft else "workdir:runs/weak_sft",
                     chat_template="chat.jinja"),
        reference={} if sft else dict(source="workdir:runs/weak_sft", chat_template="chat.jinja"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="preferences.jsonl", test="held_out.jsonl", question="prompt", answer="id",
            response="chosen", **({} if sft else dict(chosen="chosen", rejected="rejected")))),
        rollout=dict(max_prompt=1024, max_response=1024),
        batch=dict(tokens=(1 if sft else 2) * 128 * 2048, buckets=(512, 1024, 2048)),
        loss=dict(objective="sft" if sft else "dpo", micro_batches=8),
        optimizer=dict(learning_rate=1e-6, schedule="cosine", warmup_steps=150),
        checkpoint=dict(keep_best=0),
    )
  full, smoke = form in ("", "sft"), form == "smoke"
  before = "workdir:runs/weak_sft" if full else "tiny:weak"
  return configs.offline(
      total_steps={"": 100, "sft": 300, "quick": 10, "smoke": 2}[form],
      student=dict(source="random:tiny_weak", tokenizer="opd_jax/tiny/teacher") if sft
      else dict(source=before),
      reference={} if sft else dict(source=before),
      data=dict(
          **(dict(builder="rows", builder_kw=dict(train="runs/preferences/rows.jsonl")) if full
             else dict(builder="notes", builder_kw=dict(
                 kind="preferences", train=64, test=8, lead=0.9, slips=(0, 1, 2, 3, 4)))),
          eval_builder="notes", eval_builder_kw=dict(kind="prompts", train=8, test=256)),
      rollout=dict(max_prompt=20, max_response=14),
      batch=dict(tokens=272 if smoke else 2176, buckets=(34,), chunk=512 if full else 32),
      loss=dict(objective="sft" if sft else "dpo"),
      optimizer=dict(learning_rate=3e-3 if sft else 3e-4, schedule="cosine", warmup_steps=10,
                     b2=0.98),
      verifier=dict(name="notes"),
      eval=dict(prompts=256 if full else 4, samples=2, ks=(1,), batch=64 if full else 4),
      checkpoint=dict(best_metric="eval/mean@2"),
      log_every=10 if full else 1,
  )
