"""Every key of every pipeline's config, with its default: the printed config is the run.

A file in configs/ calls one of the public functions here with what it changes.
Code reads `config.x`; a default exists here or nowhere.
"""

from collections.abc import Callable, Mapping
import difflib
import re
from typing import Any

from ml_collections import ConfigDict


def _policy(source: str) -> ConfigDict:
  return ConfigDict(dict(
      source=source,         # "tiny:NAME", "hf:DIR", "workdir:DIR[@best]", "random:NAME", "smollm2"
      tokenizer="",          # folder with tokenizer.json; "": the source's own
      chat_template="",      # Jinja text or file; "": the tokenizer's own
      drop_layers_every=0,   # n: leave out every n-th layer
      base="",               # a source: extrapolate, base + alpha (source - base); "": do not
      alpha=1.0,             # of `base`: 0 the base, 1 the source, > 1 beyond it (ExPO)
  ))


def _common() -> dict[str, Any]:
  return dict(
      seed=0,
      student=_policy("tiny:student"),
      model=ConfigDict(dict(
          compute_dtype="float32",   # "float32", "bfloat16"; master weights are float32
          remat="dots",              # "none", "full", "dots": what the backward pass recomputes
      )),
      data=ConfigDict(dict(
          builder="arithmetic",      # a name in data/builders
          builder_kw=ConfigDict(),   # that builder's arguments
          train_split="train",
          eval_split="test",
          eval_builder="",           # of the held-out rows; "": the same
          eval_builder_kw=ConfigDict(),
          cache="",                  # "": ~/.cache/opd_jax/data
      )),
      rollout=ConfigDict(dict(
          prompts=16,                # P, prompts a step, over all hosts
          group_size=4,              # G, responses a prompt
          max_prompt=64,             # longer prompts are dropped and counted
          max_response=96,           # T
          prompt_buckets=(),         # padded prompt lengths; (): only max_prompt
          response_buckets=(),       # to which responses are cut once drawn; (): max_response
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          slots=0,                   # rows decoded at once, in rollouts and evaluations; 0: all
          decode_chunk=16,           # tokens a row between two looks at which rows have ended
          kv_dtype="",               # of the cache: "float32", "bfloat16", "int8"; "": as computed
          allow_biased_sampling=False,  # other sampling settings bias the sampled KL
      )),
      verifier=ConfigDict(dict(
          name="exact_match",        # a key of opd_jax/verifiers VERIFIERS
          workers=2,                 # processes
          timeout_s=5.0,             # a response, before it counts as wrong
          allow_unsafe_code=False,   # whether a model's code may run where it cannot be isolated
      )),
      eval=ConfigDict(dict(
          every=0,                   # steps; 0: only after, and before if responses are sampled
          at=(),                     # shares of total_steps after which there is one too; 0: before
          prompts=64,
          samples=8,                 # n responses a prompt
          ks=(1, 8),                 # the k of pass@k
          batch=16,                  # prompts at a time
          temperature=1.0,           # 0: greedy
          top_k=0,
          top_p=1.0,
          seed=1,
      )),
      # Copies of the weights, devices that share one and each have other rows, and devices that
      # have parts of every product; -1: the rest of the devices.
      mesh=ConfigDict(dict(replica=1, data=-1, model=1)),
      writers=("jsonl", "tensorboard"),         # also "wandb"
  )


def _training() -> dict[str, Any]:
  return dict(
      total_steps=400,               # batches; loss.updates_per_batch says how often each is used
      log_every=10,                  # steps between metrics
      optimizer=ConfigDict(dict(
          learning_rate=1e-5,        # at its peak
          schedule="constant",       # or "cosine", "linear": to 0 at total_steps
          warmup_steps=0,            # updates
          b1=0.9, b2=0.999, eps=1e-8,
          weight_decay=0.0,          # not of norms and biases
          clip_norm=1.0,             # of the whole gradient
      )),
      ema=ConfigDict(dict(rate=0.0)),           # share of the new parameters; 0: no EMA
      checkpoint=ConfigDict(dict(
          every=50,                  # steps; also at the end and on SIGTERM
          keep_last=2,
          keep_best=1,               # of those saved at an evaluation; 0: none
          best_metric="eval/mean@8", # or "eval/reverse_kl" or another measure of the evaluation
          best_mode="max",           # or "min": which end of best_metric is best
      )),
      export=True,                              # the student as a Hugging Face folder at the end
  )


def on_policy(**changes: Any) -> ConfigDict:
  """Config of a method that samples anew at every step (pipelines/on_policy.py)."""
  # Several teachers have names, by which the rows of the data ask for them, and no `teacher`.
  teacher = "" if changes.get("teachers") else "tiny:teacher"
  return _changed(_on_policy(teacher, pipeline="opd"), changes)


def peers(**changes: Any) -> ConfigDict:
  """Config of a method whose teacher is shown a rollout's peers (pipelines/peers.py).

  Its `teacher` is "", the student itself, or another model; there are no others.
  """
  return _changed(_on_policy("", pipeline="peers") | dict(
      ema=ConfigDict(dict(rate=0.05)),  # share of the new parameters
      teacher_params="ema",          # of the student itself: or "current", "frozen", "trust_region"
      trust=0.05,                    # share of the present student in the trust region's logits
      context=ConfigDict(dict(
          peers="two_successes_failure",  # who is shown, a name in teachers/contexts.PEERS
          control="",                # "random", "unrelated", "successes": who instead; "": these
          match="blocks",            # or "tokens": in what a control equals them
          feedback="never",          # or "without_success", "always": a rollout's own
          success_at=1.0,            # the least reward of a success
          remove_thinking=False,     # <think> from peers' texts
          summary=0,                 # tokens of the student's summary in each peer's place; 0: none
          budget=400,                # tokens of a context; peers are dropped, the longest first
          buckets=(),                # lengths that contexts are padded to; (): only the budget
          tokens=0,                  # padded tokens scored at a time; 0: all rows, or with
                                     # buckets a quarter of them
      )),
  ), changes)


def opcd(**changes: Any) -> ConfigDict:
  """Config of a method that learns from critiques (pipelines/opcd.py); a step is an epoch.

  Its teacher is the student itself; `loss.signal` "verified" learns refinements instead.
  """
  return _changed(_on_policy("", pipeline="opcd") | dict(
      total_steps=10,                # epochs
      questions=256,                 # of the training split, in every epoch; 0: all
      critic=_policy("tiny:weak"),
      checkpoint=ConfigDict(_training()["checkpoint"].to_dict() | dict(every=1)),  # epochs
      remove_thinking=True,          # <think> from answers and critiques before they are shown
      control="",                    # in the critic's place: "self", the student; "none": nobody
      critique=ConfigDict(dict(max_response=96, temperature=0.0, top_k=0, top_p=1.0)),
      refine=ConfigDict(dict(temperature=0.6, top_k=20, top_p=0.95)),  # as long as an answer
      filter="outcome",              # or "rubric", "both", "none": which checks a triple stands
      rubric="",                     # file with {question}, {answer} and {critique}
      judge=_policy(""),             # who answers it; "": the student
      triples=32,                    # a batch
      updates=0,                     # an epoch; 0: one pass over all that is kept
      context=ConfigDict(dict(
          budget=300,                # tokens of any request that holds an answer or a critique
          buckets=(),                # lengths that these are padded to; (): only the budget
          tokens=0,                  # padded tokens scored at a time; 0: all rows, or with
                                     # buckets a quarter of them
      )),
  ), changes)


def rewarded(**changes: Any) -> ConfigDict:
  """Config of on-policy learning from a reward model (pipelines/rewarded.py).

  Its `loss.signal` is one that learns from rewards; `verifier` evaluates, and teaches nothing.
  """
  return _changed(_on_policy("", pipeline="rewarded") | dict(
      reward=ConfigDict(dict(
          source="",                 # workdir of a reward model
          min_accuracy=0.55,         # of it, on held-out pairs
      )),
      batch=ConfigDict(dict(         # how it is asked
          tokens=6144,               # padded tokens at a time
          buckets=(96, 160, 256, 400),   # lengths of prompt + response
      )),
  ), changes)


def _on_policy(teacher: str, pipeline: str) -> dict[str, Any]:
  return dict(
      **_common(), **_training(),
      pipeline=pipeline,
      teacher=_policy(teacher),
      teachers=ConfigDict(),         # name -> a section like `teacher`
      reference=_policy(""),         # "": none; the student's own source: its initial weights
      teacher_memory="device",       # or "host": teachers and reference wait there, and one at a
                                     # time is on the device
      teacher_cache="",              # folder of what teachers say of the data's responses, made
                                     # ahead of the first step; "": they are asked at every step
      student_share=1.0,             # of the batches: its own responses; the others: the data's
      evaluate_teachers=True,        # at the end, for the table
      loss=ConfigDict(dict(
          signal="opd",              # what is learned: or "g_opd"; of rewards "group_advantage"
                                     # (GRPO), "dpo", "simpo", "verified" (SFT on successes)
          lam=1.0,                   # of g_opd: 0 the reference, 1 the teacher, > 1 beyond it
          normalize_std=True,        # of group_advantage
          dpo=ConfigDict(dict(beta=0.1)),
          simpo=ConfigDict(dict(beta=2.0, margin=1.0)),
          success_at=1.0,            # of verified: the least reward that is learned from
          weight="uniform",          # how much a token counts: or "iw_opd", "position"
          iw_opd=ConfigDict(dict(max_weight=1.5, signed=False, unit_mean=False)),
          position=ConfigDict(dict(fraction=0.3, side="prefix")),  # or "suffix"
          surrogate="score_function",  # how to descend: or "clipped" (PPO); over the vocabulary
                                     # "forward_kl", "reverse_kl", "jsd"
          clipped=ConfigDict(dict(low=0.2, high=0.2, dual=0.0)),  # dual 0: none
          reference_kl=0.0,          # coefficient of KL(student || reference), by k3
          updates_per_batch=1,
          beta=0.5,                  # of jsd
          top_k=0,                   # K: over K tokens and a tail; 0: the whole vocabulary
          top_of="student",          # or "teacher": whose K most likely tokens
          tail="bucket",             # the other tokens: one "bucket", or dropped: "renormalize"
          aggregate="token_mean",    # or "sequence_mean", "sequence_sum"
          importance_cap=5.0,        # on p_now / p_sampler
          divergence_importance=False,  # over the vocabulary, whether that weighs tokens too
          micro_batches=1,
      )),
  )


def offline(**changes: Any) -> ConfigDict:
  """Config of training on given responses (pipelines/offline.py)."""
  common = _common()
  return _changed(dict(
      **common, **_training()) | dict(
      eval=ConfigDict(common["eval"].to_dict() | dict(  # what others say of its samples:
          scores=ConfigDict(),       # name -> a section like `student`: their log-probability
          rival=ConfigDict(dict(rows="")),  # file of responses to beat; "": none
      )),
      pipeline="sft",
      # Whose responses to learn; none: the data's. Sampled once, as `rollout` says, and kept.
      teacher=_policy(""),
      teachers=ConfigDict(),         # name -> a section like `teacher`; rows ask for them by name
      tokenizer_vocab=0,             # n > 0: train a tokenizer of n tokens on the data first
      batch=ConfigDict(dict(
          tokens=6144,               # padded tokens a batch
          buckets=(96, 160, 256, 400),   # lengths of prompt + response
          chunk=2048,                # rows sorted into buckets at a time
      )),
      reference=_policy(""),         # of dpo: mostly the student's own source
      scores=ConfigDict(),           # field -> a section like `student`, whose log-probability of
                                     # each response it names; none: the data brings the fields
      loss=ConfigDict(dict(
          objective="sft",           # of groups of responses "dpo", "eve": pipelines/given.py
          aggregate="token_mean",    # of sft: or "sequence_mean", "sequence_sum"
          dpo=ConfigDict(dict(beta=0.1, label_smoothing=0.0)),
          # Of a prompt's rollout.group_size responses; ratio is beta / lambda, 0: no weights, and
          # no fields needed, which name the numbers that are compared, "": with none (log pi_weak).
          eve=ConfigDict(dict(ratio=1.0, fields=("weak_logprob", "weak_reference_logprob"))),
          micro_batches=1,
      )),
  ), changes)


def reward_model(**changes: Any) -> ConfigDict:
  """Config of a reward model trained on pairs (pipelines/reward_model.py)."""
  made = offline()
  return _changed({key: made[key] for key in (
      "seed", "student", "model", "data", "mesh", "writers", "total_steps", "log_every",
      "optimizer", "ema", "tokenizer_vocab", "batch")} | dict(
          pipeline="reward_model",
          checkpoint=ConfigDict(made.checkpoint.to_dict() | dict(best_metric="eval/accuracy")),
          loss=ConfigDict(dict(micro_batches=1)),
          eval=ConfigDict(dict(every=0, at=(), prompts=256)),  # held-out pairs
          min_accuracy=0.55,             # on these; a reward model below it is refused. 0: any
      ), changes)


def responses(**changes: Any) -> ConfigDict:
  """Config of the making of rows: responses and what is thought of them (pipelines/responses.py).
  """
  common, made = _common(), offline()
  return _changed({key: common[key] for key in (
      "seed", "student", "model", "data", "rollout", "verifier", "mesh", "writers")} | dict(
          pipeline="responses",
          batch=made.batch,              # how responses are scored and rewarded
          loss=ConfigDict(dict(micro_batches=1)),
          student=_policy(""),           # who answers; "": the data's own groups are taken
          skip=0,                        # rows of data.train_split left to other runs
          prompts=0,                     # rows behind them; 0: all
          shots=ConfigDict(dict(
              rows="",                   # file of demonstrations; "": none
              number=2,                  # before each question
              template="{question}{response}\n",
          )),
          refine=ConfigDict(dict(
              rows="",                   # file of responses to the same prompts; "": none is shown
              template="{question}{response}\n{question}",
          )),
          scores=ConfigDict(),           # field -> a section like `student`, whose log-probability
                                         # of each response it names
          reward=ConfigDict(dict(
              source="",                 # workdir of a reward model, "verifier", or "implicit":
              fields=("weak_logprob", "weak_reference_logprob"),  # their difference
              beta=1.0,                  # which the reward is multiplied by
              min_accuracy=0.55,         # of the reward model, on held-out pairs
          )),
          keep="all",                    # or "best", "ranked_pair", "drawn_pair": by reward
      ), changes)


def evaluate(**changes: Any) -> ConfigDict:
  """Config of an evaluation alone (pipelines/evaluate.py)."""
  return _changed(dict(
      **_common(),
      pipeline="evaluate",
      teacher=_policy(""),           # "": no reverse KL
  ), changes)


def context_use(**changes: Any) -> ConfigDict:
  """Config of the study of contexts (pipelines/context_use.py)."""
  return _changed(dict(
      **_common(),
      pipeline="context_use",
      models=("tiny:student",),      # sources of the models studied
      critic=_policy("tiny:weak"),   # who writes the critiques
  ), changes)


def critique_refine(**changes: Any) -> ConfigDict:
  """Config of the study of weak critics at inference time (pipelines/critique_refine.py).

  Of `eval`, samples are the chains of a prompt, and temperature, top_k and top_p draw answers.
  """
  return _changed(dict(
      **_common(),
      pipeline="critique_refine",
      critic=_policy("tiny:weak"),   # W, who criticizes; S, who answers, is the student
      critique=ConfigDict(dict(max_response=96, temperature=0.0, top_k=0, top_p=1.0)),
      refine=ConfigDict(dict(temperature=1.0, top_k=0, top_p=1.0)),  # as long as an answer
      reuse_critiques=True,          # also: one critique for all answers, the best, any, the worst
      remove_thinking=True,          # <think> from answers and critiques before they are shown
  ), changes)


def teacher_signal(**changes: Any) -> ConfigDict:
  """Config of the analysis of contexts by what they say of responses (pipelines/teacher_signal.py).
  """
  return _changed(dict(
      **_common(),
      pipeline="teacher_signal",
      run="",                        # workdir of any run that evaluates; "": `student` is first
      evaluation="",                 # of that run, such as "step_000200"; "": the last
      teacher=_policy(""),           # of that first evaluation
      context=ConfigDict(dict(
          budget=400,                # tokens of a context; beyond it a response is left out
          buckets=(),                # lengths that contexts are padded to; (): only the budget
          tokens=0,                  # padded tokens scored at a time; 0: all rows, or with
                                     # buckets a quarter of them
          remove_thinking=False,     # <think> from peers' texts
      )),
  ), changes)


def diversity(**changes: Any) -> ConfigDict:
  """Config of the comparison of runs by how unlike their responses are (pipelines/diversity.py)."""
  return _changed(dict(
      **_common(),
      pipeline="diversity",
      runs=(),                       # "WORKDIR" of runs that evaluate, the last of it, or
                                     # "WORKDIR@NAME"; (): `student` is evaluated
      teacher=_policy(""),           # of that evaluation
      ks=(1, 2, 4, 8),               # of pass@k
      programs=False,                # whether responses are Python, whose syntax is compared too
  ), changes)


def judged(**changes: Any) -> ConfigDict:
  """Config of the comparison of two sets of responses by a judge (pipelines/judged.py)."""
  return _changed(dict(
      **_common(),
      pipeline="judged",
      # Whose wins are counted, and whose losses. `source` is the workdir of a run that evaluates or
      # a file of rows; a's "": `student` is evaluated first; b's "": what a's data bring.
      # `evaluation` is of that run, such as "step_000200"; "": its only one.
      a=ConfigDict(dict(source="", evaluation="")),
      b=ConfigDict(dict(source="", evaluation="")),
      teacher=_policy(""),           # of that first evaluation
      prompts=0,                     # the first of those that both sides have; 0: all
      rubric="",                     # file with {question}, {first} and {second}
      judge=_policy(""),             # a model of ours, or "":
      endpoint=ConfigDict(dict(
          url="",                    # of chat completions, whole; "": no endpoint
          model="",                  # its name there
          settings=ConfigDict(dict(temperature=0.0, max_tokens=16)),  # sent as they are
          key_variable="OPENAI_API_KEY",  # in the environment; "": the endpoint wants no key
          timeout_s=120.0,           # of a request
          retries=6,                 # of one that failed for now, after 1 s, 2 s, 4 s ...
          at_once=4,                 # requests under way together
      )),
      context=ConfigDict(dict(
          budget=400,                # tokens of a request to `judge`; a longer one is not judged
          buckets=(),                # lengths that requests are padded to; (): only the budget
      )),
  ), changes)


def claims(**changes: Any) -> ConfigDict:
  """Config of the measurement of a paper's claims (pipelines/claims.py)."""
  return _changed(dict(
      pipeline="claims",
      name="",                       # of the section in `table`
      title="",                      # its heading
      about="",                      # Markdown below it: models, task, what is equal
      notes="",                      # Markdown at its end
      command="",                    # that makes it
      results="",                    # folder of the cells' JSON files; "": WORKDIR/results
      table="",                      # the Markdown file; "": WORKDIR/RESULTS.md
      workers=2,                     # processes, each with its share of the cores
      minutes=60.0,                  # of a sitting: what has not begun by then stays open
      stages=_ordered(),             # name -> a complete config; others start from "stage:NAME"
      methods=_ordered(),            # name -> a complete config
      seeds=_ordered(),              # method -> the seeds that are reported
      tune=ConfigDict(dict(
          key="optimizer.learning_rate",
          grid=(3e-4, 1e-3, 3e-3),
          seeds=(1000,),             # none that is reported
          metric="eval/mean@8",      # the greatest mean wins
          methods=(),
          follows=_ordered(),        # method -> the tuned one whose value it takes
      )),
      claims=_ordered(),             # name -> what is claimed, see `_claim`
      curves=ConfigDict(dict(metrics=(), methods=())),  # shown at every evaluation, a table each
      sweeps=_ordered(),             # name -> a parameter and its methods, see `_sweep`
  ), changes)


def _ordered() -> ConfigDict:
  return ConfigDict(sort_keys=False)  # the order of a table is the order of the file


def _claim() -> ConfigDict:
  return ConfigDict(dict(
      text="",
      paper="",              # its number
      kind="difference",     # a - b; "share": a / b; "experts": a - each expert, there;
                             # "recovered": a - b in shares of the gap from `before` to `after`
      a="",                  # a method
      b="",                  # another, or "stage:NAME"; "": a's metric is a gain already
      over=(),               # c, d: it is claimed that a - b is greater than c - d, and by how much
      metric="",             # of a cell: "eval/mean@8", "curve/area", "gain/mean@8" ...
      effect=0.0,            # as claimed, in units of the metric; its sign is the direction
      margin=0.0,            # > 0: the claim is that it equals `effect`, within this margin
      experts=_ordered(),    # of kind "experts": domain -> the stage that measures its expert, or
                             # what is made of that
      counting=_ordered(),   # then domain -> the stage that measures the expert itself, which must
                             # be one for the domain to count; empty: as `experts`
      base="",               # the stage that measures what the experts were made of
      before="", after="",   # stages that measure a teacher before and after its training, if the
                             # claim is about what a student learns of that; "": it is not. Of
                             # "recovered" the weak floor and the strong ceiling
      may_fall=False,        # whether there is a verdict if b ends below its start, for claims that
                             # it does harm
      paired=True,           # by seed; False: a and b do not see the same rows (one is SFT)
      primary=False,         # or exploration
  ))


def _sweep() -> ConfigDict:
  return ConfigDict(dict(
      text="",
      paper="",
      parameter="",          # its name
      points=(),             # its values, ascending
      methods=(),            # one a point
      base="",               # the stage that measures what they start from; "": not shown
      metrics=(),
  ))


def position_bias(**changes: Any) -> ConfigDict:
  """Config of the study of position bias, and of its runs (pipelines/position_bias.py)."""
  loss = on_policy().loss.to_dict()
  del loss["weight"], loss["position"]  # what the runs differ in
  return _changed(dict(
      **_common(), **_training(),
      pipeline="position_bias",
      teacher=_policy("tiny:teacher"),
      loss=ConfigDict(loss),         # of the runs
      parts=(0.3, 0.5),              # first or last of a response; 1: all of it alone; (): no runs
      after=_policy(""),             # the student once trained; "": by the run on all tokens
      cuts=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),  # shares of a response that are kept
      continuations=4,               # K, how often each model finishes what was kept
  ), changes)


def form(arg: str, *known: str) -> str:
  """The form of a config that `--config=file.py:form` asks for.

  Raises: ValueError for one that the file does not have.
  """
  if arg not in known:
    raise ValueError(f"this config has no form {arg!r}; it has "
                     + ", ".join(repr(name) for name in known))
  return arg


def nearest(name: str, known: Any) -> str:
  """' Did you mean ...?' for a name close to a known one, else ''."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def _changed(defaults: dict[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
  config = ConfigDict(defaults)
  _merge(config, changes, "config")
  return config.lock()


# Sections whose keys are names that the file chooses: what each name starts from, or anything.
NAMED = {"teachers": lambda: _policy(""), "scores": lambda: _policy(""), "claims": _claim,
         "sweeps": _sweep}
OPEN = ("stages", "methods", "seeds", "follows", "experts", "counting")


def _merge(config: ConfigDict, changes: Mapping[str, Any], path: str) -> None:
  for key, value in changes.items():
    if key not in config:
      raise ValueError(f"unknown config key {path}.{key}.{nearest(key, config)} "
                       f"{path} has: {', '.join(sorted(config))}")
    old = config[key]
    if isinstance(old, ConfigDict) and not isinstance(value, Mapping):
      raise ValueError(f"{path}.{key} is a section; wanted a dict, found {value!r}")
    elif key in ("builder_kw", "eval_builder_kw", "settings"):
      config[key] = ConfigDict(value)
    elif isinstance(old, ConfigDict) and key in NAMED:
      for name, section in value.items():
        old[name] = NAMED[key]()
        _merge(old, {name: section}, f"{path}.{key}")
    elif isinstance(old, ConfigDict) and key in OPEN:
      for name, anything in value.items():
        old[name] = anything
    elif isinstance(old, ConfigDict):
      _merge(old, value, f"{path}.{key}")
    elif type(value) is not type(old) and not (isinstance(old, float) and type(value) is int):
      raise ValueError(f"{path}.{key} must be a {type(old).__name__}, found {value!r}")
    else:
      config[key] = type(old)(value)


# Checked where a pipeline's config has them.
POSITIVE = (
    "total_steps", "log_every", "rollout.prompts", "rollout.group_size", "rollout.max_prompt",
    "rollout.max_response", "rollout.decode_chunk", "eval.prompts", "eval.samples", "eval.batch",
    "verifier.workers", "checkpoint.every", "checkpoint.keep_last", "loss.micro_batches",
    "batch.tokens", "batch.chunk", "loss.updates_per_batch", "loss.iw_opd.max_weight", "workers",
    "continuations", "context.budget", "triples", "critique.max_response", "shots.number",
    "endpoint.at_once")
NOT_NEGATIVE = (
    "seed", "rollout.temperature", "rollout.top_k", "rollout.slots", "eval.every",
    "eval.temperature", "eval.top_k", "eval.seed", "checkpoint.keep_best", "loss.top_k",
    "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay",
    "student.drop_layers_every", "teacher.drop_layers_every", "tokenizer_vocab",
    "reference.drop_layers_every", "student.alpha", "teacher.alpha", "reference.alpha", "loss.lam",
    "loss.reference_kl", "loss.eve.ratio", "loss.clipped.high", "minutes",
    "after.drop_layers_every", "after.alpha", "context.tokens", "context.summary",
    "questions", "updates", "skip", "prompts",
    "critique.temperature", "critique.top_k", "refine.temperature", "refine.top_k",
    "critic.drop_layers_every", "critic.alpha", "judge.drop_layers_every", "judge.alpha",
    "endpoint.retries")
WHOLE_NUMBERS = ("rollout.prompt_buckets", "rollout.response_buckets", "eval.ks", "batch.buckets",
                 "context.buckets")
SHARES = ("cuts", "parts")


def validate(config: ConfigDict) -> None:
  """Mistakes that show only once the whole config is known, cross-key ones among them.

  Raises: ValueError naming the keys, what they are and what they must be.
  """
  for key in POSITIVE:
    _check(config, key, lambda x: x >= 1, "at least 1")
  for key in NOT_NEGATIVE:
    _check(config, key, lambda x: x >= 0, "0 or more")
  _check(config, "student_share", lambda x: 0 <= x <= 1, "at least 0 and at most 1")
  _check(config, "teacher_memory", lambda x: x in ("device", "host"), "'device' or 'host'")
  for key in ("rollout.top_p", "eval.top_p", "loss.position.fraction", "trust", "critique.top_p",
              "refine.top_p"):
    _check(config, key, lambda x: 0 < x <= 1, "above 0 and at most 1")
  for key in ("ema.rate", "loss.clipped.low"):
    _check(config, key, lambda x: 0 <= x < 1, "at least 0 and less than 1")
  _check(config, "loss.clipped.dual", lambda x: x == 0 or x > 1, "above 1, or 0 for no bound")
  _check(config, "endpoint.timeout_s", lambda x: x > 0, "above 0")
  if "endpoint" in config:
    _check_endpoint(config.endpoint)
  for key in WHOLE_NUMBERS:
    _check(config, key, lambda x: all(type(item) is int and item >= 1 for item in x),
           "whole numbers, each at least 1")
  for key in SHARES:
    _check(config, key, lambda x: all(isinstance(item, (int, float)) and 0 < item <= 1
                                      for item in x), "numbers, each above 0 and at most 1")
  _check(config, "eval.at", lambda x: all(isinstance(item, (int, float)) and 0 <= item <= 1
                                          for item in x), "numbers, each from 0 to 1")
  if config.pipeline == "claims":
    for where in ("stages", "methods"):
      for name, section in config[where].items():
        try:
          validate(section)
        except ValueError as error:
          raise ValueError(f"{where}.{name}: {error}") from error
    return
  for who in ("student", "teacher", "reference", "after", "critic", "judge"):
    if who in config and config[who].alpha != 1.0 and not config[who].base:
      raise ValueError(f"{who}.alpha is {config[who].alpha:g}, which has no effect without "
                       f"{who}.base; name the source to extrapolate from, or leave it at 1")
  _check(config, "reward.min_accuracy", lambda x: 0 <= x < 1, "at least 0 and less than 1")
  if config.pipeline == "responses":
    _check_buckets(config)
    return
  if config.pipeline == "reward_model":
    _check(config, "min_accuracy", lambda x: 0 <= x < 1, "at least 0 and less than 1")
    if config.checkpoint.keep_best:
      _check_best_of(config.checkpoint, ["eval/accuracy", "eval/margin"], "")
    return
  if config.eval.samples < max(config.eval.ks, default=1):
    raise ValueError(f"eval.ks {config.eval.ks} needs eval.samples >= {max(config.eval.ks)}, found "
                     f"{config.eval.samples}")
  if config.pipeline == "critique_refine" and not config.eval.ks:
    raise ValueError("eval.ks is (); name the k of the table's columns, say (1, 2, 4, 8, 16)")
  _check_buckets(config)
  if "context" in config and any(size > config.context.budget for size in config.context.buckets):
    raise ValueError(f"context.buckets {config.context.buckets} must not exceed context.budget = "
                     f"{config.context.budget}, which is always one")
  if config.pipeline in ("opd", "peers", "rewarded") and config.student_share > 0:
    _check_sampling(config)
  if "checkpoint" in config and config.checkpoint.keep_best:
    _check_best(config)


def _check_buckets(config: ConfigDict) -> None:
  for what in ("prompt", "response"):
    buckets, longest = config.rollout[f"{what}_buckets"], config.rollout[f"max_{what}"]
    if any(length > longest for length in buckets):
      raise ValueError(f"rollout.{what}_buckets {buckets} must not exceed rollout.max_{what} = "
                       f"{longest}, which is always one")


def _check(config: ConfigDict, key: str, good: Callable[[Any], bool], wanted: str) -> None:
  *sections, name = key.split(".")
  for section in sections:
    if section not in config:
      return
    config = config[section]
  if name in config and not good(config[name]):
    raise ValueError(f"{key} is {config[name]!r}; it must be {wanted}")


def _check_best(config: ConfigDict) -> None:
  section, samples, ks = config.checkpoint, config.eval.samples, config.eval.ks
  compares = config.pipeline == "opd" and bool(config.teacher.source or config.teachers) and not (
      config.teacher_cache and config.student_share == 0.0)  # then no teacher is loaded
  known = [f"mean@{samples}", *(f"pass@{k}" for k in ks), "length", "truncated"]
  known = ["eval/" + name for name in known + ["reverse_kl"] * compares]
  _check_best_of(section, known, f"with eval.samples={samples} and eval.ks={ks} ")


def _check_best_of(section: ConfigDict, known: list[str], where: str) -> None:
  if section.best_metric not in known:
    raise ValueError(
        f"checkpoint.best_metric is {section.best_metric!r}; {where}it must be one of "
        f"{', '.join(known)} (or set checkpoint.keep_best=0)")
  if section.best_mode not in ("max", "min"):
    raise ValueError(f"checkpoint.best_mode is {section.best_mode!r}; it must be 'max' or 'min'")


def _check_endpoint(section: ConfigDict) -> None:
  # Before config.json is written, which must hold no key; so these messages show nothing either.
  if section.key_variable and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", section.key_variable):
    raise ValueError("endpoint.key_variable is not the name of an environment variable; keys come "
                     "from the environment only: put the key in one, and its name here")
  if "@" in section.url.partition("://")[2].partition("/")[0]:
    raise ValueError("endpoint.url names a user; keys come from the environment only: put the key "
                     "in a variable, and its name in endpoint.key_variable")


def _check_sampling(config: ConfigDict) -> None:
  rollout = config.rollout
  plain = rollout.temperature == 1.0 and rollout.top_k == 0 and rollout.top_p == 1.0
  if not plain and not rollout.allow_biased_sampling:
    raise ValueError(
        f"rollout.temperature={rollout.temperature}, top_k={rollout.top_k}, top_p={rollout.top_p} "
        "make the sampled KL biased; on-policy distillation samples at temperature 1, top_k 0, "
        "top_p 1. Set rollout.allow_biased_sampling=True if the bias is wanted.")
