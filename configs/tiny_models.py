"""The tiny models that ship in opd_jax/tiny: teacher, student and weak.

    python -m opd_jax.main --config=configs/tiny_models.py:teacher --workdir=runs/tiny_teacher

Each learns step-by-step modular arithmetic (data/builders/arithmetic) from worked
solutions, and to use what a context offers: peers' solutions, marked failures, critiques.
"""

from opd_jax import config as configs


MIX = dict(plain=0.3, peers=0.3, refine=0.2, critic=0.2)

# Per model: updates and schedule. Student and weak model stop early and at full learning rate,
# in the middle of learning the arithmetic: there is something left to be taught.
RECIPES = {"teacher": (2000, "cosine"), "student": (900, "constant"), "weak": (900, "constant")}


def get_config(arg="teacher"):
  smoke = configs.form(arg, "smoke", *RECIPES) == "smoke"
  name = "teacher" if smoke else arg
  steps, schedule = RECIPES[name]
  return configs.offline(
      total_steps=2 if smoke else steps,
      # One tokenizer for all three: the teacher's run learns it from its data.
      student=dict(source=f"random:tiny_{name}",
                   tokenizer="" if name == "teacher" else "opd_jax/tiny/teacher"),
      tokenizer_vocab=320 if name == "teacher" else 0,
      data=dict(builder="arithmetic", builder_kw=dict(
          train=500 if smoke else 300_000, test=1000, mix=MIX, beyond=0.4)),
      batch=dict(tokens=640 if smoke else 6144, chunk=64 if smoke else 2048),
      optimizer=dict(learning_rate=3e-3, schedule=schedule, warmup_steps=100, b2=0.98,
                     weight_decay=0.01),
      eval=dict(prompts=4 if smoke else 128, every=0 if smoke else 250, batch=4 if smoke else 32),
      checkpoint=dict(every=500),
      log_every=1 if smoke else 20,
  )
