"""What the tiny models make of peers and critiques: the table in the README.

    python -m opd_jax.main --config=configs/context_use.py --workdir=runs/context_use
"""

from opd_jax import config as configs


def get_config(arg=""):
  smoke = configs.form(arg, "", "smoke") == "smoke"
  return configs.context_use(
      models=("tiny:student",) if smoke else ("tiny:teacher", "tiny:student", "tiny:weak"),
      data=dict(builder="arithmetic", builder_kw=dict(train=1, test=1000, mix=dict(plain=1.0))),
      rollout=dict(prompt_buckets=() if smoke else (40, 160), max_prompt=300,
                   max_response=16 if smoke else 112),
      eval=dict(prompts=8 if smoke else 600, batch=8 if smoke else 60),
  )
