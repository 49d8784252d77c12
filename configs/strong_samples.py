"""EVE's samples: K responses of the strong base to each prompt, and what weak models say of them.

    python -m opd_jax.main --config=configs/strong_samples.py --workdir=runs/strong_samples

The base is shown two demonstrations that the weak teacher wrote (`shots`); it is not tuned to
follow instructions. The rows are what configs/eve.py learns of:
--config.data.builder_kw.train=runs/strong_samples/rows.jsonl

Forms: full (the default), after launch/weak_to_strong.sh, whose demonstrations and models it takes;
quick, a few prompts of it; smoke, for the tests, tiny models and no demonstrations; paper, section
5.2: Qwen2.5-7B asked to make the responses of Llama-3.2-1B better, in the words of appendix 9.6.
"""

from opd_jax import config as configs

BETTER = ("User: {question}\nWeak Assistant: {response}\n"
          "Can you make the response more helpful and coherent?\nStrong Assistant:")


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
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
  smoke, made = form == "smoke", "runs/weak_to_strong/stages"
  weak = lambda stage, tiny: dict(source=f"tiny:{tiny}" if smoke else f"hf:{made}/{stage}/export")
  return configs.responses(
      student=weak("base", "student"),
      data=dict(builder="arithmetic", builder_kw=dict(train=40, test=4, mix=dict(plain=1.0)))
      if smoke else
      dict(builder="notes", builder_kw=dict(kind="prompts", train=64 + 2048, test=16)),
      skip=0 if smoke else 64,
      prompts={"": 2048, "quick": 64, "smoke": 4}[form],
      shots={} if smoke else dict(rows=f"{made}/demonstrations/rows.jsonl"),
      scores=dict(weak_logprob=weak("weak", "weak"),
                  weak_reference_logprob=weak("weak_sft", "student")),
      rollout=dict(prompts=4 if smoke else 64, group_size=2 if smoke else 4,
                   max_prompt=96 if smoke else 72, max_response=80 if smoke else 14),
      batch=dict(tokens=1024 if smoke else 6144, buckets=(128,) if smoke else (34, 86),
                 chunk=4 if smoke else 256),
      verifier=dict(name="exact_match" if smoke else "notes"),
      writers=("jsonl",))
