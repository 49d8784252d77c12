"""ExOPD with many teachers: the experts of several domains, merged back into their common base.

    for d in 1 2; do
      python -m opd_jax.main --config=configs/grpo.py --workdir=runs/expert_$d \
        "--config.data.builder_kw.digits=($d,)"
    done
    python -m opd_jax.main --config=configs/exopd_multi_teacher.py --workdir=runs/merged

Every prompt names the teacher of its domain, here the number of its digits, and learns from that
one alone. The reference is the base that student and experts start from.

Forms: full (the default), the tiny student and the two experts that the commands above make of it;
quick, seconds with two of the shipped models in the experts' places; smoke, for the tests; paper,
the setting of "Learning beyond Teacher" (METHODS 2): that of configs/exopd.py:paper with a maths
and a code expert of Qwen3-4B, and rows whose field `domain` says "math" or "code". Its one
verifier is for answers in mathematics: code is trained on, and not evaluated.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  loss = dict(signal="g_opd", lam=1.25, surrogate="score_function")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teachers=dict(math=dict(source="hf:Qwen3-4B-math"), code=dict(source="hf:Qwen3-4B-code")),
        reference=dict(source="hf:Qwen3-4B"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer",
            teacher="domain")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        loss=dict(**loss, micro_batches=64),
        optimizer=dict(learning_rate=1e-5),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
    )
  full = form == ""
  experts = ("workdir:runs/expert_1", "workdir:runs/expert_2") if full else (
      "tiny:weak", "tiny:teacher")
  return configs.on_policy(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      teachers=dict(one_digit=dict(source=experts[0]), two_digits=dict(source=experts[1])),
      reference=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7,
          teachers={"1": "one_digit", "2": "two_digits"})),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=40, max_response=80),
      loss=loss,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
