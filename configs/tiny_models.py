"""The tiny models that ship in opd_jax/tiny: teacher, student and weak.

    python -m opd_jax.main --config=configs/tiny_models.py:teacher --workdir=runs/tiny_teacher
    python -m opd_jax.main --config=configs/tiny_models.py:weak --workdir=runs/tiny_weak
    python -m opd_jax.main --config=configs/tiny_models.py:student --workdir=runs/tiny_student

Each learns step-by-step modular arithmetic (data/builders/arithmetic) from worked
solutions, and to use what a context offers: peers' solutions, marked failures, critiques.
The weak model is taught to read contexts whose numbers are beyond it, and can hardly compute;
the student is the weak model with some arithmetic learnt, stopped in the middle so that there
is something left to be taught. Copy each run's export/ to opd_jax/tiny/NAME.

Their tokenizer, in opd_jax/tiny/teacher, was learned from such rows by the teacher's run, with
--config.tokenizer_vocab=320 --config.student.tokenizer=. The shipped teacher is older than the
present wording of critiques, which it hardly uses; a new one will differ from it.
"""

from opd_jax import config as configs

# Per model: where it starts, updates, schedule, kinds of rows, and the share of the rows with
# a context that only the context can answer.
RECIPES = {
    "teacher": ("random:tiny_teacher", 2000, "cosine",
                dict(plain=0.3, peers=0.3, refine=0.2, critic=0.2), 0.4),
    "weak": ("random:tiny_student", 2500, "constant",
             dict(plain=0.15, peers=0.25, refine=0.45, critic=0.15), 0.8),
    "student": ("workdir:runs/tiny_weak", 800, "constant",
                dict(plain=0.25, peers=0.15, failures=0.2, refine=0.35, critic=0.05), 0.4),
}


def get_config(arg="teacher"):
  smoke = configs.form(arg, "smoke", *RECIPES) == "smoke"
  source, steps, schedule, mix, beyond = RECIPES["teacher" if smoke else arg]
  return configs.offline(
      total_steps=2 if smoke else steps,
      student=dict(source=source, tokenizer="" if smoke else "opd_jax/tiny/teacher"),
      tokenizer_vocab=320 if smoke else 0,
      data=dict(builder="arithmetic", builder_kw=dict(
          train=500 if smoke else 300_000, test=1000, mix=mix, beyond=beyond)),
      batch=dict(tokens=640 if smoke else 6144, chunk=64 if smoke else 2048),
      optimizer=dict(learning_rate=3e-3, schedule=schedule, warmup_steps=100, b2=0.98,
                     weight_decay=0.01),
      eval=dict(prompts=4 if smoke else 128, every=0 if smoke else 250, batch=4 if smoke else 32),
      checkpoint=dict(every=250),
      log_every=1 if smoke else 20,
  )
