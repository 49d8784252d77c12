"""EVE: a strong model learns its own samples, by how much a weak teacher's alignment likes them.

    python -m opd_jax.main --config=configs/eve.py --workdir=runs/eve

    loss = mean over a prompt's K samples of -F_k log p(y_k)
    F = K softmax over them of beta / lambda (log pi_weak - log pi_weak_ref)

The samples are rows with a `group` of K responses each, which configs/strong_samples.py has made of
configs/notes.py:base, with what the two weak models say of them, by text, so that their tokenizers
may differ; of rows that bring no such numbers they are asked here, once (`scores`).
launch/weak_to_strong.sh runs all stages and compares the methods. Other readings are other keys:
loss.eve.fields=("weak_logprob", "") is the Bayesian one of section 10 (r = log pi_weak); weak
samples weighed by ("strong_logprob", "weak_reference_logprob") section 11.1; loss.eve.ratio=0 has
no weights.

Forms: full (the default), after these two; quick, a few updates of it; smoke, for the tests, tiny
models and notes that nobody sampled; paper, Qwen2.5-7B taught by Llama-3.2-1B (section 5.2; the
paper names no learning rate for the student: this is that of its weak models).
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.offline(
        total_steps=500,
        student=dict(source="hf:Qwen2.5-7B", chat_template="chat.jinja"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="rows", builder_kw=dict(train="runs/strong_samples/rows.jsonl"),
                  eval_builder="instructions", eval_builder_kw=dict(
                      train="ifeval.jsonl", test="ifeval.jsonl")),
        scores=dict(weak_logprob=dict(source="hf:Llama-3.2-1B-dpo"),
                    weak_reference_logprob=dict(source="hf:Llama-3.2-1B-sft")),
        rollout=dict(group_size=4, max_prompt=1024, max_response=1024),
        batch=dict(tokens=128 * 2048, buckets=(512, 1024, 2048)),
        loss=dict(objective="eve", micro_batches=4),  # a prompt's samples a chip of v5p:2x2x2
        optimizer=dict(learning_rate=1e-6, schedule="cosine", warmup_steps=150),
        verifier=dict(name="instructions"),
        eval=dict(samples=1, ks=(1,), at=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
        checkpoint=dict(best_metric="eval/mean@1"),
    )
  smoke = form == "smoke"
  tested = dict(eval_builder="notes", eval_builder_kw=dict(kind="prompts", train=8, test=256))
  return configs.offline(
      total_steps={"": 128, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student" if smoke else "workdir:runs/notes_base"),
      data=tested | (dict(builder="notes", builder_kw=dict(kind="preferences", train=64, test=8))
                     if smoke else
                     dict(builder="rows", builder_kw=dict(
                         train="runs/strong_samples/rows.jsonl"))),
      scores=dict(weak_logprob=dict(source="tiny:weak"),
                  weak_reference_logprob=dict(source="tiny:student")) if smoke else {},
      rollout=dict(group_size=2 if smoke else 4, max_prompt=20, max_response=14),
      batch=dict(tokens=272 if smoke else 2176, buckets=(34,), chunk=32 if smoke else 512),
      loss=dict(objective="eve"),
      optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup_steps=10, b2=0.98),
      verifier=dict(name="notes"),
      eval=dict(prompts=4 if smoke else 256, samples=2, ks=(1,), batch=4 if smoke else 64,
                at=() if smoke else (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
      checkpoint=dict(best_metric="eval/mean@2"),
      log_every=1 if smoke else 5,
  )
