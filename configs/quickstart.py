"""On-policy distillation in five minutes: a tiny student learns arithmetic from a tiny teacher.

    bash launch/quickstart.sh
    python -m opd_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The student samples worked solutions to chains of modular arithmetic; the teacher scores
every token; the student follows the reverse KL. At least half of the accuracy gap is closed
in under five minutes on two CPU cores.
"""

from opd_jax import config as configs


def get_config(arg=""):
  smoke, quick = configs.form(arg, "", "smoke", "quick") == "smoke", arg == "quick"
  return configs.on_policy(
      total_steps=2 if smoke else 30 if quick else 200,
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=100 if smoke else 20_000, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=4 if smoke else 64, group_size=1, max_prompt=40, max_response=80),
      loss=dict(surrogate="reverse_kl"),
      optimizer=dict(learning_rate=3e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=4 if smoke else 128, batch=4 if smoke else 32, every=0 if smoke else 50),
      checkpoint=dict(every=50),
      log_every=1 if smoke else 5,
  )
