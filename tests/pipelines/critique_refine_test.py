"""Chains of answer, critique and refinement: who is shown what, and that nothing is made twice."""

import json
import pathlib
import random
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from opd_jax import config as configs
from opd_jax import keys, main, progress, sharding, verifiers
from opd_jax.data import builders, chat
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders.arithmetic import chains
from opd_jax.evals import critique_refine as evals
from opd_jax.pipelines import critique_refine, responder
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines.responder import Response
from opd_jax.rollouts.sampler import Sampling

PROMPTS, CHAINS = 5, 4  # 2 prompts at a time: the last block is not full
REFINE = "\n\n" + chat.SOLVE_AGAIN


def small(**changes):
  settings = dict(
      data=dict(builder_kw=dict(train=1, test=64, mix=dict(plain=1.0), digits=(1,), min_steps=3,
                                max_steps=3)),
      rollout=dict(max_prompt=112, max_response=28), critique=dict(max_response=28),
      eval=dict(prompts=PROMPTS, samples=CHAINS, ks=(4, 1, 2), batch=2))
  for key, value in changes.items():
    settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
  return configs.critique_refine(**settings)


class Killed(Exception):
  pass


def scripted(say, dies_at=None):
  """In the place of `speaker`: what `say(name, messages, rng)` says; dies at its n-th call."""
  calls = []

  def speaker(config, name, folder, mesh):
    def speak(how, conversations, key):
      if len(calls) == dies_at:
        raise Killed
      calls.append((name, how, conversations))
      seed = jax.random.key_data(key).tolist()
      return [say(name, messages, random.Random(str((seed, i, messages))))
              for i, messages in enumerate(conversations)]
    return speak
  return mock.patch.object(critique_refine, "speaker", speaker), calls


def said(text, ended=True):
  return Response(text, list(range(len(text.split()) + 1)), ended)


def guess(name, messages, rng):
  """The student is right half of the time; what the critic says differs every time."""
  if name == "critic":
    return said(f"#### {rng.randrange(10)} {rng.random()}")
  right = int(chains.answer(chains.parse(messages[0]["content"])))
  return said(f"#### {rng.choice((right, (right + 1) % 10))}")


class ScriptedTest(parameterized.TestCase):

  def run_scripted(self, say=guess, workdir=None, dies_at=None, **changes):
    """The folder of a run whose models say what they are told to, and what was asked of them."""
    workdir = workdir or self.create_tempdir().full_path
    config = small(**changes)
    configs.validate(config)
    speak, calls = scripted(say, dies_at)
    with speak, mock.patch.object(progress, "note"), mock.patch.object(progress, "table"):
      critique_refine.run(config, workdir)
    return workdir, calls


class StagesTest(ScriptedTest):

  def test_each_model_is_shown_what_the_chain_has_said(self):
    workdir, calls = self.run_scripted()
    self.assertEqual([call[:2] for call in calls[:12]],
                     [("student", "eval")] * 3 + [("critic", "eval")] * 3
                     + [("critic", "critique")] * 3 + [("student", "refine")] * 3)
    asked = lambda first: [messages for call in calls[first:first + 3] for messages in call[2]]
    found = critique_refine.read(workdir)
    self.assertEqual(asked(0), asked(3))
    rows = zip(*(found[name] for name in ("answers", "critiques", "refinements")), strict=True)
    for place, (answer, critique, refinement) in enumerate(rows):
      question = asked(0)[place]
      self.assertEqual([(row["prompt"], row["chain"]) for row in (answer, critique, refinement)],
                       [(answer["prompt"], place % CHAINS)] * 3)
      self.assertEqual(asked(6)[place], chat.critique_request(question, answer["text"]))
      self.assertEqual(asked(9)[place],
                       chat.refine_request(question, answer["text"], critique["text"]))
      self.assertEqual(refinement["how"], "ended")
    self.assertLen({row["prompt"] for row in found["answers"]}, PROMPTS)
    self.assertLen(found["refinements"], PROMPTS * CHAINS)

  def test_each_answer_is_refined_with_the_one_critique_selected_for_its_prompt_and_k(self):
    workdir, calls = self.run_scripted()
    found = critique_refine.read(workdir)
    reward, text = ({name: {(row["prompt"], row["chain"]): row[what] for row in found[name]}
                     for name in names}
                    for what, names in (("reward", ("answers", "refinements")),
                                        ("text", ("answers", "critiques"))))
    shown = {json.dumps(messages) for call in calls[12:] for messages in call[2]}
    turned = 0
    for kind in evals.KINDS:
      rows = found[f"selected_{kind}"]
      self.assertEqual([(row["k"], row["chain"]) for row in rows],
                       [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)] * PROMPTS)
      for row, same in zip(rows, found["selected_random"]):
        prompt, k, chosen = row["prompt"], row["k"], row["critique_of"]
        self.assertLess(chosen, k)
        did = [(reward["answers"][prompt, i], reward["refinements"][prompt, i]) for i in range(k)]
        wanted = {"best": (0, 1), "worst": (1, 0)}.get(kind, did[chosen])
        self.assertEqual(row["fell_back"], wanted not in did)
        turned += kind != "random" and wanted in did
        if not row["fell_back"]:
          self.assertEqual(did[chosen], wanted)
        else:
          self.assertEqual(chosen, same["critique_of"])
        if chosen == same["critique_of"]:
          self.assertEqual((row["text"], row["reward"]), (same["text"], same["reward"]))
        # It was asked for, with this answer and this critique.
        end = json.dumps([
            {"role": "assistant", "content": text["answers"][prompt, row["chain"]]},
            {"role": "user", "content": text["critiques"][prompt, chosen] + REFINE}])[1:]
        self.assertTrue(any(one.endswith(end) for one in shown))
    self.assertGreater(turned, 10)

  def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(self):
    whole, calls = self.run_scripted()
    want = {path.name: path.read_bytes() for path in critique_refine.chains_of(whole).iterdir()}
    self.assertLen(want, 7)
    for moment in range(len(calls)):
      workdir = self.create_tempdir().full_path
      with self.assertRaises(Killed):
        self.run_scripted(workdir=workdir, dies_at=moment)
      _, rest = self.run_scripted(workdir=workdir)
      self.assertLen(rest, len(calls) - moment)
      self.assertEqual({path.name: path.read_bytes()
                        for path in critique_refine.chains_of(workdir).iterdir()}, want)

  @parameterized.parameters(*critique_refine.STAGES)
  def test_a_stage_that_is_removed_is_made_again_from_the_others(self, name):
    workdir, _ = self.run_scripted()
    path = critique_refine.chains_of(workdir) / f"{name}.jsonl"
    want = path.read_bytes()
    path.unlink()
    self.run_scripted(workdir=workdir)
    self.assertEqual(path.read_bytes(), want)

  def test_the_table_comes_from_the_chains_alone(self):
    workdir, _ = self.run_scripted()
    numbers, picture = (pathlib.Path(workdir, f"critique_refine.{end}") for end in ("json", "png"))
    want = numbers.read_bytes()
    numbers.unlink(), picture.unlink()
    nothing = mock.Mock(side_effect=AssertionError("opened"))
    with (mock.patch.object(policies, "load", nothing),
          mock.patch.object(policies, "outline", nothing)):
      critique_refine.run(small(), workdir)
    self.assertEqual(numbers.read_bytes(), want)
    self.assertEqual(picture.read_bytes()[:4], b"\x89PNG")
    self.assertEqual(json.loads(want)["means"]["S only"]["pass@4"]["prompts"], PROMPTS)

  def test_of_guarded_data_ids_and_numbers_are_left_and_make_the_table(self):
    plain, calls = self.run_scripted()
    with mock.patch.object(builders, "is_guarded", return_value=True):
      workdir = self.create_tempdir().full_path
      with self.assertRaises(Killed):
        self.run_scripted(workdir=workdir, dies_at=len(calls) - 1)
      self.assertFalse(critique_refine.chains_of(workdir).exists())
      _, again = self.run_scripted(workdir=workdir)  # from the beginning
      self.assertLen(again, len(calls))
      left = critique_refine.read(workdir)
      for name, rows in critique_refine.read(plain).items():
        self.assertEqual(left[name], [{key: x for key, x in row.items() if key != "text"}
                                      for row in rows])
      critique_refine.chains_of(workdir).joinpath("selected_worst.jsonl").unlink()
      self.assertLen(self.run_scripted(workdir=workdir)[1], len(calls))  # a stage needs the others
      _, none = self.run_scripted(workdir=workdir)
      self.assertEmpty(none)
    self.assertEqual(*(pathlib.Path(where, "critique_refine.json").read_text()
                       for where in (plain, workdir)))

  def test_without_reuse_there_are_four_stages(self):
    workdir, calls = self.run_scripted(reuse_critiques=False)
    self.assertEqual(tuple(critique_refine.read(workdir)), critique_refine.STAGES[:4])
    self.assertLen(calls, 12)


class BadCritiqueTest(ScriptedTest):
  """The critic says nothing, or cannot stop, or there is no room for what it is to read."""

  def chains(self, critic, student=None, **changes):
    """All stages, and the refinements that were asked for, when the critic says `critic`."""
    answer = lambda messages: said(f"#### {len(messages[0]['content']) % 10}")

    def say(name, messages, rng):
      if name == "critic":
        return critic(messages) if "Proposed solution" in messages[0]["content"] else said("#### 1")
      return answer(messages) if len(messages) == 1 else (student or answer)(messages)

    workdir, calls = self.run_scripted(say, **changes)
    return critique_refine.read(workdir), [
        messages for name, how, conversations in calls if how == "refine"
        for messages in conversations]

  def stands(self, found, how):
    for name in critique_refine.STAGES[3:]:
      answers = {(row["prompt"], row["chain"]): row for row in found["answers"]}
      for row in found[name]:
        before = answers[row["prompt"], row["chain"]]
        self.assertEqual((row["text"], row["reward"], row["how"], row["tokens"]),
                         (before["text"], before["reward"], how, 0))

  @parameterized.parameters("", " \n", "<think></think>", "<think>I cannot tell, and go on")
  def test_an_empty_critique_leaves_the_answer_as_it_is(self, text):
    found, asked = self.chains(lambda messages: said(text))
    self.assertEmpty(asked)
    self.stands(found, "no critique")

  def test_a_critique_without_end_is_shown_as_far_as_it_goes_and_counted(self):
    endless = "Line 1 was wrong. " * 20
    found, asked = self.chains(lambda messages: said(endless, ended=False))
    self.assertEqual({row["how"] for row in found["critiques"]}, {"cut off"})
    for messages in asked:
      self.assertEqual(messages[-1]["content"], endless.strip() + REFINE)
    notes = evals.notes(evals.study(found, [1, 2, 4], seed=0))
    self.assertIn(f"critiques: {PROMPTS * CHAINS} of {PROMPTS * CHAINS} cut off", notes)

  def test_without_room_for_the_critic_nobody_criticizes(self):
    found, asked = self.chains(lambda messages: None)
    self.assertEmpty(asked)
    self.assertEqual({row["how"] for row in found["critiques"]}, {"too long"})
    self.stands(found, "no critique")

  def test_without_room_for_the_critique_the_answer_stands(self):
    found, asked = self.chains(lambda messages: said("Wrong."), student=lambda messages: None)
    self.assertNotEmpty(asked)
    self.stands(found, "too long")

  def test_a_question_too_long_for_the_weak_model_is_not_answered_by_it(self):
    say = lambda name, messages, rng: None if name == "critic" else guess(name, messages, rng)
    workdir, _ = self.run_scripted(say)
    for row in critique_refine.read(workdir)["weak_answers"]:
      self.assertEqual((row["text"], row["how"], row["reward"]), ("", "too long", 0.0))

  def test_one_empty_critique_changes_no_other_chain(self):
    seen = []

    def critic(messages):
      seen.append(messages)
      return said("" if len(seen) == 2 else "Wrong.")

    found, _ = self.chains(critic)
    self.assertEqual([row["how"] for row in found["refinements"]],
                     ["ended", "no critique"] + ["ended"] * (PROMPTS * CHAINS - 2))

  @parameterized.parameters(True, False)
  def test_thoughts_are_shown_only_if_asked_for(self, remove):
    think = "<think>hm, {}</think>\n\n{}"
    found, asked = self.chains(
        lambda messages: said(think.format("critic", "Line 2 was wrong.")),
        student=lambda messages: said(think.format("student", "#### 1")), remove_thinking=remove)
    for messages in asked:
      self.assertEqual("hm, critic" in messages[-1]["content"], not remove)
      self.assertEndsWith(messages[-1]["content"], "Line 2 was wrong." + REFINE)
    self.assertIn("hm, student", found["refinements"][0]["text"])  # rows are what was sampled


class ModelsTest(parameterized.TestCase):

  def test_two_tokenizers_and_a_template_that_thinks(self):
    """A real run: S's template thinks, W reads bytes and hardly ever ends."""
    folder = self.create_tempdir().full_path
    tokenizers.byte_tokenizer().save(folder)
    thinks = tokenizers.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    self.assertNotEqual(thinks, tokenizers.CHATML)
    config = small(
        student=dict(source="tiny:student", chat_template=thinks),
        critic=dict(source="random:tiny_student", tokenizer=folder),
        rollout=dict(max_prompt=240, max_response=28), critique=dict(max_response=24),
        eval=dict(prompts=3, samples=2, ks=(1, 2)))
    configs.validate(config)
    workdir = self.create_tempdir().full_path
    main.remember(config, workdir)
    critique_refine.run(config, workdir)
    found = critique_refine.read(workdir)
    endless = [row for row in found["critiques"] if row["how"] == "cut off"]
    self.assertGreater(len(endless), 2)
    self.assertEqual({row["tokens"] for row in endless}, {24})

    folder = critique_refine.chains_of(workdir)
    answers = {row["id"]: row["answer"] for row in critique_refine.read_prompts(config, folder)}
    for row in found["answers"] + found["refinements"] + found["selected_best"]:
      wanted = verifiers.VERIFIERS["exact_match"](row["text"], answers[row["prompt"]])
      self.assertEqual(row["reward"], wanted.reward)
    student, critic = (policies.outline(config[name], config.model).tokenizer
                       for name in ("student", "critic"))
    asked = chat.question("Compute 1+1-1 mod 10.")
    self.assertEndsWith(student.hf.decode(student.encode_chat(asked)), "assistant\n<think>\n")
    self.assertGreater(len(critic.encode_chat(asked)), len(student.encode_chat(asked)))

    # Broken off in the middle of a line it ends the same, without the critic, who has done his.
    want = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("refinements", "selected_worst"):
      path = folder / f"{name}.jsonl"
      path.write_bytes(want[path.name][:-30])
    loaded = mock.Mock(side_effect=policies.load)
    with mock.patch.object(policies, "load", loaded):
      critique_refine.run(config, workdir)
    self.assertEqual({path.name: path.read_bytes() for path in folder.iterdir()}, want)
    self.assertEqual([call.args[0].source for call in loaded.call_args_list], ["tiny:student"])

    # Other weights under the same name, other prompts, another config: none goes on.
    (folder / "refinements.jsonl").unlink()
    with mock.patch.object(policies, "fingerprint", return_value="other"):
      with self.assertRaisesRegex(ValueError, "the student's weights changed since the rows"):
        critique_refine.run(config, workdir)
    lines = want["answers.jsonl"].decode().replace(found["answers"][0]["prompt"], "another")
    (folder / "answers.jsonl").write_text(lines)
    with self.assertRaisesRegex(ValueError, "are of other prompts \\('another' where the data has"):
      critique_refine.run(config, workdir)
    for changes, message in ((dict(critic=dict(source="tiny:weak")), "critic.source: random:"),
                             (dict(data=dict(eval_split="train")), "data.eval_split: test there"),
                             (dict(student=dict(source="tiny:teacher")), "student.source")):
      with self.assertRaisesRegex(ValueError, message):
        main.remember(small(**changes), workdir)

  def test_greedy_critiques_are_what_the_weak_model_says_to_each_answer_alone(self):
    config = small(eval=dict(prompts=3, samples=2, ks=(1,), batch=2), reuse_critiques=False)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    answers = [f"{i}+1={i + 1}\n#### {i}" for i in range(6)]
    with jax.set_mesh(mesh):
      speak = critique_refine.speaker(config, "critic", pathlib.Path(self.create_tempdir()), mesh)
      weak = policies.load(config.critic, config.model, keys.root(0), mesh)
      alone = responder.make(weak, critique_refine.lengths(config, "critique"),
                             Sampling(temperature=0.0), 1, mesh)
      asked = [chat.critique_request(chat.question("Compute 3+4-2 mod 10."), answer)
               for answer in answers]
      found = speak("critique", asked, keys.root(7))
      self.assertEqual([response.text for response in found],
                       [alone(weak.params, [one], keys.root(i))[0].text
                        for i, one in enumerate(asked)])

  @parameterized.parameters(
      (dict(critique=dict(max_response=0)), "critique.max_response is 0; it must be at least 1"),
      (dict(critique=dict(top_p=0.0)), "critique.top_p is 0.0"),
      (dict(refine=dict(temperature=-1.0)), "refine.temperature is -1.0"),
      (dict(eval=dict(ks=(8,))), "eval.samples >= 8, found 4"),
      (dict(eval=dict(ks=())), r"eval.ks is \(\)"),
      (dict(critic=dict(source="tiny:weakest")), "unknown model source 'tiny:weakest'"),
      (dict(critic=dict(alpha=2.0)), "critic.alpha is 2, which has no effect without critic.base"),
      (dict(critique=dict(max_response=500)), "112 . 500 = 612 tokens, but the critic allows 512"),
      (dict(rollout=dict(max_response=500)), "112 . 500 = 612 tokens, but the student allows 512"),
  )
  def test_bad_input_is_refused_before_anything_is_sampled(self, changes, message):
    workdir = self.create_tempdir().full_path
    with self.assertRaisesRegex(ValueError, message):
      config = small(**changes)
      configs.validate(config)
      critique_refine.run(config, workdir)
    with self.assertRaisesRegex(ValueError, "has no chains"):
      critique_refine.read(workdir)

  def test_a_folder_without_chains_is_named(self):
    with self.assertRaisesRegex(ValueError, "chains has no chains; name the workdir"):
      critique_refine.read(self.create_tempdir().full_path)


if __name__ == "__main__":
  absltest.main()
