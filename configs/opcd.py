"""OPCD: a weak critic guides a strong model (2606.00424; METHODS 5).

    python -m opd_jax.main --config=configs/opcd.py --workdir=runs/opcd

In every epoch the student answers the training questions, the weak model criticizes each answer,
the student refines it, and what led to a right answer joins the set that is learned from: the
student, without the critique, towards itself as it was, with it.

Forms: full (the default), 2 CPU cores: the models of the claims (configs/claims/opcd.py), from this
repository, from 56% to 85% of held-out questions in five epochs and two minutes (one run; in ten it
falls to 19%); quick, a minute of the shipped tiny models, which lose by OPCD as they have not
learned to read a critique of an attempt that they are not shown (tests/bench/README.md); smoke, for
the tests; paper, the paper's alignment setting: Phi-4-14B with Phi-4-mini as critic (fitted first
with configs/critic_sft.py:paper), 128 questions x 8 answers at a time, batches of 32, learning rate
1e-6. Phi-4's 16384 positions leave 8192 tokens for a question with its answer and critique. It
wants the models' folders and magpie.jsonl with the checks of IFEval; mesh, slots and micro-batches
are as for a v5p:2x2x4 (docs/compile_report.md).

Forms for the tiny models have no rubric check (filter="outcome"): no shipped one has learned to
judge. The paper's has both.
"""

from opd_jax import config as configs

# The loss is an exact KL over the vocabulary, so sampling may be narrowed.
LOSS = dict(surrogate="reverse_kl", aggregate="sequence_sum")
# The answers' and the refinements' sampling, as the paper has it.
ANSWER = dict(temperature=1.0, top_k=20, top_p=0.95)
EVAL = dict(temperature=0.6, top_k=20, top_p=0.95, samples=8, ks=(1, 8))


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.opcd(
        total_steps=2,
        questions=2500,
        student=dict(source="hf:phi-4"),
        critic=dict(source="workdir:runs/critic"),
        filter="both", rubric="configs/rubrics/critique.txt",
        model=dict(compute_dtype="bfloat16", remat="full"),
        data=dict(builder="instructions", builder_kw=dict(
            train="magpie.jsonl", test="ifeval.jsonl")),
        verifier=dict(name="instructions"),
        mesh=dict(model=2),
        rollout=dict(prompts=128, group_size=8, slots=64, max_prompt=4096, max_response=8192,
                     **ANSWER),
        context=dict(budget=8192, buckets=(4096,), tokens=1 << 17),
        critique=dict(max_response=2048),
        loss=dict(**LOSS, micro_batches=4),
        optimizer=dict(learning_rate=1e-6, weight_decay=0.01),
        eval=dict(prompts=256, every=1, **EVAL),
    )
  full = form == ""
  return configs.opcd(
      total_steps=5 if full else 2,
      questions=128 if full else 8,
      student=dict(source="hf:results/opcd/stages/strong" if full else "tiny:student"),
      critic=dict(source="hf:results/opcd/stages/critic" if full else "tiny:weak"),
      data=dict(builder="arithmetic", builder_kw=dict(
          train=2000 if full else 50, test=256, mix=dict(plain=1.0), seed=11,
          **dict(digits=(1,), min_steps=7, max_steps=8) if full else {})),
      rollout=dict(prompts=32 if full else 4, group_size=4 if full else 2, max_prompt=40,
                   max_response=80, **ANSWER),
      context=dict(budget=320, buckets=(160, 240) if full else ()),
      loss=LOSS,
      optimizer=dict(learning_rate=3e-5 if full else 1e-4, weight_decay=0.01),
      eval=dict(prompts=128 if full else 4, batch=32 if full else 4, every=1, **EVAL),
      checkpoint=dict(every=1),
      triples=32 if full else 4,
      updates=0 if full else 2,
  )
