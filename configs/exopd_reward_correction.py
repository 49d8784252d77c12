"""ExOPD with reward correction: the reference is the teacher before its reinforcement learning.

    python -m opd_jax.main --config=configs/grpo.py --workdir=runs/expert \
      --config.student.source=tiny:teacher --config.optimizer.learning_rate=5e-5
    python -m opd_jax.main --config=configs/exopd_reward_correction.py --workdir=runs/corrected

Strong to weak: teacher and student differ in size, so that log q - log b is what the teacher's own
training rewarded only if b is the model that it was trained from. It costs a forward pass of the
teacher's size at every step. With --config.reference.source=tiny:student it is plain ExOPD. (The
larger model loses what it can at the rate that configs/grpo.py has for the small one.)

Forms: full (the default), the tiny student and the expert that the first command makes of the tiny
teacher; quick, seconds with the shipped teacher and weak model in the places of the expert and its
base; smoke, for the tests; paper, the setting of "Learning beyond Teacher" (METHODS 2): Qwen3-1.7B
towards an expert of 4B, the reference being Qwen3-4B, from which that was trained; 1024 prompts
with one response each of up to 16384 tokens, 3 epochs, a constant 1e-5, lam = 1.25.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  loss = dict(signal="g_opd", lam=1.25, surrogate="score_function")
  if form == "paper":
    return configs.on_policy(
        total_steps=500,
        student=dict(source="hf:Qwen3-1.7B"),
        teacher=dict(source="hf:Qwen3-4B-expert"),
        reference=dict(source="hf:Qwen3-4B"),
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="jsonl", builder_kw=dict(
            train="problems.jsonl", test="held_out.jsonl", question="question", answer="answer")),
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
      teacher=dict(source="workdir:runs/expert" if full else "tiny:teacher"),
      reference=dict(source="tiny:teacher" if full else "tiny:weak"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=20_000 if full else 200, test=256, mix=dict(plain=1.0), seed=7)),
      rollout=dict(prompts=64 if full else 4, group_size=1, max_prompt=40, max_response=80),
      loss=loss,
      optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=50 if full else 0),
      checkpoint=dict(every=50),
      log_every=5 if full else 1,
  )
