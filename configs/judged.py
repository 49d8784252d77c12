"""Which of two sets of responses a judge prefers: AlpacaEval's win rates (2404.04475).

    python -m opd_jax.main --config=configs/judged.py:endpoint --workdir=runs/judged \
      --config.a.source=runs/quickstart --config.a.evaluation=step_000200 \
      --config.b.source=runs/quickstart --config.b.evaluation=step_000000 \
      --config.endpoint.url=http://localhost:8000/v1/chat/completions --config.endpoint.model=NAME

a and b are what any evaluation left in its workdir, or files of rows such as
runs/strong_samples/rows.jsonl, to the same prompts. Each pair is shown once, in an order drawn from
the seed; every judgement is a line of judgements.jsonl, and the same command goes on where it was
stopped. Shown are the win rate, the length-controlled win rate, how often the response shown first
was preferred, and what could not be read. The key of an endpoint is read from the environment
variable OPENAI_API_KEY (endpoint.key_variable names another, or '' for none) and written nowhere.

Forms: full (the default), a local model judges: the tiny teacher, 128 responses of the tiny student
against the data's own, on CPU, which shows how it runs and no more: no tiny model has learned to
judge. Name another by --config.judge.source=hf:FOLDER, with --config.context.budget as long as its
requests. endpoint, a model behind a chat-completions URL judges; smoke, for the tests.
"""

import pathlib

from opd_jax import config as configs

RUBRIC = pathlib.Path(__file__).with_name("rubrics") / "preference.txt"


def get_config(arg=""):
  form = configs.form(arg, "", "endpoint", "smoke")
  smoke = form == "smoke"
  return configs.judged(
      rubric=str(RUBRIC),
      judge=dict(source="" if form == "endpoint" else "tiny:teacher"),
      student=dict(source="tiny:student"),
      data=dict(builder="arithmetic", builder_kw=dict(train=1, test=256, mix=dict(plain=1.0))),
      rollout=dict(max_prompt=40, max_response=16 if smoke else 80),
      eval=dict(prompts=4 if smoke else 128, batch=4 if smoke else 16, samples=1, ks=(1,)),
  )
