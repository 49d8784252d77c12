"""The tiny models that ship in opd_jax/tiny: teacher, student and weak.

    python -m opd_jax.main --config=configs/tiny_models.py:teacher --workdir=runs/tiny_teacher
    python -m opd_jax.main --config=configs/tiny_models.py:weak --workdir=runs/tiny_weak
    python -m opd_jax.main --config=configs/tiny_models.py:student --workdir=runs/tiny_student

Each learns step-by-step modular arithmetic (data/builders/arithmetic) from worked
solutions, and to use what a context offers: peers' solutions, marked failures, critiques.
The weak model reads contexts but cannot compute yet; the student is the weak model with some
arithmetic learnt, stopped in the middle so that there is something left to be taught. Copy
each run's export/ to opd_jax/tiny/NAME.
"""

from opd_jax import config as configs

READ = dict(plain=0.3, peers=0.3, refine=0.2, critic=0.2)
COMPUTE = dict(plain=0.6, peers=0.2, refine=0.1, critic=0.1)

# Per model: where it starts, updates, schedule, kinds of rows.
RECIPES = {
    "teacher": ("random:tiny_teacher", 2000, "cosine", READ),
    "weak": ("random:tiny_student", 1500, "constant", READ),
    "student": ("workdir:runs/tiny_weak", 1200, "constant", COMPUTE),
}


def get_config(arg="teacher"):
  smoke = configs.form(arg, "smoke", *RECIPES) == "smoke"
  source, steps, schedule, mix = RECIPES["teacher" if smoke else arg]
  own = arg in ("smoke", "teacher")  # one tokenizer for all: the teacher's run learns it
  return configs.offline(
      total_steps=2 if smoke else steps,
      student=dict(source=source, tokenizer="" if own else "opd_jax/tiny/teacher"),
      tokenizer_vocab=320 if own else 0,
      data=dict(builder="arithmetic", builder_kw=dict(
          train=500 if smoke else 300_000, test=1000, mix=mix, beyond=0.4)),
      batch=dict(tokens=640 if smoke else 6144, chunk=64 if smoke else 2048),
      optimizer=dict(learning_rate=3e-3, schedule=schedule, warmup_steps=100, b2=0.98,
                     weight_decay=0.01),
      eval=dict(prompts=4 if smoke else 128, every=0 if smoke else 250, batch=4 if smoke else 32),
      checkpoint=dict(every=500),
      log_every=1 if smoke else 20,
  )
