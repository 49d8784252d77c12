"""How unlike a run's responses to one prompt are, by the metrics of MOPD (METHODS 4).

    python -m opd_jax.main --config=configs/diversity.py --workdir=runs/diversity \\
      --config.runs="('runs/mopd@step_000000', 'runs/mopd', 'runs/grpo')"

Evaluations of the same prompts side by side, "WORKDIR" its last or "WORKDIR@NAME", and what each
differs by from the first: pass@k, self-BLEU, edit distance, distinct-n, the share of unique texts,
of all responses and of the right ones alone; with --config.programs=True the distance of syntax
trees too. Without runs the student answers first.

Forms: full (the default), the tiny student on 128 questions with 8 answers each; smoke.
"""

from opd_jax import config as configs


def get_config(arg=""):
  full = configs.form(arg, "", "smoke") == ""
  return configs.diversity(
      student=dict(source="tiny:student"), ks=(1, 2, 4, 8) if full else (1, 2),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(max_prompt=40, max_response=80),
      eval=dict(prompts=128 if full else 4, batch=16 if full else 4, samples=8 if full else 2,
                ks=(1,)))
