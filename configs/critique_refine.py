"""Weak critics, strong answers (OPCD section 3, METHODS 5): does W's critique help S?

    python -m opd_jax.main --config=configs/critique_refine.py --workdir=runs/critique_refine

16 chains a question of answer, critique and refinement; pass@k of the first k, against S alone, W
alone, and one critique for all answers: the best, any, the worst. The same command goes on where it
was stopped, and once all is sampled it prints the table again, without a model.

S is the tiny student and W the tiny weak model, on questions of which they answer 37% and 9%: the
student can use a critique, which the tiny teacher, taught another wording, hardly can.

Forms: full (the default), minutes on 2 CPU cores; quick, a minute of the same; smoke, for the
tests; paper, the paper's thinking models on AIME 2024 and 2025 (Table 1, from 71.67 to 75.00 pass@1
and from 86.67 to 90.00 pass@16): Qwen3-8B with Qwen3-1.7B, whose templates think. It wants a pod,
both folders, and aime.jsonl of 60 problems. The paper gives no sampling settings for this study;
those of its training are taken: answers at temperature 1, refinements at 0.6, top-k 20 and top-p
0.95 for both, greedy critiques. Lengths are ours.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  ks = (1, 2, 4, 8, 16)
  if form == "paper":
    return configs.critique_refine(
        student=dict(source="hf:Qwen3-8B"),
        critic=dict(source="hf:Qwen3-1.7B"),
        model=dict(compute_dtype="bfloat16"),
        data=dict(builder="jsonl", builder_kw=dict(
            test="aime.jsonl", question="question", answer="answer")),
        rollout=dict(max_prompt=8192, prompt_buckets=(1024, 4096), max_response=30_000, slots=64,
                     kv_dtype="bfloat16"),
        critique=dict(temperature=0.0, max_response=16_384),
        refine=dict(temperature=0.6, top_k=20, top_p=0.95),
        reuse_critiques=False,  # the paper selects critiques for Phi-4 alone
        verifier=dict(name="math_answer"),
        eval=dict(prompts=60, batch=4, samples=16, ks=ks, temperature=1.0, top_k=20, top_p=0.95),
    )
  full, smoke = form == "", form == "smoke"
  return configs.critique_refine(
      student=dict(source="tiny:student"),
      critic=dict(source="tiny:weak"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=1, test=500, mix=dict(plain=1.0), digits=(1,), min_steps=7, max_steps=8)),
      rollout=dict(max_prompt=200, prompt_buckets=() if smoke else (40, 120),
                   max_response=16 if smoke else 64, slots=0 if smoke else 128),
      critique=dict(max_response=16 if smoke else 80),
      eval=dict(prompts=2 if smoke else 128 if full else 16, batch=2 if smoke else 16,
                samples=2 if smoke else 16, ks=(1, 2) if smoke else ks),
  )
