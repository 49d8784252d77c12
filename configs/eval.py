"""Evaluates a Hugging Face folder or one of our workdirs on held-out prompts.

    python -m opd_jax.main --config=configs/eval.py --workdir=runs/eval \
      --config.student.source=workdir:runs/quickstart      # or hf:FOLDER, tiny:student ...

Accuracy as mean@8 and pass@8 at temperature 1 (greedy: --config.eval.temperature=0), and
the exact reverse KL to a teacher if one is named (--config.teacher.source=tiny:teacher).

    python -m opd_jax.main --config=configs/eval.py:gsm8k --workdir=runs/eval_gsm8k \
      --config.student.source=workdir:runs/gsm8k_quick

asks what configs/gsm8k_smollm2.py:quick asks, of any model. For its full form add
--config.rollout.max_prompt=256 --config.rollout.max_response=256. Rows of another JSONL
file: --config.data.builder_kw.train=FILE and .test=FILE. :svamp asks the same of SVAMP's word
problems (OPD_JAX_DATA/svamp/half.jsonl), which are shorter and of one step.

    EXTRAS=ifeval bash launch/env.sh
    OPD_JAX_DATA=DIR python -m opd_jax.main --config=configs/eval.py:ifeval --workdir=runs/ifeval \
      --config.student.source=hf:FOLDER      # or :ifbench

asks for instructions that a program checks (EVE's Figure 7): the share of prompts of which all are
followed, strictly, by one response a prompt at temperature 1 (loosely:
--config.verifier.name=instructions_loose). They are the parts of the benchmarks in OPD_JAX_DATA
(ifeval/half.jsonl, ifbench/half.jsonl), not comparable with published scores, and the longest
prompts are left out. The tiny models know no English: what they follow is chance.

:notes asks for notes about records, as the claims of EVE do, of any model of that study: by default
of its weak teacher, results/eve/stages/weak (evals/notes_mistakes.py says what is wrong with them).
"""

import os
import pathlib
import runpy

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "smoke", "gsm8k", "svamp", "ifeval", "ifbench", "notes")
  if form == "notes":
    return configs.evaluate(
        student=dict(source="hf:results/eve/stages/weak"), verifier=dict(name="notes"),
        data=dict(builder="notes", builder_kw=dict(kind="prompts", train=8, test=256)),
        rollout=dict(max_prompt=20, max_response=14),
        eval=dict(prompts=256, samples=8, ks=(1, 8), batch=64))
  if form in ("ifeval", "ifbench"):
    file = f"{os.environ.get('OPD_JAX_DATA', '.')}/{form}/half.jsonl"
    return configs.evaluate(
        student=dict(source="tiny:student"), verifier=dict(name="instructions"),
        data=dict(builder="instructions", builder_kw=dict(test=file, task=form)),
        rollout=dict(max_prompt=384, max_response=128),
        eval=dict(prompts=256 if form == "ifeval" else 96, samples=1, ks=(1,), batch=32))
  if form in ("gsm8k", "svamp"):
    file = pathlib.Path(__file__).with_name("gsm8k_smollm2.py")
    run = runpy.run_path(str(file))["get_config"]("quick").to_dict()
    if form == "svamp":
      rows = f"{os.environ.get('OPD_JAX_DATA', '.')}/svamp/half.jsonl"
      run["data"]["builder_kw"].update(train=rows, test=rows, task="svamp", response="")
    return configs.evaluate(
        student=dict(source="workdir:runs/gsm8k_quick"),
        teacher=dict(source=run["teacher"]["source"]),
        **{section: run[section] for section in ("data", "rollout", "verifier", "eval")})
  smoke = form == "smoke"
  return configs.evaluate(
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      data=dict(builder="arithmetic", builder_kw=dict(train=1, test=1000, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=16 if smoke else 80),
      eval=dict(prompts=4 if smoke else 256, batch=4 if smoke else 32),
  )
