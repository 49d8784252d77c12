"""Responses to conversations: the likeliest tokens if greedy, whoever else is asked."""

from absl.testing import absltest, parameterized
import jax

from opd_jax import config as configs
from opd_jax import keys, sharding
from opd_jax.data import chat
from opd_jax.pipelines import policy as policies
from opd_jax.pipelines import responder
from opd_jax.rollouts.sampler import Sampling

QUESTIONS = ["Compute 3+4*2.", "1+1=", "What is 9-5+2?", "Compute 7*8-3.", "7"]


class ResponderTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = configs.on_policy(rollout=dict(max_prompt=48, max_response=24))
    cls.mesh = sharding.make_mesh(1, 1)
    with jax.set_mesh(cls.mesh):
      cls.policy = policies.load(cls.config.student, cls.config.model, keys.root(0), cls.mesh)

  def ask(self, questions, rows=2, sampling=Sampling(), rollout=None):
    with jax.set_mesh(self.mesh):
      respond = responder.make(self.policy, rollout or self.config.rollout, sampling, rows,
                               self.mesh)
      return respond(self.policy.params, [chat.question(q) for q in questions],
                     keys.at(keys.root(3), "eval"))

  def test_greedy_responses_are_the_models_own_likeliest_tokens(self):
    found = self.ask(QUESTIONS, sampling=Sampling(temperature=0.0))
    tokenizer = self.policy.tokenizer
    for question, response in zip(QUESTIONS, found):
      prompt = tokenizer.encode_chat(chat.question(question))
      ids = jax.numpy.array([prompt + response.ids])
      positions = jax.numpy.arange(ids.shape[1])[None]
      hidden, _ = self.policy.model.apply(
          {"params": self.policy.params}, ids, positions, jax.numpy.ones_like(ids))
      logits = self.policy.model.apply({"params": self.policy.params}, hidden, method="logits")
      likeliest = logits[0, len(prompt) - 1:-1, :tokenizer.vocab_size].argmax(-1)
      self.assertEqual(likeliest.tolist(), response.ids)
      self.assertEqual(response.text, tokenizer.decode(response.ids))
      self.assertEqual(response.ended, response.ids[-1] in tokenizer.eos_ids)

  def test_a_response_depends_on_its_place_and_not_on_the_others(self):
    found = self.ask(QUESTIONS)
    others = self.ask(["12345"] * 2 + QUESTIONS[2:3] + ["2+2"] * 2)
    self.assertEqual(others[2], found[2])
    self.assertNotEqual(others[0], found[0])

  def test_what_is_too_long_gets_no_response_and_moves_no_other(self):
    found = self.ask(QUESTIONS)
    mixed = self.ask([QUESTIONS[0], "9" * 60, *QUESTIONS[2:]])
    self.assertIsNone(mixed[1])
    self.assertEqual([mixed[0], *mixed[2:]], [found[0], *found[2:]])
    self.assertEqual(self.ask(["9" * 60] * 3), [None] * 3)

  def test_a_response_that_is_cut_off_says_so(self):
    rollout = configs.on_policy(rollout=dict(max_prompt=48, max_response=2)).rollout
    for response in self.ask(QUESTIONS, rollout=rollout):
      self.assertLen(response.ids, 2)
      self.assertFalse(response.ended)


if __name__ == "__main__":
  absltest.main()
