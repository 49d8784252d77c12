"""The claims of OPCD (2606.00424; METHODS 5) on tiny models.

    python -m opd_jax.main --config=configs/claims/opcd.py --workdir=runs/claims_opcd

S is the tiny student, W the tiny weak model, fitted first to this task and to worked critiques of
it. At inference: answer, critique, refinement, by pass@k. In training: OPCD with its filters and
controls, and what else the same weak model or the truth could teach, on the same questions with as
many updates. The cells are in results/opcd, the tables in RESULTS.md; 2 CPU cores, sittings of an
hour.

Forms: full (the default); quick, minutes, the same cells of one epoch and two seeds, with cells and
tables in the workdir; smoke, for the tests, fewer of them.
"""

import pathlib

from opd_jax import config as configs

RUBRIC = str(pathlib.Path(__file__).parents[1] / "rubrics" / "short.txt")

# By form: updates of the SFT of S, critic and judges; epochs, questions and answers each of OPCD;
# triples and other rows an update; chains of the study; prompts and samples of evaluations.
SIZES = {
    "": dict(strong=300, critic=300, judge=600, epochs=4, questions=128, answers=4, rows=32,
             ks=(1, 2, 4, 8, 16), prompts=128, samples=4),
    "quick": dict(strong=4, critic=4, judge=4, epochs=1, questions=8, answers=4, rows=4, ks=(1, 2),
                  prompts=4, samples=2),
    "smoke": dict(strong=2, critic=2, judge=2, epochs=1, questions=4, answers=4, rows=4, ks=(1, 2),
                  prompts=2, samples=2),
}
# Chains of seven and eight steps in one digit, of which the shipped S answers about 46% and W 9%.
TASK = dict(digits=(1,), min_steps=7, max_steps=8)
ANSWER = dict(temperature=1.0, top_k=20, top_p=0.95)
REFINE = dict(temperature=0.6, top_k=20, top_p=0.95)

ABOUT = """\
S is `tiny:student` after {strong} updates of SFT on shorter or harder arithmetic behind critiques
(`data/builders/critiqued.py`), half of them without the attempt; W is `tiny:weak` after {critic}
updates of SFT on worked solutions and critiques of this very task, arithmetic of seven and eight
steps in one digit, and is the weak model of every row: what it answers itself is "W only" of
`chains`, which asks {prompts} questions {chains} times each. A cell of OPCD has {epochs} epochs of
{questions} questions with {answers} answers each, and makes {updates} updates an epoch of {rows}
rows out of all that has stood its check so far; `opcd` keeps what was refined to a right answer,
`rubric` what a judge says yes to, `both` what stands both, `unfiltered` everything. The judge is
`tiny:teacher` after {judge} updates of SFT on right and misleading critiques; its AUC against the
outcome is `judge/auc`. `self` has S criticize itself; `without` has it refine without a critique,
with half as many answers more, which asks as often. All learn the same questions with as many
updates, and are evaluated on the same {prompts} held-out ones with {samples} samples each, at
temperature 0.6, top-k 20 and top-p 0.95, on plain questions, before, after and, those of OPCD,
behind every epoch."""

NOTES = """\
W is fitted first because the shipped one's critiques mislead: S with them is below S alone (README,
"A weak critic at inference time"). S is, because the shipped one has read critiques beside the
attempt alone, and its teacher is not shown the attempt: behind W's critique it answers 36% where it
answers 47% plainly, 50% and 53% of those kept, and OPCD, which learns what it does there, lost by
its last epoch more than its first had gained (one seed at three rates, not kept). After these rows
S answers 44% plainly and 48% behind the critique, 60% and 78% of those kept (`python
tests/bench/self_teacher.py runs/claims_opcd` behind a sitting; tests/bench/README.md). The judge
has learned from labels that the truth made, and is the strongest model here; that of `weak_judged`
has learned the same from `tiny:weak`. In `self` S criticizes without the practice that W has had;
in `without` its teacher sees the question with the request to solve it again, a request without a
critique that it has never learned to follow, so that row says little. The chains are sampled at
temperature 1 throughout. `unfiltered`, `rubric` and the weak model's answers and logits are claimed
to do harm, or to do less than nothing: that they end below their start withholds no verdict.

W has been fitted to this very task, S has not: that W's logits, on what S itself writes, teach more
than its critiques may be for that. What the other methods are given is not what OPCD is: SFT on the
truth has worked solutions, one a question, in {steps} batches, the weak model's answers and logits
as many, and none of them pays for critiques. Filters and controls have the rate tuned for `opcd`,
the weak model's answers that of SFT on the truth, its logits that of `opcd`."""


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  full, smoke, sizes = form == "", form == "smoke", SIZES[form]
  epochs, rows, k = sizes["epochs"], sizes["rows"], max(sizes["ks"])
  updates = sizes["questions"] * sizes["answers"] // rows  # of an epoch: as many rows as answers
  steps, questions = epochs * updates, sizes["questions"]
  judged = dict(prompts=sizes["prompts"], samples=sizes["samples"], ks=(1,), seed=1,
                batch=32 if full else 2, **REFINE)
  task = lambda train, **kind: dict(builder="arithmetic", builder_kw=dict(
      train=train if full else min(train, 40), test=256, mix=dict(**kind), seed=11, **TASK))
  lengths = dict(max_prompt=40, max_response=80 if full else 16)
  common = dict(writers=("jsonl",), checkpoint=dict(every=100_000, keep_last=1, keep_best=0),
                eval=judged, export=False)
  optimizer = lambda rate: dict(learning_rate=rate, weight_decay=0.01)

  def opcd(answers=sizes["answers"], **changes):
    loss = dict(surrogate="reverse_kl", aggregate="sequence_sum") | changes.pop("loss", {})
    return configs.opcd(**common | dict(
        total_steps=epochs, log_every=1, questions=questions, triples=rows, updates=updates,
        student=dict(source="stage:strong"), critic=dict(source="stage:critic"),
        data=task(questions, plain=1.0), loss=loss, optimizer=optimizer(1e-4), refine=REFINE,
        rollout=dict(prompts=32 if full else 2, group_size=answers, **lengths, **ANSWER),
        context=dict(budget=320, buckets=(160, 240) if full else ()),
        eval=judged | dict(every=1)) | changes)

  def checked(name, judge="judge"):
    """OPCD with a judge's word, alone or beside the outcome."""
    return opcd(filter=name, rubric=RUBRIC, judge=dict(source=f"stage:{judge}"))

  def given(**changes):
    """SFT, of the data's worked solutions or of a teacher's answers."""
    return configs.offline(**common | dict(
        total_steps=steps, log_every=max(steps // 10, 1), student=dict(source="stage:strong"),
        data=task(questions, plain=1.0),
        rollout=dict(prompts=32 if full else 2, group_size=1, **lengths),
        batch=dict(tokens=128 * rows, buckets=(128,), chunk=256 if full else 8),
        optimizer=optimizer(1e-4)) | changes)

  def fitted(source, steps, data):
    """A model after SFT."""
    return configs.offline(**common | dict(
        total_steps=steps, log_every=10, export=True, student=dict(source=source), data=data,
        rollout=dict(max_prompt=200, max_response=96),
        batch=dict(tokens=6144 if full else 800, buckets=(160, 256, 400),
                   chunk=2048 if full else 16),
        optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=20, b2=0.98)))

  asked = task(1, plain=1.0)
  reading = dict(builder="critiqued", builder_kw=dict(train=20_000 if full else 40, test=8),
                 eval_builder=asked["builder"], eval_builder_kw=asked["builder_kw"])
  judging = task(20_000, judge=1.0)
  judging["builder_kw"] |= dict(rubric=RUBRIC)
  stages = dict(strong=fitted("tiny:student", sizes["strong"], reading),
                critic=fitted("tiny:weak", sizes["critic"], task(20_000, plain=0.3, critic=0.7)),
                judge=fitted("tiny:teacher", sizes["judge"], judging),
                weak_judge=fitted("tiny:weak", sizes["judge"], judging))
  methods = dict(
      chains=configs.critique_refine(
          student=dict(source="stage:strong"), critic=dict(source="stage:critic"),
          data=task(1, plain=1.0), writers=("jsonl",),
          rollout=dict(max_prompt=200, prompt_buckets=(40, 120) if full else (),
                       max_response=64 if full else 16, slots=128 if full else 0),
          critique=dict(max_response=80 if full else 16),
          eval=dict(prompts=sizes["prompts"], batch=16 if full else 2, samples=k,
                    ks=sizes["ks"])),
      opcd=opcd(),
      refinements=opcd(loss=dict(signal="verified", surrogate="score_function")),
      unfiltered=opcd(filter="none"), rubric=checked("rubric"), both=checked("both"),
      weak_judged=checked("both", "weak_judge"),
      self=opcd(control="self", critic=dict(source="")),
      without=opcd(3 * sizes["answers"] // 2, control="none", critic=dict(source="")),
      truth=given(),
      weak_answers=given(teacher=dict(source="stage:critic")),
      weak_logits=configs.on_policy(**common | dict(
          total_steps=steps, log_every=1, student=dict(source="stage:strong"),
          teacher=dict(source="stage:critic"), evaluate_teachers=False,
          data=task(questions, plain=1.0),
          rollout=dict(prompts=rows, group_size=1, **lengths), optimizer=optimizer(1e-4),
          loss=dict(surrogate="reverse_kl", signal="opd"))))
  mean = f"eval/mean@{sizes['samples']}"

  def at(k, pair, effect, **changes):
    return dict(text=f"{pair.replace(' - ', ' > ')}, pass@{k}", a="chains",
                metric=f"gain/pass@{k} {pair}", effect=effect, **changes)

  def better(text, b, paper, effect=0.03, **changes):
    return dict(dict(a="opcd", metric=mean) | changes, text=text, paper=paper, b=b, effect=effect)

  claims = {f"weak_{k}": at(k, "S only - W only", 0.1, paper=paper) for k, paper in (
      (1, "71.67 and 40.00"), (max(sizes["ks"]), "86.67 and 73.33"))}  # else W is not weak
  for k in sizes["ks"]:
    claims[f"critic_{k}"] = at(k, "S + W critic - S only", 0.03, paper={
        1: "71.67 to 75.00", 16: "86.67 to 90.00"}.get(k, "above"), primary=k == 16)
    if k > 1:
      claims[f"best_{k}"] = at(k, "S + best critic - S + random critic", 0.01, paper="above")
      claims[f"random_{k}"] = at(k, "S + random critic - S + worst critic", 0.01, paper="above")
  harm = dict(may_fall=True)  # it is claimed, of bad critiques and of a weak teacher
  claims |= dict(
      gain=better("OPCD > its start", "", "above", primary=True,
                  metric=mean.replace("eval", "gain")),
      filter=better("OPCD, filtered by outcome > unfiltered", "unfiltered", "above", **harm),
      on=better("OPCD, filtered by both > unfiltered", "unfiltered", "above", a="both", **harm),
      rubric=better("OPCD, filtered by outcome > by rubric alone", "rubric", "above", **harm),
      both=better("OPCD, filtered by both > by outcome alone", "opcd", "above", 0.02, a="both"),
      judge=better("OPCD, filtered by both with a weak judge > unfiltered", "unfiltered",
                   "(our addition)", a="weak_judged", **harm),
      self=better("OPCD > self-critique", "self", "above", 0.02),
      without=better("OPCD > refining without a critique", "without", "above", 0.02),
      refinements=better("OPCD > SFT on refinements", "refinements", "above", 0.02, primary=True),
      weak_answers=better("OPCD > SFT on the weak model's answers", "weak_answers", "above",
                          paired=False, **harm),
      weak_logits=better("OPCD > distilling the weak model's logits", "weak_logits", "above",
                         **harm),
      truth=better("OPCD > SFT on ground truth", "truth", "above", paired=False))
  tuned = ("opcd", "refinements", "truth")
  if smoke:
    tuned = ("opcd",)
    del stages["judge"], stages["weak_judge"]
    methods = {name: methods[name] for name in ("chains", "opcd")}
    claims = {name: claims[name] for name in ("weak_1", "critic_2", "best_2", "gain")}
  seeds = dict.fromkeys(methods, 5) | dict.fromkeys(("chains", "opcd", "refinements"), 10)
  suffix = f":{form}" if form else ""
  return configs.claims(
      name="opcd", title="OPCD: weak critics make strong learners",
      about=ABOUT.format(chains=k, updates=updates, **sizes), notes=NOTES.format(steps=steps),
      command=f"python -m opd_jax.main --config=configs/claims/opcd.py{suffix} "
              f"--workdir=runs/claims_opcd{suffix.replace(':', '_')}",
      results="results/opcd" if full else "", table="RESULTS.md" if full else "",
      stages=stages, methods=methods,
      seeds={name: tuple(range(seeds[name] if full else 2)) for name in methods},
      tune=dict(methods=tuned, grid=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3) if full else (1e-4,),
                seeds=(1000, 1001) if full else (1000,), metric=mean,
                follows={name: "truth" if name == "weak_answers" else "opcd"
                         for name in methods if name not in (*tuned, "chains")}),
      curves=dict(
          metrics=(mean, "critique/kept", "refine/repaired", "refine/spoiled", "judge/auc"),
          methods=tuple(name for name in ("both", "opcd", "rubric", "unfiltered", "weak_judged",
                                          "self", "without", "refinements") if name in methods)),
      claims=claims)
