"""The claims of EVE (METHODS 6), weak-to-strong learning from student demonstrations, on notes.

    python -m opd_jax.main --config=configs/claims/eve.py --workdir=runs/claims_eve

A weak model with a lead bias, fitted to preferences and aligned by DPO, teaches a strong one that
was pre-trained on notes of all styles (data/builders/notes). EVE's student learns K samples of the
strong base, weighted by the weak model's implicit reward; the others learn what the weak model
wrote, refinements of it, or the same samples by other rules. `rl` is GRPO on a weak reward
(appendix 9.4): a proxy reward model, of the weak model after its SFT, learns half of the gold
preferences and labels the other half; a second one, of the strong base, learns these labels, and
its rewards are what the student learns from. The cells are in results/eve, the tables in
RESULTS.md; 2 CPU cores, several sittings.

At every evaluation the weak models and the base are asked about the student's own samples
(`eval.scores`), and these are held against the weak teacher's (`eval.rival`), but for `rl`:
notebooks/06_weak_to_strong.ipynb draws the paper's figures 2 to 9 from that.

Forms: full (the default); once, the whole pipeline and each method with one seed, nothing tuned
(launch/weak_to_strong.sh); quick, minutes, the same of a few steps and two seeds; smoke, for the
tests, fewer of them. All but the full form leave cells and tables in the workdir.
"""

from opd_jax import config as configs

TINY = "opd_jax/tiny/teacher"  # whose tokenizer all have
PROMPT, FEW_SHOT, RESPONSE, ROW = 20, 72, 14, 34  # tokens; a row is prompt and response
LONG = FEW_SHOT + RESPONSE  # a row with two demonstrations
ROWS = 64  # responses a batch

# By form: updates of the base, of the reward model, of the weak model's SFT and DPO, and of the
# ceiling's; preferences; prompts that the student learns of; their responses K.
SIZES = {
    "": dict(base=1500, gold=300, weak=300, dpo=100, preferences=16_384, prompts=2048, k=4),
    "quick": dict(base=100, gold=20, weak=100, dpo=10, preferences=256, prompts=64, k=4),
    "smoke": dict(base=40, gold=2, weak=40, dpo=2, preferences=80, prompts=32, k=4),
}
ABOUT = """\
The weak teacher ({weak}) has learned from preferences about records of which 90% begin with what
matters, which invites a systematic error: to state what stands first instead of comparing. The
strong base ({strong}) was pre-trained on notes of 72 styles, never tuned to gold's (`base_alone`;
with two of gold's notes shown `base_few_shot`), and is shown two notes of the weak teacher when its
samples are drawn. Floor of PGR is the weak teacher (`weak`), ceiling the base after SFT and DPO on
true preferences about records in any order (`ceiling`). Every method makes as many updates as one
pass over {prompts} prompts with {k} responses each takes, {rows} responses an update, from the same
base at a constant rate; rewards are gold's on {test} held-out prompts with {samples} samples each,
0 that of the worst note and 1 that of the best."""

NOTES = """\
`sft` learns {k} samples of the weak teacher a prompt and not one, so that all methods have the same
number of responses and updates. `best` learns one of the base's, that of the greatest weak reward,
and `dpo` two, in the order of their weak rewards: they pass over these more often. In `refinement`
the base is shown one demonstration, and then the weak note on the record itself, before it writes
its own: a base that follows no instruction is not asked to do better, as in appendix 9.6. A
response that did not end is left out. The halves of the preferences that the proxy learns and
labels share half of their records, of which few begin with what matters. Seeds vary the order of
the rows alone: all share one weak teacher, one base and one set of samples. Points of the sweeps
have the learning rate of `eve`, `sft` or `dpo`; `strong_sft` is `ratio_0` tuned for itself; rates
were tuned on the prompts that are reported, with other seeds. `eve_k1` and `eve_k2` learn the first
one and two of each prompt's {k} samples, as often as `eve` does all. Weak teacher and ceiling are
not tuned: they are what the gap is measured by. The weak teacher's preferences are drawn by the
reward model `gold`, the ceiling's by the true rewards: on pairs drawn by these, which always
preferring the better note would get 82% of, `gold` is right as often as its row says.

The weak teacher's errors are systematic for the most part: of 8 responses a prompt the most
frequent has a reward of 68 points (64 to 71) where the mean has 57, and that of the ceiling 99. Two
of three of its spreads are wrong, it states facts that the record has not (-0.65 nats of truth;
ceiling -0.10), and 12% of its responses are no note. The lead bias that its data invite is there
and small: 7% of the facts that it states are of the head and not the greatest (6 to 9), of the
ceiling's 4% (3 to 4); the base's samples of any style have 22% (`configs/eval.py:notes` of
results/eve/stages, 256 prompts; notebooks/06_weak_to_strong.ipynb)."""


# Shares of the training after which students are evaluated, beside its end.
AT = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# The points of the sweeps; `eve` is in all of them.
RATIOS = dict(ratio_0=0.0, ratio_0p25=0.25, ratio_0p5=0.5, eve=1.0, ratio_2=2.0, ratio_4=4.0)
SCALES = {1: "", 2: "_x2", 4: "_x4"}
RESPONSES = dict(eve_k1=1, eve_k2=2, eve=4)
BETAS = dict(dpo_0p01=0.01, dpo=0.05, dpo_0p2=0.2)


def notes(kind, train, test=16, **changes):
  """The task's own rows; methods are evaluated on the same prompts whatever they learn."""
  return dict(builder="notes", builder_kw=dict(kind=kind, train=train, test=test, **changes))


def get_config(arg=""):
  form = configs.form(arg, "", "once", "quick", "smoke")
  full, sizes = form in ("", "once"), SIZES["" if form == "once" else form]
  strong, weak = "random:tiny_student", "random:tiny_weak"
  prompts, k = sizes["prompts"], sizes["k"]
  samples, most = 2, prompts * max(SCALES)
  mean = f"eval/mean@{samples}"
  tested = dict(eval_builder="notes", eval_builder_kw=dict(
      kind="prompts", train=8, test=256 if full else 16))
  rollout = dict(prompts=64 if full else 8, max_prompt=PROMPT, max_response=RESPONSE)
  few_shot = rollout | dict(max_prompt=FEW_SHOT)
  common = dict(verifier=dict(name="notes"), writers=("jsonl",))
  judged = dict(prompts=256 if full else 8, samples=samples, ks=(1,), batch=64 if full else 8)
  trained = dict(
      log_every=10, checkpoint=dict(every=250 if full else 10, keep_last=1, keep_best=0),
      batch=dict(tokens=ROW * ROWS, buckets=(ROW,), chunk=512 if full else 32), **common)

  def policy(source):
    """Another stage, or weights at random with the tokenizer that all have."""
    made = source.startswith("random:")
    return dict(source=source if made else f"stage:{source}", tokenizer=TINY if made else "")

  def responses(source, group=k, **changes):
    """Rows that a stage answers, or whose responses are chosen from."""
    return configs.responses(**dict(
        student=policy(source) if source else {}, rollout=rollout | dict(group_size=group),
        batch=dict(tokens=6144, buckets=(ROW, LONG), chunk=256 if full else 32),
        **common) | changes)

  def made(stage, rows=0, skip=0, responses=0):
    """What a stage has made, all or some rows of it, with all or some of their responses."""
    return dict(builder="rows", builder_kw=dict(train=f"stage:{stage}", skip=skip, rows=rows,
                                                responses=responses))

  def learned(source, steps, objective, data, rate, **changes):
    """Offline learning of rows; the rate falls to 0, unless `changes` say otherwise."""
    loss = dict(objective=objective) | changes.pop("loss", {})
    evaluated = judged | changes.pop("eval", {})
    return configs.offline(**dict(
        total_steps=steps, student=policy(source), data=data | tested, loss=loss, eval=evaluated,
        optimizer=dict(learning_rate=rate, schedule="cosine", warmup_steps=10, b2=0.98),
        rollout=rollout, export=True, **trained) | changes)

  def rewarding(source, data):
    """A reward model; how often it is right is seen on true pairs about records in any order."""
    return configs.reward_model(
        total_steps=sizes["gold"], student=policy(source), writers=("jsonl",), log_every=10,
        data=data, batch=dict(tokens=2 * ROW * ROWS, buckets=(ROW,), chunk=1024 if full else 32),
        optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup_steps=20, b2=0.98),
        eval=dict(prompts=512 if full else 16), checkpoint=trained["checkpoint"], **lenient)

  def aligned(source, data, **changes):
    """DPO of a model that has learned by SFT, which is its reference."""
    return learned(source, sizes["dpo"], "dpo", data, 3e-4, reference=policy(source),
                   loss=dict(dpo=dict(beta=0.1)), **changes)

  def student(objective, data, scale=1, **changes):
    """The base after as many updates as one pass over scale * prompts groups of k takes."""
    rate = changes.pop("rate", 1e-3)
    return learned("base", scale * prompts * k // ROWS, objective, data, rate, export=False,
                   optimizer=dict(learning_rate=rate, warmup_steps=1, b2=0.98),
                   eval=dict(at=AT, rival=dict(rows="stage:weak_answers"), scores=dict(
                       weak=policy("weak"), weak_reference=policy("weak_sft"),
                       base=policy("base"))), **changes)

  def on_reward(stage, rate=1e-3):
    """GRPO of the base by a reward model, with as many updates and rows an update as `student`."""
    return configs.rewarded(
        total_steps=prompts * k // ROWS, student=policy("base"), reference=policy("base"),
        data=made("labels", prompts) | tested, reward=dict(source=f"stage:{stage}", **lenient),
        rollout=rollout | dict(prompts=ROWS // k, group_size=k),
        loss=dict(signal="group_advantage", reference_kl=0.04),
        optimizer=dict(learning_rate=rate, warmup_steps=1, b2=0.98), export=False,
        eval=judged | dict(at=AT), batch=dict(tokens=ROW * ROWS, buckets=(ROW,)),
        checkpoint=trained["checkpoint"], log_every=1, **common)

  def weighted(stage, ratio=1.0, anchor="weak_reference_logprob", wanted="weak_logprob", scale=1,
               responses=k):
    """EVE's objective; with ratio 0 all responses count alike."""
    return student("eve", made(stage, scale * prompts, responses=responses), scale,
                   rollout=rollout | dict(group_size=responses),
                   loss=dict(eve=dict(ratio=ratio, fields=(wanted, anchor))))

  asked = dict(data=notes("prompts", 64 + most), skip=64, prompts=most)
  errors = dict(slips=(0, 1, 2, 3, 4))
  lenient = dict(min_accuracy=0.55 if full else 0.0)
  half = sizes["preferences"] // 2
  pairs_tested = dict(eval_builder="notes", eval_builder_kw=dict(
      kind="preferences", train=8, test=1000, **errors))
  weak_scores = dict(weak_logprob=policy("weak"), weak_reference_logprob=policy("weak_sft"))
  stages = dict(
      gold=rewarding(strong, notes("preferences", 40_000 if full else 64, 1000, **errors)),
      preferences=responses(
          "", data=notes("preferences", sizes["preferences"], lead=0.9, **errors),
          keep="drawn_pair", reward=dict(source="stage:gold", **lenient)),
      weak_sft=learned(weak, sizes["weak"], "sft", made("preferences"), 3e-3),
      weak=aligned("weak_sft", made("preferences")),
      base=learned(
          strong, sizes["base"], "sft", notes("pretrain", 200_000 if full else 200, shots=0.5),
          3e-3, **dict(batch=dict(tokens=LONG * ROWS if full else 8 * LONG, buckets=(ROW, LONG),
                                  chunk=2048 if full else 32))),
      # First: it is what a method starts from.
      base_alone=configs.evaluate(student=policy("base"), data=notes("prompts", 8, 256),
                                  rollout=rollout, eval=judged, **common),
      base_few_shot=configs.evaluate(
          student=policy("base"), data=notes("prompts", 8, 256, shots=1.0), rollout=few_shot,
          eval=judged, **common),
      ceiling_sft=learned("base", sizes["weak"], "sft", notes(
          "preferences", 16_384 if full else 80, **errors), 1e-3),
      ceiling=aligned("ceiling_sft", notes("preferences", 16_384 if full else 80, **errors)),
      demonstrations=responses("weak", 1, data=asked["data"], prompts=64),
      labels=responses("weak", **asked, scores=dict(
          strong_logprob=policy("base"), weak_reference_logprob=policy("weak_sft"))),
      samples=responses("base", **asked, scores=weak_scores,
                        shots=dict(rows="stage:demonstrations"),
                        rollout=few_shot | dict(group_size=k)),
      # One demonstration, and the weak note on the record itself in the place of the other: as
      # long and of the same form as all that the base has been shown.
      refined=responses("base", **asked | dict(prompts=prompts),
                        shots=dict(rows="stage:demonstrations", number=1),
                        refine=dict(rows="stage:labels"), rollout=few_shot | dict(group_size=k)),
      # What the weak teacher writes where all are tested: the rival of the win rate.
      weak_answers=responses("weak", 1, data=dict(
          builder="notes", builder_kw=tested["eval_builder_kw"], train_split="test")),
      proxy=rewarding("weak_sft", made("preferences", half) | pairs_tested),
      weak_labels=responses("", data=made("preferences", skip=half), keep="ranked_pair",
                            reward=dict(source="stage:proxy", **lenient)),
      weak_reward=rewarding("base", made("weak_labels") | pairs_tested),
      best=responses("", data=made("samples", prompts), keep="best",
                     reward=dict(source="implicit")),
      pairs=responses("", data=made("samples", prompts), keep="ranked_pair",
                      reward=dict(source="implicit")))
  methods = dict(
      sft=weighted("labels", 0.0), eve=weighted("samples"),
      refinement=weighted("refined", 0.0),
      **{name: student("dpo", made("pairs"), rate=3e-4, reference=policy("base"),
                       loss=dict(dpo=dict(beta=beta))) for name, beta in BETAS.items()},
      best=student("sft", made("best"), loss=dict(aggregate="sequence_sum")),  # as of the others
      rl=on_reward("weak_reward"),
      strong_sft=weighted("samples", 0.0),
      weighted_labels=weighted("labels", wanted="strong_logprob"),
      bayes=weighted("samples", anchor=""),
      **{name: weighted("samples", ratio) for name, ratio in RATIOS.items()
         if name.startswith("ratio")},
      **{name: weighted("samples", responses=number) for name, number in RESPONSES.items()
         if number < k},
      **{f"{name}{suffix}": weighted(stage, ratio, scale=scale)
         for name, stage, ratio in (("sft", "labels", 0.0), ("eve", "samples", 1.0))
         for scale, suffix in SCALES.items() if suffix})
  tuned = ("sft", "eve", "refinement", "dpo", "best", "rl", "strong_sft", "weighted_labels")
  seeds = dict.fromkeys(methods, 5) | dict(sft=10, eve=10)

  def recovered(text, a, b, paper, effect=0.05, **changes):
    return dict(text=text, paper=paper, kind="recovered", a=a, b=b, metric=mean, effect=effect,
                before="weak", after="ceiling", **dict(paired=False) | changes)

  claims = dict(
      sft=recovered("EVE > SFT on weak labels", "eve", "sft", "up to 25 points of PGR", 0.25,
                    primary=True),
      refinement=recovered("EVE > Refinement", "eve", "refinement", "EVE is best"),
      dpo=recovered("EVE > DPO on the weak reward", "eve", "dpo", "EVE is best"),
      rl=recovered("EVE > RL on the weak reward", "eve", "rl", "EVE is best"),
      unweighted=recovered("EVE > SFT on the same samples without weights", "eve", "strong_sft",
                           "the weights matter (ratio 0 is worse)", paired=True),
      best=recovered("EVE > SFT on the best of K by the weak reward", "eve", "best",
                     "one-hot weights are worse"),
      labels=recovered("Weak samples weighted by the strong base > SFT on them (11.1)",
                       "weighted_labels", "sft", "above SFT"),
      low=recovered("Weights of ratio 1 > of ratio 1/4", "eve", "ratio_0p25",
                    "near 1 is near-optimal", paired=True),
      high=recovered("Weights of ratio 1 > of ratio 4", "eve", "ratio_4",
                     "near 1 is near-optimal", paired=True),
      more=recovered("EVE gains by four times the prompts", "eve_x4", "eve", "EVE scales"),
      less=recovered("SFT on weak labels loses by four times the prompts", "sft", "sft_x4",
                     "SFT falls"),
      responses=recovered("EVE gains by four samples a prompt for one", "eve", "eve_k1",
                          "EVE scales"),
      beyond=dict(text="DPO falls from its peak (over-optimization), EVE does not",
                  paper="DPO loses as KL grows, EVE does not", a="dpo", b="eve",
                  metric="curve/fall", effect=0.02, paired=False),
      peak=dict(text="SFT is at its peak early in the epoch, EVE is not",
                paper="SFT within the first 10%", a="sft", b="eve", metric="curve/peak",
                effect=-0.4, paired=False),
      fall=dict(text="SFT falls from its peak, EVE does not", paper="SFT declines, EVE hardly",
                a="sft", b="eve", metric="curve/fall", effect=0.02, paired=False,
                primary=True))
  if form in ("once", "quick"):
    methods = {name: methods[name] for name in tuned}
    claims = {name: claim for name, claim in claims.items()
              if {claim["a"], claim["b"]} <= methods.keys()}
    tuned = tuned[:2] if form == "quick" else ()
  if form == "smoke":
    tuned = ("eve",)
    methods = {name: methods[name] for name in ("sft", "eve", "dpo", "refinement", "rl")}
    claims = {name: claims[name] for name in ("sft", "dpo", "fall")}
    for name in ("best", "base_few_shot"):
      del stages[name]

  def sweep(text, parameter, points, paper):
    """`points`: method -> value."""
    return dict(text=text, paper=paper, parameter=parameter, points=tuple(points.values()),
                methods=tuple(points), metrics=(mean, *{
                    "beta": ("eval/win_rate", "eval/k3/base"),
                    "prompts": ("curve/fall", "curve/peak")}.get(
                        parameter, ("loss/effective_responses", "eval/win_rate", "eval/k3/base"))))

  sweeps = dict(
      ratio=sweep("beta / lambda: from no weights to nearly one response", "beta / lambda",
                  RATIOS, "best near 1"),
      beta=sweep("DPO on the weak reward: how far it may go from the base", "beta", BETAS,
                 "wins are lost as KL grows (over-optimization), and not by EVE"),
      responses=sweep("EVE with more samples a prompt", "K", RESPONSES, "EVE gains"),
      eve_data=sweep("EVE with more prompts", "prompts", {
          f"eve{suffix}": scale * prompts for scale, suffix in SCALES.items()}, "EVE gains"),
      sft_data=sweep("SFT with more prompts", "prompts", {
          f"sft{suffix}": scale * prompts for scale, suffix in SCALES.items()}, "SFT falls"))
  suffix = f":{form}" if form else ""
  return configs.claims(
      name="eve", title="EVE: weak to strong by student demonstrations and teacher evaluation",
      about=ABOUT.format(strong=strong, weak=weak, prompts=prompts, k=k, rows=ROWS,
                         test=judged["prompts"], samples=samples), notes=NOTES.format(k=k),
      command=f"python -m opd_jax.main --config=configs/claims/eve.py{suffix} "
              f"--workdir=runs/claims_eve{suffix.replace(':', '_')}",
      results="" if form else "results/eve", table="" if form else "RESULTS.md",
      stages=stages, methods=methods,
      seeds={name: tuple(range({"": seeds[name], "once": 1}.get(form, 2))) for name in methods},
      tune=dict(methods=tuned, grid=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3) if full else (1e-3,),
                seeds=(1000, 1001) if full else (1000,), metric=mean,
                follows={name: next((who for who in ("sft", "dpo") if name.startswith(who)
                                     and who in tuned), "eve")
                         for name in methods if tuned and name not in tuned}),
      claims=claims, sweeps={name: sweep for name, sweep in sweeps.items()
                             if form == ""})
