"""EVE's samples: K responses of the strong base to each prompt, and what weak models say of them.

    python -m opd_jax.main --config=configs/strong_samples.py:demonstrations \
      --workdir=runs/demonstrations
    python -m opd_jax.main --config=configs/strong_samples.py --workdir=runs/strong_samples

The base (configs/notes.py:base) is shown two demonstrations (`shots`) that the weak teacher
(configs/weak_teacher.py) wrote of other records; it is not tuned to follow instructions. The rows
are what configs/eve.py learns of.

Forms: full (the default); demonstrations; quick, a few prompts of it; smoke, for the tests, tiny
models and no demonstrations; paper, section 5.2: Qwen2.5-7B asked to make the responses of
Llama-3.2-1B better, in the words of appendix 9.6.
"""

from opd_jax import config as configs

BETTER = ("User: {question}\nWeak Assistant: {response}\n"
          "Can you make the response more helpful and coherent?\nStrong Assistant:")


def get_config(arg=""):
  form = configs.form(arg, "", "demonstrations", "quick", "smoke", "paper")
  if form == "paper":
    return configs.responses(
        student=dict(source="hf:Qwen2.5-7B", chat_template="{{ messages[0]['content'] }}"),
        model=dict(compute_dtype="bfloat16"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="prompts.jsonl", question="prompt", answer="id")),
        refine=dict(rows="runs/weak_responses/rows.jsonl", template=BETTER),
        rollout=dict(prompts=64, group_size=4, max_prompt=2048, max_response=1024),
        scores=dict(weak_logprob=dict(source="hf:Llama-3.2-1B-dpo"),
                    weak_reference_logprob=dict(source="hf:Llama-3.2-1B-sft")),
        batch=dict(tokens=128 * 2048, buckets=(512, 1024, 2048)),
        loss=dict(micro_batches=8))
  smoke, shown = form == "smoke", 64  # prompts of which there are demonstrations
  if form == "demonstrations":
    return configs.responses(
        student=dict(source="workdir:runs/weak"), prompts=shown,
        data=dict(builder="notes", builder_kw=dict(kind="prompts", train=shown, test=16)),
        rollout=dict(prompts=64, group_size=1, max_prompt=20, max_response=14),
        verifier=dict(name="notes"), writers=("jsonl",))
  model = lambda run, tiny: dict(source=f"tiny:{tiny}" if smoke else f"workdir:runs/{run}")
  return configs.responses(
      student=model("notes_base", "student"),
      data=dict(builder="arithmetic", builder_kw=dict(train=40, test=4, mix=dict(plain=1.0)))
      if smoke else
      dict(builder="notes", builder_kw=dict(kind="prompts", train=shown + 2048, test=16)),
      skip=0 if smoke else shown,
      prompts={"": 2048, "quick": 64, "smoke": 4}[form],
      shots={} if smoke else dict(rows="runs/demonstrations/rows.jsonl"),
      scores=dict(weak_logprob=model("weak", "weak"),
                  weak_reference_logprob=model("weak_sft", "student")),
      rollout=dict(prompts=4 if smoke else 64, group_size=2 if smoke else 4,
                   max_prompt=96 if smoke else 72, max_response=80 if smoke else 14),
      batch=dict(tokens=1024 if smoke else 6144, buckets=(128,) if smoke else (34, 86),
                 chunk=4 if smoke else 256),
      verifier=dict(name="exact_match" if smoke else "notes"),
      writers=("jsonl",))
