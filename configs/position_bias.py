"""Position bias (IW-OPD's diagnosis, METHODS 3): where in a response is the teacher worth asking?

    python -m opd_jax.main --config=configs/position_bias.py --workdir=runs/position_bias

Teacher and student finish the student's responses from cuts at 10%..90%; KL and log-probability are
measured along the responses; students are trained on all tokens, and on the first and last 30% and
50%. They learn by the reverse KL over the vocabulary, as in configs/quickstart.py: its gradient is
what the paper's sampled form has on average, with less noise. One seed: enough to see, not to
decide.

Forms: full (the default), minutes on 2 CPU cores; quick, a minute of the same; smoke, for the
tests. To compare with a student trained elsewhere, and train none:
--config.parts="()" --config.after.source=workdir:runs/opd
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  full, smoke = form == "", form == "smoke"
  return configs.position_bias(
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      total_steps={"": 100, "quick": 10, "smoke": 2}[form],
      parts={"": (0.3, 0.5), "quick": (0.3,), "smoke": (1.0,)}[form],
      cuts=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9) if full else (0.3, 0.6, 0.9),
      continuations=4 if full else 2,
      rollout=dict(prompts=64 if full else 8, group_size=1, max_prompt=40, max_response=80,
                   slots=256),
      loss=dict(surrogate="reverse_kl"),
      optimizer=dict(learning_rate=3e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4 if smoke else 32, samples=4 if full else 2, ks=(1,),
                batch=32 if full else 4, every=25 if full else 0),
      checkpoint=dict(every=25 if full else 50, keep_best=0),
      export=False,
      log_every=5 if full else 1,
  )
