"""Which context knows a right response: seven contexts by the metrics of MOPD (METHODS 4).

    python -m opd_jax.main --config=configs/teacher_signal.py --workdir=runs/teacher_signal
    python -m opd_jax.main --config=configs/teacher_signal.py --config.run=runs/mopd ...

Every saved response of a run is scored by `student` behind what its peers wrote; table, JSON and
picture are left in the workdir. Without a run the student answers questions first. To score by the
trained model, name it: --config.student.source=workdir:runs/mopd.

Forms: full (the default), the tiny student on 128 questions with 8 answers each, 2 CPU cores;
smoke.
"""

from opd_jax import config as configs


def get_config(arg=""):
  full = configs.form(arg, "", "smoke") == ""
  return configs.teacher_signal(
      student=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(max_prompt=40, max_response=80),
      context=dict(budget=320, buckets=(96, 160, 240) if full else ()),
      eval=dict(prompts=128 if full else 4, batch=16 if full else 4, samples=8 if full else 4,
                ks=(1,)),
  )
