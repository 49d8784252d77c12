"""ExOPD with many teachers: the experts of several domains, merged back into their common base.

    bash launch/experts.sh
    python -m opd_jax.main --config=configs/exopd_multi_teacher.py --workdir=runs/merged

Every prompt names the teacher of its domain, here its task (data/builders/domains), and learns
from that one alone. The reference is the base that student and experts start from.

Forms: full (the default), the base and the three experts that the first command makes of it; quick,
seconds with the shipped models in the experts' places; smoke, for the tests; paper, the setting of
"Learning beyond Teacher" (METHODS 2): Qwen3-4B towards a maths and a code expert made of it, 1024
prompts with one response each of up to 16384 tokens, 3 epochs, a constant 1e-5, lam = 1.25; rows
whose field `domain` says "math" or "code". Its one verifier is for answers in mathematics: code is
trained on, and not evaluated.
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
        loss=dict(**loss, micro_batches=8),
        optimizer=dict(learning_rate=1e-5),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
        checkpoint=dict(every=10),  # that many steps take half an hour and more
    )
  full = form == ""
  base = "workdir:runs/base" if full else "tiny:student"
  experts = dict(sort="tiny:teacher", count="tiny:student", keep="tiny:weak")
  if full:
    experts = {task: f"workdir:runs/expert_{task}" for task in experts}
  return configs.on_policy(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source=base),
      teachers={task: dict(source=source) for task, source in experts.items()},
      reference=dict(source=base),
      data=dict(builder="domains", builder_kw=dict(
          train=20_000 if full else 200, test=256, seed=7, tasks=tuple(experts), route=True)),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=48, max_response=72),
      loss=loss,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=192 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
