"""Preferences of a reward model: pairs of responses, the better one drawn by its rewards.

    python -m opd_jax.main --config=configs/preferences.py --workdir=runs/preferences

EVE's second stage, after configs/reward_model.py: of the pairs that the data bring, the first is
preferred with probability sigmoid(r1 - r2), and comes first in rows.jsonl, as `response` and
`chosen`; configs/weak_teacher.py learns of them. Most of the records begin with what matters.

Forms: full (the default), of runs/reward_model; quick, a few pairs; smoke, for the tests, by the
verifier's rewards; paper, appendix 9.2: the posts of TL;DR, of a reward model of Llama-3.1-8B.
"""

from opd_jax import config as configs


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke", "paper")
  if form == "paper":
    return configs.responses(
        data=dict(builder="jsonl", builder_kw=dict(
            train="pairs.jsonl", question="prompt", answer="id", chosen="chosen",
            rejected="rejected")),
        rollout=dict(max_prompt=1024, max_response=1024), keep="drawn_pair",
        reward=dict(source="runs/reward_model"),
        batch=dict(tokens=128 * 1024, buckets=(512, 768, 1024)))
  full, smoke = form == "", form == "smoke"
  return configs.responses(
      data=dict(builder="notes", builder_kw=dict(
          kind="preferences", train=16_384 if full else 64, test=8, lead=0.9,
          slips=(0, 1, 2, 3, 4))),
      rollout=dict(prompts=64 if full else 8, max_prompt=20, max_response=14), keep="drawn_pair",
      reward=dict(source="verifier") if smoke else dict(source="runs/reward_model"),
      batch=dict(tokens=272 if smoke else 6144, buckets=(34,), chunk=256 if full else 32),
      verifier=dict(name="notes"),
      writers=("jsonl",))
