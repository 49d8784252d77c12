"""Evaluates a Hugging Face folder or one of our workdirs on held-out prompts.

    python -m opd_jax.main --config=configs/eval.py --workdir=runs/eval \
      --config.student.source=workdir:runs/quickstart      # or hf:FOLDER, tiny:student ...

Accuracy as mean@8 and pass@8 at temperature 1 (greedy: --config.eval.temperature=0), and
the exact reverse KL to a teacher if one is named (--config.teacher.source=tiny:teacher).
"""

from opd_jax import config as configs


def get_config(arg=""):
  smoke = configs.form(arg, "", "smoke") == "smoke"
  return configs.evaluate(
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(train=1, test=1000, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=16 if smoke else 80),
      eval=dict(prompts=4 if smoke else 256, batch=4 if smoke else 32),
  )
