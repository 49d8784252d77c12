"""The claims of MOPD (2605.12652; METHODS 4) on tiny models.

    python -m opd_jax.main --config=configs/claims/mopd.py --workdir=runs/claims_mopd

The tiny student learns from its own verified rollouts: by peers' contexts (MOPD, SDPO, every other
context, the controls), with its average, itself or its first self as the teacher, and by rewards
alone (GRPO, DPO, SimPO, SFT on successes). The cells are in results/mopd, the tables in RESULTS.md;
2 CPU cores, sittings of an hour, on any machine: no cell starts from another's weights.

Forms: full (the default); quick, minutes, the same cells of two steps and two seeds, with cells
and tables in the workdir; smoke, for the tests, fewer of them.
"""

from opd_jax import config as configs

# By form: updates of a cell, prompts a batch, responses a prompt.
SIZES = {"": dict(cell=40, prompts=8, group=8), "quick": dict(cell=2, prompts=2, group=4),
         "smoke": dict(cell=2, prompts=2, group=2)}

# The methods with peers: what each changes in the context, and whose parameters read it.
PEERS = dict(
    mopd={}, sdpo=dict(peers="success"),
    another_success=dict(peers="another_success"), failure=dict(peers="failure"),
    success_failure=dict(peers="success_failure"), all_successes=dict(peers="all_successes"),
    random_peers=dict(control="random"), unrelated=dict(control="unrelated"),
    successes_only=dict(control="successes"),
    random_tokens=dict(control="random", match="tokens"),
    unrelated_tokens=dict(control="unrelated", match="tokens"),
    successes_tokens=dict(control="successes", match="tokens"),
    summaries=dict(summary=40), feedback=dict(peers="plain", feedback="always"),
    frozen={}, current={}, trust_region={})
PARAMS = ("frozen", "current", "trust_region")
PEERS_LOSS = dict(surrogate="jsd", beta=0.5, top_k=100, top_of="student", tail="bucket",
                  divergence_importance=True, importance_cap=2.0)
# The methods of rewards alone: their losses.
REWARDS = dict(
    grpo=dict(signal="group_advantage", surrogate="clipped", clipped=dict(dual=3.0),
              updates_per_batch=2),
    dpo=dict(signal="dpo", aggregate="sequence_sum", dpo=dict(beta=0.1)),
    simpo=dict(signal="simpo", aggregate="sequence_mean", simpo=dict(beta=2.0, margin=1.0)),
    verified_sft=dict(signal="verified"))

ABOUT = """\
The student is `tiny:student` (0.3 million parameters), its own teacher; the task is worked modular
arithmetic of one and two digits. A cell makes {cell} batches of {prompts} prompts with {group}
responses each, and is evaluated on the same {asked} held-out prompts with {samples} samples each at
temperature 1. All methods sample the same number of responses, ask the same prompts in the same
order, and make one update a batch; GRPO makes two, as in `configs/grpo.py`. MOPD shows two
successes and a failure and asks the student's average (rate 0.05); SDPO shows one success; of the
others each row of the table says what differs from MOPD (the trust region is 95% the first
student's logits and 5% the present one's, `feedback` what the verifier says of a failed response
alone, `summaries` shows at most 40 tokens in each peer's place; controls equal MOPD's number of
peers, those called `_tokens` its length, as far as there are as many: those of successes alone show
half as many as MOPD, and 63% of their rollouts carry no loss where 5% of MOPD's do, as the contexts
of successes do in general; tests/bench/README.md). A context has at most 320 tokens, beyond which
peers are dropped, the longest first. A rollout whose context gained nothing carries no loss."""

NOTES = """\
The effects tested for are our choice, the smallest that we would call one: the paper's numbers are
of models ten thousand times as large (LiveCodeBench v6, 8B: 30.97 base, 43.65 GRPO, 49.49 SDPO,
61.82 MOPD), and not all of them are wins (AIME25, 4B: GRPO 25.80, MOPD 25.41, SDPO 7.81). Contexts,
controls and teachers have the learning rate of `mopd`, not tuned for them; SDPO, which is the
context of one success, has its own. MOPD gains hardly anything at any rate, and is best at the
smallest of the grid: a smaller one would have it learn less, so its rows stay provisional. That a
control ends below its start withholds no verdict.

There are few ways to write the right working of such a question down, and nobody is shown a peer
that wrote what he did himself: a rollout that is right mostly sees failures alone, one that is
wrong sees all that its row says. So it is for this task, under the rule of training, that which
context tells right responses from wrong ones cannot be said: hardly a right response has a right
peer of other words. `notebooks/03_teacher_signal.ipynb` shows copies too, and says what that is
worth: there all successes are best on seven of the eight metrics, two successes and a failure on
none (19 questions). With one update a batch the importance of a token is 1 but for rounding, and
its cap of 2 does nothing."""


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  full, smoke, sizes = form == "", form == "smoke", SIZES[form]
  asked, samples = (128, 4) if full else (8, 2)
  mean = f"eval/mean@{samples}"

  def method(kind, **changes):
    return kind(
        total_steps=sizes["cell"], log_every=1, export=False, evaluate_teachers=False,
        student=dict(source="tiny:student"),
        data=dict(builder="arithmetic", builder_kw=dict(
            train=20_000 if full else 64, test=256, mix=dict(plain=1.0), seed=7)),
        rollout=dict(prompts=sizes["prompts"], group_size=sizes["group"], max_prompt=40,
                     max_response=80),
        optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
        eval=dict(prompts=asked, samples=samples, ks=(1,), batch=32 if full else 8,
                  every=sizes["cell"] // 3 if full else 1),
        checkpoint=dict(every=100_000, keep_last=1, keep_best=0), writers=("jsonl",), **changes)

  def taught(name):
    params = name if name in PARAMS else "ema"
    return method(configs.peers, loss=PEERS_LOSS, teacher_params=params,
                  ema=dict(rate=0.05 if params == "ema" else 0.0),
                  context=dict(budget=320, buckets=(160, 240) if full else (), **PEERS[name]))

  def rewarded(name):
    anchor = dict(reference=dict(source="tiny:student")) if name == "dpo" else {}
    return method(configs.on_policy, teacher=dict(source=""), loss=REWARDS[name], **anchor)

  def above(text, b, paper="(our addition)", a="mopd", **changes):
    return dict(text=text, paper=paper, a=a, b=b, metric=mean, effect=0.02, **changes)

  harm = dict(may_fall=True)  # of wrong peers it is expected
  claims = dict(
      sdpo=above("MOPD > SDPO", "sdpo", "61.82 against 49.49", primary=True),
      grpo=above("MOPD > GRPO", "grpo", "61.82 against 43.65", primary=True),
      verified=above("MOPD > SFT on verified successes", "verified_sft", "above", primary=True),
      dpo=above("MOPD > DPO over the group's pairs", "dpo", "above", primary=True),
      simpo=above("MOPD > SimPO over the group's pairs", "simpo", "above"),
      another=above("2 successes + 1 failure > another success", "another_success", "best context"),
      failure=above("2 successes + 1 failure > a failure", "failure", "best context"),
      pair=above("2 successes + 1 failure > a success and a failure", "success_failure",
                 "best context"),
      all=above("2 successes + 1 failure > all successes", "all_successes", "best context"),
      feedback=above("2 successes + 1 failure > the verifier's word on one's own", "feedback",
                     "best context"),
      random=above("Verified peers > random peers, matched", "random_peers", "above", **harm),
      unrelated=above("Peers > texts of unrelated prompts, matched", "unrelated", "above",
                      **harm),
      successes=above("A failure helps: > successes only, matched", "successes_only", "above"),
      random_t=above("Verified peers > random peers, matched by tokens", "random_tokens", "above",
                     **harm),
      unrelated_t=above("Peers > texts of unrelated prompts, by tokens", "unrelated_tokens",
                        "above", **harm),
      successes_t=above("A failure helps: > successes only, by tokens", "successes_tokens",
                        "above"),
      summaries=above("Peers' texts > the student's summaries of them", "summaries"),
      frozen=above("The average as teacher > the student at the start", "frozen", "above"),
      current=above("The average as teacher > the student as it is", "current", "above"),
      trust=above("The average as teacher > a trust region's logits", "trust_region", "above"))
  few = ("mopd", "unrelated_tokens", "feedback", "grpo", "dpo", "verified_sft")  # of each kind
  names = few if smoke else (*PEERS, *REWARDS)
  primary = ("mopd", "sdpo", "grpo", "verified_sft", "dpo")
  tuned = ("mopd",) if smoke else (*primary, "simpo")
  return configs.claims(
      name="mopd", title="MOPD: learning from peers' successes and failures",
      about=ABOUT.format(asked=asked, samples=samples, **sizes), notes=NOTES,
      command=("python -m opd_jax.main --config=configs/claims/mopd.py"
               + (f":{form}" if form else "") + " --workdir=runs/claims_mopd"
               + (f"_{form}" if form else "")),
      results="results/mopd" if full else "", table="RESULTS.md" if full else "",
      methods={name: taught(name) if name in PEERS else rewarded(name) for name in names},
      seeds={name: tuple(range((10 if name in primary else 5) if full else 2)) for name in names},
      tune=dict(methods=tuned, grid=(1e-4, 3e-4, 1e-3, 3e-3) if full else (1e-3, 3e-3),
                seeds=(1000, 1001) if full else (1000,), metric=mean,
                follows={name: "mopd" for name in names if name not in (*tuned, "grpo")}
                | ({"grpo": "mopd"} if smoke else {})),
      claims={name: claim for name, claim in claims.items()
              if {claim["a"], claim["b"]} <= set(names)})
