"""Accuracy is counted right, and evaluation pairs prompts, keys and verdicts."""

import itertools

from absl.testing import absltest, parameterized
import numpy as np

from opd_jax import config as configs
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.builders.arithmetic import chains
from opd_jax.evals import context_use, metrics, run
from opd_jax.verifiers import exact_match


class MetricsTest(parameterized.TestCase):

  @parameterized.parameters(*itertools.product((1, 4, 6), (0, 1, 3, 6), (1, 2, 4)))
  def test_pass_at_k_is_the_share_of_subsets_with_a_success(self, n, c, k):
    if c > n or k > n:
      with self.assertRaises(ValueError):
        metrics.pass_at_k(n, c, k)
      return
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    self.assertAlmostEqual(metrics.pass_at_k(n, c, k), np.mean([any(s) for s in subsets]))


class EvaluateTest(absltest.TestCase):

  def test_every_prompt_meets_its_own_answer_and_filler_is_not_counted(self):
    tokenizer = tokenizers.byte_tokenizer()
    rows = [dict(id=str(i), task="echo", level=i, answer=str(i), prompt_ids=tokenizer.encode(str(i)))
            for i in range(5)]

    def sample(params, batch, key):  # a policy that answers with its prompt, and ends if even
      ids = [np.asarray(p)[m].tolist() for p, m in zip(batch.prompt, batch.prompt_mask)]
      texts = [tokenizer.encode("#### ") + row for row in ids]
      texts = [t + [tokenizer.eos_ids[0]] if t[-1] % 2 else t for t in texts]
      response = np.array([t + [0] * (8 - len(t)) for t in texts])
      mask = np.arange(8) < np.array([len(t) for t in texts])[:, None]
      return batch.replace(response=response, mask=mask)

    config = configs.on_policy(eval=dict(batch=2, samples=3, ks=(1, 3))).eval
    verify = lambda texts, answers: [exact_match.verify(*pair) for pair in zip(texts, answers)]
    found, records = run.evaluate(config, rows, None, sample, tokenizer, verify, (4,),
                                  lambda params, batch: np.ones_like(batch.mask, np.float32))
    self.assertLen(records, 5)
    self.assertEqual(found["mean@3"], 1.0)
    self.assertEqual(found["pass@3"], 1.0)
    self.assertAlmostEqual(found["reverse_kl"], 1.0)
    self.assertEqual([r["id"] for r in records], [row["id"] for row in rows])
    ended = [tokenizer.encode(str(i))[0] % 2 for i in range(5)]
    self.assertEqual([r["truncated"] for r in records], [1.0 - e for e in ended])


class ContextUseTest(absltest.TestCase):

  def test_each_condition_shows_what_it_says(self):
    problems = [chains.parse("Compute 3+4*7-2 mod 10."), chains.parse("Compute 47+8-9 mod 100.")]
    self.assertEqual([chains.answer(c) for c in problems], ["7", "46"])
    asked = []

    def respond(conversations):
      asked.append(conversations)
      return ["3+4=7\n7*7=8\n8-2=6\n#### 6", chains.solution(problems[1])]

    table = context_use.study(problems, respond, lambda requests: ["weak"] * len(requests))
    self.assertEqual(table["plain"]["all"], 0.5)
    shown = [turns[0][-1]["content"] for turns in asked]
    self.assertIn("Correct solution:\n3+4=7\n7*7=9", shown[1])
    self.assertIn("A known failed solution", shown[2])
    self.assertStartsWith(shown[3], "3+4=7\n7*7=9\nLine 2 was wrong.")
    self.assertStartsWith(shown[5], "weak\n\n")


if __name__ == "__main__":
  absltest.main()
