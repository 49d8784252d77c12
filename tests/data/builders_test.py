"""Data sets hold what was put in, say where a row is bad, and are never read stale."""

import base64
import gzip
import json
import math
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import zlib

from absl.testing import absltest, parameterized
import ml_collections

from opd_jax import verifiers
from opd_jax.data import builders, chat
from opd_jax.data.builders.arithmetic import chains, examples
from opd_jax.verifiers import exact_match, multiple_choice, unit_tests

GOOD = '{"id": "x", "q": "2+2?", "a": 4}'
METHOD = "class Solution:\n  def add(self, x: int, ys: List[int]) -> int:"
INDENT = re.compile(r"^", re.MULTILINE)
MIX = dict(plain=0.3, peers=0.2, failures=0.1, refine=0.2, critic=0.2)
RUBRIC = "{question}\n\n{answer}\n\n{critique}\n\nyes or no?"


class JsonlTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, "rows.jsonl")
    self.cache = self.create_tempdir().full_path

  def open(self, *lines, split="train", **changes):
    self.path.write_text("\n".join(lines))
    arguments = {**dict(train=str(self.path), question="q", answer="a"), **changes}
    return builders.open_source("jsonl", arguments, split, self.cache)

  def test_rows_come_back_as_they_went_in(self):
    row = self.open('{"id": "x", "q": "2+2? 🙂", "a": 4, "r": "<<2+2=4>>4"}', "", response="r",
                    strip_marks=True, template="{question} !", system="Be brief.")[0]
    self.assertEqual(row, dict(
        id="x", task="jsonl", level=0, answer="4", response="4", teacher="", group="",
        messages=json.dumps(chat.question("2+2? 🙂 !", "Be brief."))))

  def test_a_folder_of_plain_and_compressed_files_is_one_data_set(self):
    (self.path.parent / "a.jsonl").write_text(GOOD)
    with gzip.open(self.path.parent / "b.jsonl.gz", "wt") as file:
      file.write(GOOD.replace('"x"', '"z"'))
    source = self.open(GOOD.replace('"x"', '"y"'), train=str(self.path.parent))
    self.assertCountEqual([source[i]["id"] for i in range(len(source))], ["x", "y", "z"])

  @parameterized.parameters(
      ((GOOD, '{"id": "y", "q": "?"}'), r"rows.jsonl, line 2: no field 'a'; the row has \['id'"),
      ((GOOD, "", '{"id": "y", "a": 1}'), r"rows.jsonl, line 3: no field 'q'"),
      (('{"q": "?", "a": 1}',), r"rows.jsonl, line 1: no field 'id'"),
      ((GOOD, "{oops"), r"rows.jsonl, line 2: not JSON"),
      (("[1]",), r"rows.jsonl, line 1: a list, wanted a JSON object"),
      (('{"id": "x", "q": "?", "a": null}',), "line 1: field 'a' is null; wanted text or a number"),
      (('{"id": "x", "q": "?", "a": [4]}',), r"line 1: field 'a' is \[4\]; wanted text or a num"),
      (('{"id": "x", "q": "?", "a": true}',), "line 1: field 'a' is true; wanted text or a number"),
      ((GOOD, '{"id": "y", "q": "\\ud83d", "a": 1}'), "line 2: field 'q' holds half a character"),
      ((GOOD, GOOD), "line 2: field 'id' is 'x', as in an earlier row; ids must differ"),
      (("", " "), r"no rows in '.*rows.jsonl'; wanted one JSON object a line"),
  )
  def test_bad_rows_are_named_by_file_line_and_field(self, lines, message):
    with self.assertRaisesRegex(ValueError, message):
      self.open(*lines)
    self.assertEmpty(os.listdir(self.cache))  # nothing half made is left

  @parameterized.parameters(
      ("r.jsonl", b'{"q": "caf\xe9"}', "r.jsonl, line 1: not JSON in UTF-8"),
      ("r.jsonl.gz", GOOD.encode(), "r.jsonl.gz is not a whole gzip file"),
      ("r.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-12], "r.jsonl.gz is not a whole gzip"),
  )
  def test_broken_files_are_named(self, name, content, message):
    path = self.path.with_name(name)
    path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, message):
      self.open(train=str(path))
    self.assertEmpty(os.listdir(self.cache))

  def test_a_byte_order_mark_is_no_text(self):
    self.assertEqual(self.open("\ufeff" + GOOD)[0]["id"], "x")

  @parameterized.parameters(
      (dict(train=""), "builder_kw names no data; set train or test"),
      (dict(train="/no/such"), "no data at '/no/such'"),
      (dict(split="test"), "no split 'test'; it has train"),
      (dict(qq=1), r"builder_kw has \['qq'\], which 'jsonl' does not take; it takes"),
      (dict(template="{q}"), r"template is '{q}'; it must hold"),
      (dict(response="r"), r"line 1: no field 'r'"),
  )
  def test_bad_arguments_are_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      self.open(GOOD, **changes)

  def test_unknown_data_sets_meet_the_known_ones(self):
    with self.assertRaisesRegex(ValueError, "'gsm'; it must be one of arithmetic, critiqued, domains, "):
      builders.open_source("gsm", {}, "train", self.cache)

  def test_a_changed_file_or_argument_is_another_copy_and_an_unchanged_one_is_not(self):
    self.assertEqual(self.open(GOOD)[0]["answer"], "4")
    self.open(GOOD)
    self.assertLen(os.listdir(self.cache), 1)
    self.assertEqual(self.open(GOOD.replace("4", "5"))[0]["answer"], "5")
    self.assertLen(os.listdir(self.cache), 2)
    self.assertEqual(self.open(GOOD, task="sums")[0]["task"], "sums")
    self.assertLen(os.listdir(self.cache), 3)

  def test_a_renamed_file_is_another_copy_since_its_name_may_be_in_the_ids(self):
    for name in ("one.jsonl", "two.jsonl"):
      self.path = self.path.with_name(name)
      source = self.open(GOOD, train=str(self.path.parent), id="")
      self.assertEqual(source[0]["id"], f"{name}-1")
      self.path.unlink()

  def test_two_processes_may_prepare_one_data_set_at_once(self):
    self.path.write_text(GOOD)
    code = ("import sys; from opd_jax.data import builders; sys.stdin.read(1); "
            f"print(builders.open_source('jsonl', dict(train={str(self.path)!r}, question='q', "
            f"answer='a'), 'train', {self.cache!r})[0]['answer'])")
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE) for _ in range(2)]
    self.assertEqual([p.communicate("g")[0].strip() for p in both], ["4", "4"])
    self.assertEqual([p.returncode for p in both], [0, 0])
    self.assertLen(os.listdir(self.cache), 1)

  def test_who_prepares_second_takes_the_firsts_copy(self):
    self.open(GOOD)
    [name] = os.listdir(self.cache)
    folder = pathlib.Path(self.cache, name)
    splits = builders.jsonl.splits(train=str(self.path), question="q", answer="a")
    builders._prepare(splits, folder)  # as if the folder had appeared meanwhile
    self.assertEqual(os.listdir(self.cache), [name])
    self.assertEqual(self.open(GOOD)[0]["id"], "x")

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_gsm8k_rows_verify(self):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"]) / "gsm8k/train.jsonl.gz"
    source = builders.open_source(
        "jsonl", dict(train=str(path), question="question", answer="answer", response="solution",
                      strip_marks=True), "train", self.cache)
    rows = [source[i] for i in range(200)]
    for row in rows:
      self.assertNotIn("<<", row["response"])
      self.assertEqual(exact_match.verify(row["response"], row["answer"]).reward, 1.0, row["id"])
    with verifiers.make("math_answer", workers=1, timeout_s=10.0) as verify:
      verdicts = verify([row["response"] for row in rows], [row["answer"] for row in rows])
    self.assertEqual([v.reward for v in verdicts], [1.0] * 200)


  def test_pairs_and_groups_of_responses(self):
    pair = self.open('{"id": "x", "q": "2+2?", "a": 4, "c": "4", "r": "5"}', chosen="c",
                     rejected="r")[0]
    self.assertEqual(json.loads(pair["group"]), [{"response": "4"}, {"response": "5"}])
    group = [{"response": "4", "weak_logprob": -1.5}, {"response": "", "weak_logprob": -math.inf}]
    row = json.dumps(dict(id="x", q="2+2?", a=4, g=group))
    self.assertEqual(json.loads(self.open(row, group="g")[0]["group"]), group)

  @parameterized.parameters(
      ('"g": []', dict(group="g"), r"line 1: field 'g' is \[\]; wanted a list of objects"),
      ('"g": ["4"]', dict(group="g"), r"wanted a list of objects, each with a text in `response`"),
      ('"g": [{"response": 4}]', dict(group="g"), "each with a text in `response`"),
      ('"c": "4"', dict(chosen="c", rejected="r"), "no field 'r'"),
      ('"c": "4"', dict(chosen="c"), "has chosen='c', rejected='' and group=''; name both"),
  )
  def test_groups_that_are_none_are_named(self, fields, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      self.open('{"id": "x", "q": "?", "a": "B", %s}' % fields, **arguments)

  def test_options_follow_the_question_as_lettered_lines(self):
    row = self.open('{"id": "x", "q": "Why?", "a": "B", "c": ["yes", "no"]}', choices="c",
                    template="{question}\n\nAnswer with a letter.")[0]
    self.assertEqual(json.loads(row["messages"])[0]["content"],
                     "Why?\n\nA: yes\nB: no\n\nAnswer with a letter.")

  @parameterized.parameters(
      ('"c": ["yes", "no"], "a": "C"', "line 1: the answer is 'C'; wanted the letter of one of 2"),
      ('"c": ["yes", "no"], "a": "AB"', "the answer is 'AB'; wanted the letter"),
      ('"c": ["yes"], "a": "A"', r"field 'c' is \[.*\]; wanted a list of 2 to 10 texts"),
      ('"c": [1, 2], "a": "A"', r"field 'c' is \[1, 2\]; wanted a list of 2 to 10 texts"),
      ('"a": "A"', "field 'c' is null; wanted a list"),
  )
  def test_options_that_are_none_are_named(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      self.open('{"id": "x", "q": "Why?", %s}' % fields, choices="c")

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_multiple_choice_rows_verify(self):
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
      path = pathlib.Path(os.environ["OPD_JAX_DATA"], name, "train.jsonl")
      rows = list(builders.jsonl.splits(train=str(path), question="question", answer="answer",
                                        choices="choices")["train"]())
      self.assertGreater(len(rows), 1000)
      for row in rows[::50]:
        content = json.loads(row["messages"])[0]["content"]
        chosen = next(x for x in content.split("\n") if x.startswith(f"{row['answer']}: "))
        self.assertEqual(multiple_choice.verify(chosen, row["answer"]).reward, 1.0, row["id"])
        self.assertEqual(multiple_choice.verify(content, row["answer"]).reward, 0.0, row["id"])


class ProgramsTest(parameterized.TestCase):

  def rows(self, *records):
    path = pathlib.Path(self.create_tempdir().full_path, "rows.jsonl")
    path.write_text("\n".join(map(json.dumps, records)))
    return list(builders.programs.splits(train=str(path))["train"]())

  def test_livecodebench_in_both_forms(self):
    stdin, method = self.rows(
        dict(question_id="a", question_content="Double it.", starter_code="", metadata="{}",
             public_test_cases='[{"input": "3\\n", "output": "6\\n", "testtype": "stdin"}]',
             private_test_cases='[{"input": "4\\n", "output": "8\\n", "testtype": "stdin"}]'),
        dict(question_id="b", question_content="Add.", metadata='{"func_name": "add"}',
             starter_code="class Solution:\n  def add(self, x: int, ys: List[int]) -> int:",
             public_test_cases='[{"input": "3\\n[1, 2]", "output": "6", "testtype": "method"}]',
             private_test_cases=""))
    self.assertEqual(json.loads(stdin["answer"]),
                     dict(stdins=["3\n", "4\n"], stdouts=["6\n", "8\n"]))
    self.assertEqual(json.loads(method["answer"]), dict(
        entry_point="add", before="", atol=0, compare="equal", inputs=["[3, [1, 2]]"],
        outputs=["6"]))
    self.assertIn("```python\nclass Solution:", json.loads(method["messages"])[0]["content"])
    for text, row, reward in (
        ("print(2 * int(input()))", stdin, 1.0), ("print(6)", stdin, 0.0),
        (f"{METHOD}\n    return x + sum(ys)", method, 1.0),
        (f"{METHOD}\n    return x", method, 0.0)):
      self.assertEqual(unit_tests.verify(text, row["answer"]).reward, reward)

  def packed(self, value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

  def test_livecodebenchs_hidden_tests_as_they_are_published(self):
    tests = [{"input": "4\n", "output": "8\n", "testtype": "stdin"}]
    given = dict(question_id="a", question_content="Double it.", starter_code="", metadata="{}",
                 public_test_cases='[{"input": "3\\n", "output": "6\\n", "testtype": "stdin"}]')
    (plain,), (packed,) = (self.rows(dict(given, private_test_cases=text)) for text in (
        json.dumps(tests), self.packed(json.dumps(tests))))
    self.assertEqual(plain, packed)
    self.assertEqual(json.loads(packed["answer"])["stdins"], ["3\n", "4\n"])

  def test_a_pickle_that_would_call_something_is_not_opened(self):
    marked = pathlib.Path(self.create_tempdir().full_path, "called")

    class Hostile:
      def __reduce__(self):
        return os.mkdir, (str(marked),)

    for value, why in ((Hostile(), "posix.mkdir; it is not opened"), (7, "not packed as published"),
                       ([1], "not packed as published")):
      with self.assertRaisesRegex(ValueError, why):
        self.rows(dict(question_id="a", public_test_cases="[]",
                       private_test_cases=self.packed(value)))
    self.assertFalse(marked.exists())

  @parameterized.parameters(
      (dict(task_id="x"), r"line 1: no exercise; the row has \['task_id'\], wanted one of"),
      (dict(task_id="x", test=""), "not the exercise that its field 'test' promises .KeyError"),
      (dict(question_id="x", public_test_cases="[]", private_test_cases="eJx"),
       "not the exercise that its field 'public_test_cases' promises .* hidden tests are no JSON"),
  )
  def test_bad_rows_are_named(self, record, message):
    with self.assertRaisesRegex(ValueError, message):
      self.rows(record)

  @parameterized.parameters(
      ([1, [2]], (1, [2]), (1, [2])), ([[1, 2], [3]], [(5,)], [(1, 2), (3,)]),
      ([[1], 2], ([5], 6), ([1], 2)), (["a"], {"b"}, {"a"}), ("1j", 2j, 1j), ("1.5", 1, 1.5),
      ("1j", 1, 1j),
      ({"a": [1]}, {"b": (2,)}, {"a": (1,)}), ([], (1,), ()), (3, "x", 3), ([[]], [()], [()]),
      ([1, [2]], [(3,)], [1, (2,)]), ([1, [2, [3]]], (1, (2,)), (1, (2, (3,)))),
  )
  def test_types_are_the_examples(self, value, example, want):
    found = builders.programs.argument(value, example)
    self.assertEqual(repr(found), repr(want))

  @absltest.skipUnless("OPD_JAX_DATA" in os.environ, "OPD_JAX_DATA is not set")
  def test_inputs_have_the_types_that_contracts_ask_for(self):
    path = pathlib.Path(os.environ["OPD_JAX_DATA"], "mbpp_plus/half.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
      records = [json.loads(line) for line in lines]
    rows = list(builders.programs.splits(test=str(path))["test"]())
    self.assertLen(rows, 194)
    for record, row in zip(records, rows):
      # The contract is the beginning of the solution's body: asserts about its arguments.
      answer = json.loads(row["answer"])
      [head] = re.findall(rf"^def {record['entry_point']}\s*\((.*?)\)", answer["solution"], re.M)
      space = {}
      exec(answer["solution"], space)  # its imports
      exec(f"def contract({head}):\n  if True:\n{INDENT.sub('    ', record['contract'])}\n", space)
      if record["task_id"] != "Mbpp/267":  # an input of its own data breaks its contract
        for arguments in answer["inputs"][:20]:
          space["contract"](*eval(arguments))


class ToolUseTest(parameterized.TestCase):

  def test_documentation_and_question_make_the_prompt(self):
    path = pathlib.Path(self.create_tempdir().full_path, "rows.jsonl")
    record = dict(id="x", api="Cats", description="All {question} cats", question="Show one.",
                  functions={"get": "Get it", "components": "#Cat: Object"},
                  answer=[{"Action": "get", "Action_Input": '{"n":1}'}])
    path.write_text(json.dumps(record))
    for ordered in (False, True):
      [row] = builders.tool_use.splits(train=str(path), ordered=ordered)["train"]()
      calls = [{"Action": "get", "Action_Input": '{"n": 1}'}]
      self.assertEqual(json.loads(row["answer"]),
                       {"ordered": True, "calls": calls} if ordered else calls)
      self.assertEqual(row["response"], 'Action: get\nAction Input: {"n": 1}')
    content = json.loads(row["messages"])[0]["content"]
    self.assertIn("Name: Cats\nDescription: All {question} cats\nDocumentation:\nget: Get it\n#Cat",
                  content)
    self.assertEndsWith(content, "Question: Show one.")

  @parameterized.parameters(
      (dict(answer=[{"Action": "get", "Action_Input": "[]"}]), "line 1: .*AttributeError: 'list'"),
      (dict(answer=[{"Action": "get"}]), "line 1: no calls .KeyError: 'Action_Input'"),
      (dict(answer=[{"Action": "get", "Action_Input": "{"}]), "no rows in"),
      (dict(answer=[]), "KeyError: 'functions'"),
  )
  def test_bad_rows_are_named(self, record, message):
    path = pathlib.Path(self.create_tempdir().full_path, "rows.jsonl")
    path.write_text(json.dumps(dict(id="x", **record)))
    with self.assertRaisesRegex(ValueError, message):
      list(builders.tool_use.splits(train=str(path))["train"]())


class ArithmeticTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 3)
  def test_answers_are_right_by_another_route(self, digits):
    rng = random.Random(digits)
    for _ in range(200):
      chain = chains.sample(rng, digits, rng.randint(1, 8))
      total = chain.start
      for operator, operand in chain.steps:
        total = eval(f"({total}) {operator} {operand}")  # never reduced until the end
      self.assertEqual(chains.answer(chain), str(total % chain.modulus))
      self.assertEqual(chains.parse(chains.question(chain)), chain)

  @parameterized.product(digits=(1, 2, 3), steps=(1, 2, 8))
  def test_a_corrupted_solution_never_verifies(self, digits, steps):
    rng = random.Random(0)
    for _ in range(200):
      chain = chains.sample(rng, digits, steps)
      for wrong in (chains.corrupt(chain, rng), chains.corrupt(chain, rng, where=steps - 1)):
        self.assertEqual(exact_match.verify(wrong, chains.answer(chain)).reward, 0.0)
        self.assertLen(wrong.split("\n"), steps + 1)

  def test_a_mistake_that_cannot_matter_moves_elsewhere(self):
    chain = chains.parse("Compute 3+4*5*2 mod 10.")
    wrong = chains.corrupt(chain, random.Random(0), where=0)
    self.assertEqual(exact_match.verify(wrong, chains.answer(chain)).reward, 0.0)

  def test_critiques_find_the_first_mistake_and_put_it_right(self):
    rng = random.Random(0)
    for _ in range(300):
      chain = chains.sample(rng, rng.choice((1, 2)), rng.randint(1, 8))
      right, wrong = chains.solution(chain).split("\n"), chains.corrupt(chain, rng).split("\n")
      first = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b)
      *working, verdict = chains.critique(chain, "\n".join(wrong)).split("\n")
      self.assertEqual(working, right[:first + 1])
      self.assertEqual(verdict, f"Line {first + 1} was wrong.")
      self.assertEqual(chains.critique(chain, "\n".join(right)).split("\n"),
                       [*right, "No mistake."])

  def test_a_response_that_stops_early_is_put_right_where_it_stops(self):
    chain = chains.parse("Compute 3+4*7-2 mod 10.")
    self.assertEqual(chains.critique(chain, "3+4=7\n7*7=9"),
                     "3+4=7\n7*7=9\n9-2=7\nLine 3 was wrong.")

  def test_misleading_critiques_attack_what_is_right(self):
    rng = random.Random(0)
    for _ in range(300):
      chain = chains.sample(rng, rng.choice((1, 2)), rng.randint(1, 8))
      attempt = rng.choice((chains.solution(chain), chains.corrupt(chain, rng), "", "3+4=7"))
      *working, claimed, verdict = chains.misleading_critique(chain, attempt, rng).split("\n")
      right = chains.lines(chain)
      self.assertEqual(working, right[:len(working)])
      self.assertNotIn(claimed, [right[len(working)], *attempt.split("\n")[len(working):][:1]])
      self.assertEqual(verdict, f"Line {len(working) + 1} was wrong.")

  @parameterized.parameters("", "Compute 3 mod 10.", "Compute 3+4 mod 10", "x Compute 3+4 mod 10.")
  def test_other_questions_are_refused(self, text):
    with self.assertRaisesRegex(ValueError, "not a question of the arithmetic data set"):
      chains.parse(text)

  def test_every_rows_response_verifies_and_critics_are_right(self):
    rows = list(examples.rows(count=600, seed=0, digits=(1, 2), min_steps=3, max_steps=5,
                              mix=MIX | dict(judge=0.2), beyond=0.5, rubric=RUBRIC))
    self.assertEqual({r["task"] for r in rows}, {f"arithmetic/{k}" for k in examples.KINDS})
    self.assertLen({r["id"] for r in rows}, 600)
    judged = []
    for row in rows:
      messages = json.loads(row["messages"])
      chain = chains.parse(messages[0]["content"].split("\n\n")[0])
      self.assertEqual(row["answer"], chains.answer(chain))
      self.assertEqual(row["level"], examples.level(chain.digits, len(chain.steps)))
      if row["task"] == "arithmetic/critic":
        attempt = messages[0]["content"].split("Proposed solution:\n")[1].split("\n\n")[0]
        correct = exact_match.verify(attempt, row["answer"]).reward == 1.0
        self.assertEqual("wrong" not in row["response"], correct)
      elif row["task"] == "arithmetic/judge":
        _, attempt, critique, asked = messages[0]["content"].split("\n\n")
        self.assertEqual(asked, "yes or no?")
        self.assertEqual(row["response"],
                         "yes" if critique == chains.critique(chain, attempt) else "no")
        judged.append(row["response"])
      else:
        self.assertEqual(exact_match.verify(row["response"], row["answer"]).reward, 1.0)

    self.assertAlmostEqual(judged.count("yes") / len(judged), 0.5, delta=0.15)

  def test_a_judges_rows_want_a_rubric_that_begins_with_the_question(self):
    kwargs = dict(train=10, test=5, mix=dict(judge=1.0))
    wrong = self.create_tempfile(content="Is {answer} right?").full_path
    for rubric in ("", wrong):
      with self.assertRaisesRegex(ValueError, "name a file that begins with {question}"):
        builders.arithmetic.splits(**kwargs, rubric=rubric)
    shipped = pathlib.Path(__file__).parents[2] / "configs/rubrics/short.txt"
    rows = list(builders.arithmetic.splits(**kwargs, rubric=str(shipped))["train"]())
    self.assertEqual({row["response"] for row in rows}, {"yes", "no"})
    self.assertEndsWith(json.loads(rows[0]["messages"])[0]["content"],
                        "\n\nIs this critique right? Answer yes or no.\n")

  def test_training_never_asks_a_test_question_whatever_surrounds_it(self):
    splits = builders.arithmetic.splits(train=2000, test=300, mix=MIX, digits=(1,), min_steps=1,
                                        max_steps=3)
    def asked(name):
      return {json.loads(row["messages"])[0]["content"].split("\n\n")[0]
              for row in splits[name]()}
    self.assertNotEmpty(asked("train"))
    self.assertEmpty(asked("test") & asked("train"))

  def test_rows_depend_on_the_seed_alone(self):
    def made(seed):
      kwargs = dict(train=50, test=5, mix=MIX, seed=seed)
      return list(builders.arithmetic.splits(**kwargs)["train"]())
    self.assertEqual(made(1), made(1))
    self.assertNotEqual(made(1), made(2))

  def test_of_critiques_half_are_shown_without_the_attempt(self):
    splits = builders.critiqued.splits(train=400, test=100, digits=(1,), max_steps=3)
    rows = {name: list(make()) for name, make in splits.items()}
    self.assertEqual(rows, {name: list(make()) for name, make in splits.items()})
    asked = {name: {json.loads(row["messages"])[0]["content"].partition("\n\n")[0] for row in found}
             for name, found in rows.items()}
    self.assertEmpty(asked["train"] & asked["test"])
    alone = whole = 0
    for row in rows["train"]:
      messages = json.loads(row["messages"])
      chain = chains.parse(messages[0]["content"].partition("\n\n")[0])
      self.assertEqual((row["answer"], row["response"]),
                       (chains.answer(chain), chains.solution(chain)))
      self.assertEqual(row["level"], examples.level(chain.digits, 3))
      if len(messages) == 1:
        _, said, again = messages[0]["content"].split("\n\n")
        said, alone = said.removeprefix(f"{chat.CRITIQUE}\n"), alone + 1
      else:
        said, again = messages[2]["content"].split("\n\n")
        further = 3 if chain.digits == 3 else 0
        self.assertEqual(said, chains.critique(chain, messages[1]["content"], further))
      self.assertEqual(again, chat.SOLVE_AGAIN)
      if chain.digits == 3:  # beyond S: all that it needs has been said
        self.assertStartsWith(said, "\n".join(chains.lines(chain)))
        whole += 1
    self.assertAlmostEqual(alone / len(rows["train"]), 0.5, delta=0.1)
    self.assertAlmostEqual(whole / len(rows["train"]), 0.5, delta=0.1)

  def test_a_share_within_an_argument_is_another_copy_too(self):
    cache = self.create_tempdir().full_path
    for plain in (0.3, 0.7, 0.3):
      mix = ml_collections.ConfigDict(dict(plain=plain, peers=1.0 - plain))
      builders.open_source("arithmetic", dict(train=4, test=4, mix=mix), "train", cache)
    self.assertLen(os.listdir(cache), 2)

  def test_rows_name_the_teacher_of_their_digits(self):
    source = builders.open_source("arithmetic", dict(
        train=20, test=1, mix=dict(plain=1.0), teachers={"1": "easy"}), "train",
                                  self.create_tempdir().full_path)
    for row in (source[i] for i in range(20)):
      self.assertEqual(row["teacher"], "easy" if row["level"] < 200 else "")

  def test_rows_survive_the_disk(self):
    kwargs = dict(train=20, test=5, mix=MIX)
    source = builders.open_source("arithmetic", kwargs, "train", self.create_tempdir().full_path)
    want = list(builders.arithmetic.splits(**kwargs)["train"]())
    self.assertCountEqual([json.dumps(source[i], sort_keys=True) for i in range(len(source))],
                          [json.dumps({**row, "group": ""}, sort_keys=True) for row in want])


class DomainsTest(parameterized.TestCase):

  def rows(self, split="train", **changes):
    kwargs = dict(train=600, test=60, seed=1) | changes
    return list(builders.domains.splits(**kwargs)[split]())

  def test_every_solution_is_right_by_its_own_rules(self):
    for row in self.rows():
      question = json.loads(row["messages"])[0]["content"]
      *working, last = row["response"].split("\n")
      self.assertEqual(last, f"#### {row['answer']}")
      self.assertEqual(exact_match.verify(row["response"], row["answer"]).reward, 1.0)
      digits = [int(x) for x in re.findall(r"\d", question)]
      if row["task"] == "sort":
        self.assertEqual(row["answer"], ",".join(map(str, sorted(digits))))
        self.assertEqual([int(line[-1]) for line in working], sorted(digits))
      elif row["task"] == "count":
        bound, *listed = digits
        self.assertEqual(int(row["answer"]), sum(x > bound for x in listed))
        self.assertLen(working, len(listed))
      elif row["task"] == "keep":
        bound, *listed = digits
        self.assertEqual(row["answer"], ",".join(str(x) for x in listed if x > bound))
        self.assertEqual([line.split(":")[0] for line in working], list(map(str, listed)))
      else:
        self.assertEqual(row["answer"], chains.answer(chains.parse(question)))
      self.assertLen(working, row["level"])

  def test_tasks_come_by_turns_and_name_their_teachers_if_they_shall(self):
    rows = self.rows(tasks=("sort", "count"), route=True)
    self.assertEqual([row["task"] for row in rows[:4]], ["sort", "count"] * 2)
    self.assertTrue(all(row["teacher"] == row["task"] for row in rows))
    self.assertTrue(all(row["teacher"] == "" for row in self.rows()))

  def test_a_tasks_questions_do_not_depend_on_the_other_tasks(self):
    alone = [row["messages"] for row in self.rows("test", tasks=("sort",), test=15)]
    among = [row["messages"] for row in self.rows("test") if row["task"] == "sort"]
    self.assertEqual(alone, among)

  def test_training_never_asks_a_test_question(self):
    size = dict(train=3000, test=600)  # of three digits to be sorted there are but a thousand
    asked = {row["messages"] for row in self.rows("test", **size)}
    self.assertEmpty(asked & {row["messages"] for row in self.rows(**size)})

  def test_a_task_that_does_not_exist_is_refused(self):
    for tasks in ((), ("sort", "knit")):
      with self.assertRaisesRegex(ValueError, "must name some of chain, sort, count, keep"):
        builders.domains.splits(train=1, test=1, tasks=tasks)


if __name__ == "__main__":
  absltest.main()
