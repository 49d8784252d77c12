"""GKD: whole distributions compared on a mixture of the student's responses and the data's.

    python -m opd_jax.main --config=configs/gkd.py --workdir=runs/gkd

With probability student_share (GKD's lambda) a batch has the student's own responses, else those
of the data set. The divergence is loss.surrogate: "jsd" with loss.beta between the models' mixture
weights, "forward_kl", "reverse_kl"; with loss.top_k over the most likely tokens alone.
With loss.top_of="teacher" too, teacher_cache=DIR keeps the teacher's words on the data's responses.

Forms: full (the default), the tiny models on 2 CPU cores; quick, seconds of the same; smoke, for
the tests; paper, the middle of the grid of "On-Policy Distillation of Language Models", lambda 0.5
and JSD(0.5), with Qwen3-4B towards an expert of its own size, 1024 prompts with one response each
of up to 16384 tokens and a constant 1e-5, as configs/opd.py:paper: that paper's own models are T5,
which models/ does not have. problems.jsonl must bring worked solutions.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  loss = dict(surrogate="jsd", beta=0.5)
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-4B"),
        teacher=dict(source="hf:Qwen3-4B-expert"),
        student_share=0.5,
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer",
            response="solution")),
        rollout=dict(prompts=1024, group_size=1, max_prompt=2048, max_response=16384),
        loss=dict(**loss, micro_batches=8),
        optimizer=dict(learning_rate=1e-5),
        verifier=dict(name="math_answer"),
        eval=dict(prompts=128, every=50),
        checkpoint=dict(every=10),  # that many steps take half an hour and more
    )
  full = form == ""
  return configs.on_policy(
      total_steps={"": 200, "quick": 10, "smoke": 2}[form],
      student=dict(source="tiny:student"),
      teacher=dict(source="tiny:teacher"),
      student_share=0.5,
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=40, max_response=80),
      loss=loss,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
