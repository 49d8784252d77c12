"""The claims of IW-OPD (2606.22600; METHODS 3) on tiny models.

    python -m opd_jax.main --config=configs/claims/iw_opd.py --workdir=runs/claims_iw_opd

OPD of the tiny student from the tiny teacher, with all tokens alike, with IW-OPD's weight, plain
and of unit mean, and with the first or last part of every response alone; and of the weak model
from the student, which is as large as it. The cells are in results/iw_opd, the tables in
RESULTS.md; 2 CPU cores, sittings of an hour.

Forms: full (the default); quick, minutes, the same cells of two steps and two seeds, with cells
and tables in the workdir; smoke, for the tests, fewer of them.
"""

from opd_jax import config as configs

SIZES = {"": dict(cell=40, rows=64), "quick": dict(cell=2, rows=8), "smoke": dict(cell=2, rows=4)}

# What each method changes in the loss.
METHODS = dict(
    opd={},
    iw_opd=dict(weight="iw_opd"),
    iw_opd_unit_mean=dict(weight="iw_opd", iw_opd=dict(unit_mean=True)),
    opd_same_size={},
    iw_opd_same_size=dict(weight="iw_opd"),
    prefix30=dict(weight="position", position=dict(fraction=0.3, side="prefix")),
    suffix30=dict(weight="position", position=dict(fraction=0.3, side="suffix")),
    prefix50=dict(weight="position", position=dict(fraction=0.5, side="prefix")),
    suffix50=dict(weight="position", position=dict(fraction=0.5, side="suffix")),
)
# Student and teacher.
PAIR, SAME_SIZE = ("tiny:student", "tiny:teacher"), ("tiny:weak", "tiny:student")

ABOUT = """\
The student is `tiny:student`, the teacher `tiny:teacher` (0.3 and 0.5 million parameters); for
`*_same_size` they are `tiny:weak` and `tiny:student`, of one shape. The task is worked modular
arithmetic of one and two digits. A cell makes {cell} updates of {rows} rows, one response a prompt,
and is evaluated on the same {prompts} held-out prompts with {samples} samples each at temperature
1, before, after and on the way. `curve/area` is the mean height of that curve: of two that end
alike, the one that converges faster has the larger. `gain` is after minus before. Learning rates
are tuned by `curve/area`, which both those raise that end higher and those that get there sooner:
tuned by its end alone, a method would be called slow that is so at that rate only."""

NOTES = """\
The effects tested for are our choice, where the paper's numbers are of other tasks. Equal to all
tokens, or to nothing, is to within a tenth of what all tokens gain.

What a weight does to the effective learning rate: the loss is the sum of weighted tokens over the
number of all of them, those of weight 0 included (`token_mean`), so the loss and its gradient
shrink or grow with the mean weight of a token, in the table: about 1.25 for IW-OPD, exactly 1 with
unit mean, about the fraction for a part of the response. AdamW divides by the gradient's own size,
so such a factor alone leaves its updates nearly as they are: nearly, as the norm is clipped at 1
before that. What remains is which tokens share an update, and how noisy it is: 30% of the tokens
are fewer samples. Halves have the learning rate tuned for 30%, and pairs of one size those of the
other pair. The paper's compression goes to 6.7; here it is 1 and 1.8, the effect tested for half
of the paper's difference.

An earlier sitting tuned by where a run ends, gave parts of responses OPD's rate, and evaluated all
seeds with the same draws; all was measured anew. Its cells made 100 updates, of which OPD had its
gain in the first 20; these make 40, evaluated every 8."""


def get_config(arg=""):
  form = configs.form(arg, "", "quick", "smoke")
  full, smoke, sizes = form == "", form == "smoke", SIZES[form]
  prompts, samples = (128, 4) if full else (8, 2)
  mean = f"mean@{samples}"

  def method(name):
    student, teacher = SAME_SIZE if name.endswith("same_size") else PAIR
    return configs.on_policy(
        total_steps=sizes["cell"], log_every=1, export=False, evaluate_teachers=False,
        student=dict(source=student), teacher=dict(source=teacher),
        data=dict(builder="arithmetic", builder_kw=dict(
            train=20_000 if full else 64, test=256, mix=dict(plain=1.0), seed=7)),
        rollout=dict(prompts=sizes["rows"], group_size=1, max_prompt=40, max_response=80),
        loss=dict(signal="opd", surrogate="score_function", **METHODS[name]),
        optimizer=dict(learning_rate=1e-3, schedule="linear", warmup_steps=5, b2=0.98),
        eval=dict(prompts=prompts, samples=samples, ks=(1,), batch=32 if full else 8,
                  every=sizes["cell"] // 5 if full else 1),
        checkpoint=dict(every=100_000, keep_last=1, keep_best=0), writers=("jsonl",))

  claims = dict(
      higher=dict(
          text="IW-OPD ends higher than OPD", a="iw_opd", b="opd", metric=f"eval/{mean}",
          paper="+4.0% at 1.0x to +14.9% at 6.7x compression, up to 6.9 points on AIME25",
          effect=0.04, primary=True),
      higher_unit=dict(
          text="IW-OPD ends higher at an equal effective learning rate", a="iw_opd_unit_mean",
          b="opd", metric=f"eval/{mean}", paper="(the paper's weight is the plain one)",
          effect=0.04, primary=True),
      faster=dict(
          text="IW-OPD converges faster", a="iw_opd", b="opd", metric="curve/area",
          paper="significantly faster, in a curve", effect=0.02, primary=True),
      faster_unit=dict(
          text="IW-OPD converges faster at an equal effective learning rate", a="iw_opd_unit_mean",
          b="opd", metric="curve/area", paper="(the paper's weight is the plain one)",
          effect=0.02, primary=True),
      compression=dict(
          text="IW-OPD gains more where the teacher is larger than the student", a="iw_opd",
          b="opd", over=("iw_opd_same_size", "opd_same_size"), metric=f"eval/{mean}",
          paper="+4.0% at 1.0x, +14.9% at 6.7x", effect=0.05),
      prefix=dict(
          text="The first 30% of the tokens teach about as much as all", kind="share",
          a="prefix30", b="opd", metric=f"gain/{mean}", paper="comparable", effect=1.0, margin=0.1),
      suffix=dict(
          text="The last 30% teach almost nothing", kind="share", a="suffix30", b="opd",
          metric=f"gain/{mean}", paper="barely learns anything", effect=0.0, margin=0.1),
      bias=dict(
          text="The first 30% teach more than the last", a="prefix30", b="suffix30",
          metric=f"eval/{mean}", paper="the two rows above", effect=0.04),
      bias_half=dict(
          text="The first half teaches more than the second", a="prefix50", b="suffix50",
          metric=f"eval/{mean}", paper="(our addition)", effect=0.04))
  names = ("opd", "iw_opd", "suffix30") if smoke else tuple(METHODS)
  primary = ("opd", "iw_opd", "iw_opd_unit_mean")
  tuned = ("opd",) if smoke else (*primary, "prefix30", "suffix30")
  follows = dict(suffix30="opd") if smoke else dict(
      opd_same_size="opd", iw_opd_same_size="iw_opd", prefix50="prefix30", suffix50="suffix30")
  return configs.claims(
      name="iw_opd", title="IW-OPD: tokens before the drift count more",
      about=ABOUT.format(prompts=prompts, samples=samples, **sizes), notes=NOTES,
      command=("python -m opd_jax.main --config=configs/claims/iw_opd.py"
               + (f":{form}" if form else "") + " --workdir=runs/claims_iw_opd"
               + (f"_{form}" if form else "")),
      results="results/iw_opd" if full else "", table="RESULTS.md" if full else "",
      methods={name: method(name) for name in names},
      seeds={name: tuple(range((10 if name in primary else 5) if full else 2)) for name in names},
      tune=dict(methods=tuned, grid=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2) if full else (1e-3, 3e-3),
                seeds=(1000, 1001) if full else (1000,), metric="curve/area",
                follows=follows),
      claims={name: claim for name, claim in claims.items()
              if {claim["a"], claim["b"], *claim.get("over", ())} <= set(names)})
