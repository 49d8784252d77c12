"""A base model of three domains, and an expert for each made from it by GRPO.

    python -m opd_jax.main --config=configs/domains.py:base --workdir=runs/base
    for task in sort count keep; do
      python -m opd_jax.main --config=configs/domains.py:$task --workdir=runs/expert_$task
    done

(bash launch/experts.sh does the four.) The base is tiny:weak fitted to worked solutions of
three tasks of data/builders/domains and stopped in the middle, so that each leaves something to be
learned; an expert is the base after GRPO on the questions of one. configs/exopd_multi_teacher.py
merges the experts back into the base.
"""

from opd_jax import config as configs

TASKS = ("sort", "count", "keep")


def get_config(arg="base"):
  form = configs.form(arg, "base", *TASKS, "smoke")
  data = lambda *tasks: dict(builder="domains", builder_kw=dict(
      train=50_000, test=1000, tasks=tasks, seed=3))
  evaluation = dict(prompts=192, samples=4, ks=(1, 4), batch=48)
  if form in ("base", "smoke"):
    smoke = form == "smoke"
    return configs.offline(
        total_steps=2 if smoke else 300,
        student=dict(source="tiny:weak"),
        data=data(*TASKS),
        rollout=dict(max_prompt=48, max_response=16 if smoke else 72),
        batch=dict(tokens=640 if smoke else 6144, buckets=(64, 96, 128),
                   chunk=64 if smoke else 2048),
        optimizer=dict(learning_rate=1e-3, warmup_steps=20, b2=0.98),
        eval=evaluation | (dict(prompts=4, batch=4) if smoke else dict(every=100)),
        checkpoint=dict(every=100, best_metric="eval/mean@4"),
        log_every=1 if smoke else 20,
    )
  return configs.on_policy(
      total_steps=120,
      student=dict(source="workdir:runs/base"),
      teacher=dict(source=""),
      data=data(form),
      rollout=dict(prompts=16, group_size=16, max_prompt=48, max_response=80),
      loss=dict(signal="group_advantage", surrogate="clipped", updates_per_batch=2),
      optimizer=dict(learning_rate=2.5e-4, warmup_steps=5, b2=0.98),
      eval=evaluation | dict(every=30),
      checkpoint=dict(every=60, best_metric="eval/mean@4"),
      log_every=5,
  )
