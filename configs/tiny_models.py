"""The tiny models that ship in opd_jax/tiny: teacher, student and weak.

    python -m opd_jax.main --config=configs/tiny_models.py:teacher --workdir=runs/tiny_teacher

Each learns step-by-step modular arithmetic (data/builders/arithmetic) from worked
solutions, and to use what a context offers: peers' solutions, marked failures, critiques.
"""

from opd_jax import config as configs


# Per model: updates, rows, kinds of rows, and the share of context rows with three digits.
RECIPES = {
    "teacher": (2000, 300_000, dict(plain=0.3, peers=0.3, refine=0.2, critic=0.2), 0.4),
    "student": (700, 60_000, dict(plain=0.1, peers=0.4, refine=0.3, critic=0.2), 0.8),
    "weak": (900, 60_000, dict(plain=0.2, peers=0.2, refine=0.2, critic=0.4), 0.5),
}


def get_config(arg="teacher"):
  smoke = configs.form(arg, "smoke", *RECIPES) == "smoke"
  name = "teacher" if smoke else arg
  steps, rows, mix, beyond = RECIPES[name]
  return configs.offline(
      total_steps=2 if smoke else steps,
      # One tokenizer for all three: the teacher's run learns it from its data.
      student=dict(source=f"random:tiny_{name}",
                   tokenizer="" if name == "teacher" else "opd_jax/tiny/teacher"),
      tokenizer_vocab=320 if name == "teacher" else 0,
      data=dict(builder="arithmetic", builder_kw=dict(
          train=500 if smoke else rows, test=1000, mix=mix, beyond=beyond)),
      batch=dict(tokens=640 if smoke else 6144, chunk=64 if smoke else 2048),
      optimizer=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=100, b2=0.98,
                     weight_decay=0.01),
      eval=dict(prompts=4 if smoke else 128, every=0 if smoke else 250, batch=4 if smoke else 32),
      checkpoint=dict(every=500),
      log_every=1 if smoke else 20,
  )
