"""ExPO: a model's weights taken further from its base's than training took them. No training here.

    python -m opd_jax.main --config=configs/expo.py --workdir=runs/expo

theta_base + alpha (theta - theta_base), of tiny:student, which was trained from tiny:weak, with
alpha = 1.25; --config.student.alpha=1 is the model itself. It is the baseline of ExOPD, which
extrapolates what is learned and not the weights. Every policy of every config has the two keys:
--config.teacher.base=... makes an extrapolated teacher.

Forms: full (the default), quick, seconds; smoke, for the tests; paper, that of configs/exopd.py:
the expert of Qwen3-4B and its base.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.evaluate(
        student=dict(source="hf:Qwen3-4B-expert", base="hf:Qwen3-4B", alpha=1.25),
        model=dict(compute_dtype="bfloat16"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
        rollout=dict(max_prompt=2048, max_response=16384),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128),
    )
  full = form == ""
  return configs.evaluate(
      student=dict(source="tiny:student", base="tiny:weak", alpha=1.25),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=1, test=1000 if full else 200, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=16 if form == "smoke" else 80),
      eval=dict(prompts=256 if full else 4, batch=32 if full else 4),
  )
