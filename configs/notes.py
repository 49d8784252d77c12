"""Notes about records: the task of the weak-to-strong experiments, learned from what is given.

    python -m opd_jax.main --config=configs/notes.py --workdir=runs/notes
    python -m opd_jax.main --config=configs/notes.py:base --workdir=runs/notes_base

The task, its gold reward and the design are in data/builders/notes and verifiers/notes.py. Forms:
the default fits a model without any training to the best notes, a check that they can be learned;
base pre-trains the strong model on notes of all styles, with two demonstrations in the prompt or
without. eval/mean@4 is the mean gold reward on test prompts, 0 that of the worst note and 1 that of
the best; pass@1 counts the best alone (base: with two demonstrations).
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "base", "smoke")
  smoke, base = form == "smoke", form == "base"
  data = lambda kind, **kw: dict(builder="notes", builder_kw=dict(
      kind=kind, train=200 if smoke else 200_000, test=512, **kw))
  common = dict(
      batch=dict(tokens=688 if smoke else 5504 if base else 2176,
                 buckets=(34, 86) if base else (34,), chunk=64 if smoke else 2048),
      optimizer=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=50, b2=0.98),
      log_every=1 if smoke else 20,
  )
  return configs.offline(
      total_steps=2 if smoke else 1500 if base else 700,
      student=dict(source="random:tiny_teacher" if base else "random:tiny_student",
                   tokenizer="opd_jax/tiny/teacher"),
      data=data("pretrain", shots=0.5) if base else data("sft"),
      rollout=dict(max_prompt=72 if base else 20, max_response=14),
      verifier=dict(name="notes"),
      eval=dict(prompts=4 if smoke else 256, samples=4, ks=(1,), batch=4 if smoke else 64,
                every=0 if smoke else 500 if base else 100),
      checkpoint=dict(every=500 if base else 100, best_metric="eval/mean@4"),
      **common,
  )
