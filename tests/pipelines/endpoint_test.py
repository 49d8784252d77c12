"""The client of chat completions against a real server: keys, retries, order, what is refused."""

import json
import os
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized
import ml_collections

from opd_jax import config as configs
from opd_jax.data import chat
from opd_jax.pipelines import endpoint
from tests.pipelines import stub_endpoint
from tests.pipelines.stub_endpoint import says

KEY = "sk-secret/123"


def section(url, **changes):
  return ml_collections.ConfigDict(configs.judged(endpoint=dict(
      url=url, model="judge-1", key_variable="STUB_KEY", retries=2) | changes).endpoint)


def questions(count):
  return [chat.question(f"question {i}") for i in range(count)]


class EndpointTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # A proxy of this machine would not find the stub.
    self.enter_context(mock.patch.dict(os.environ, STUB_KEY=KEY, no_proxy="*"))
    self.enter_context(mock.patch.object(endpoint, "FIRST_PAUSE_S", 0.01))

  def ask(self, respond, count=1, **changes):
    with stub_endpoint.Stub(respond) as stub:
      self.stub = stub
      return list(endpoint.make(section(stub.url, **changes))(questions(count)))

  def test_the_request_is_as_the_api_has_it_and_the_key_is_in_its_header(self):
    found = self.ask(lambda n, body: says("A"))
    self.assertEqual(found, [endpoint.Answer("A", "ended", "stub-2026")])
    asked, = self.stub.asked
    self.assertEqual(asked["headers"]["Authorization"], f"Bearer {KEY}")
    self.assertEqual(asked["headers"]["Content-Type"], "application/json")
    self.assertEqual(asked["path"], "/v1/chat/completions")
    self.assertEqual(asked["body"], dict(model="judge-1", messages=chat.question("question 0"),
                                         temperature=0.0, max_tokens=16))

  def test_settings_are_sent_as_they_are(self):
    self.ask(lambda n, body: says("A"), settings=dict(max_completion_tokens=500))
    self.assertEqual(self.stub.asked[0]["body"], dict(
        model="judge-1", messages=chat.question("question 0"), max_completion_tokens=500))

  def test_an_endpoint_without_keys_is_sent_none(self):
    self.ask(lambda n, body: says("A"), key_variable="")
    self.assertNotIn("Authorization", self.stub.asked[0]["headers"])

  def test_several_are_under_way_and_answers_keep_their_order(self):
    meet = threading.Barrier(3)  # passes only if three are there together

    def respond(n, body):
      number = int(body["messages"][0]["content"].split()[1])
      meet.wait(timeout=30)
      time.sleep(0.05 * (2 - number % 3))  # the last asked is the first to be done
      return says(str(number))

    found = self.ask(respond, 9, at_once=3)
    self.assertEqual([x.text for x in found], [str(i) for i in range(9)])
    self.assertEqual(self.stub.together, 3)

  def test_what_is_not_read_is_not_asked_far_ahead(self):
    with stub_endpoint.Stub(lambda n, body: says("A")) as stub:
      answers = endpoint.make(section(stub.url, at_once=3))(questions(100))
      next(answers)
      answers.close()
      self.assertLessEqual(len(stub.asked), 4)

  @parameterized.parameters(
      (429, "slow down"), (500, "oops"), (503, ""), (408, ""), (200, "<html>starting</html>"),
      (200, "[1]"), (200, '{"choices": []}'), (200, '{"choices": [{"message": null}]}'))
  def test_what_may_pass_is_asked_again(self, status, text):
    found = self.ask(lambda n, body: (status, {}, text) if n < 2 else says("B"))
    self.assertEqual([x.text for x in found], ["B"])
    self.assertLen(self.stub.asked, 3)

  def test_a_busy_endpoint_is_left_alone_as_long_as_it_asks_for(self):
    started = time.monotonic()
    self.ask(lambda n, body: (429, {"Retry-After": "0.3"}, "") if n == 0 else says("A"))
    self.assertGreaterEqual(time.monotonic() - started, 0.3)

  def test_an_endpoint_that_is_slow_is_asked_again(self):
    def respond(n, body):
      time.sleep(1.5 if n == 0 else 0.0)
      return says("A")

    self.assertEqual([x.text for x in self.ask(respond, timeout_s=0.5)], ["A"])
    self.assertLen(self.stub.asked, 2)

  @parameterized.parameters((429, "insufficient_quota"), (200, "<html>what</html>"))
  def test_it_gives_up_after_the_retries_with_the_last_reason(self, status, text):
    with self.assertRaisesRegex(ValueError, f"no answer in 3 tries of at most 120 s; .*{text}"
                                ".*run the same command again"):
      self.ask(lambda n, body: (status, {}, text))
    self.assertLen(self.stub.asked, 3)

  def test_nobody_there(self):
    with stub_endpoint.Stub(lambda n, body: says("A")) as stub:
      url = stub.url
    with self.assertRaisesRegex(ValueError, "no answer in 3 tries.*refused.*see that it runs"):
      list(endpoint.make(section(url))(questions(1)))

  @parameterized.parameters(
      (401, "does not take the key in the environment variable STUB_KEY"),
      (404, "endpoint.url must be the whole address, .* endpoint.model .'judge-1'. one"),
      (405, "endpoint.url must be the whole address"),
      (400, "endpoint.settings, which it may not know"))
  def test_what_will_not_pass_ends_at_once_and_shows_no_key(self, status, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      self.ask(lambda n, body: (status, {}, f"you sent {body['model']} and {KEY}"))
    self.assertLen(self.stub.asked, 1)
    self.assertIn("you sent judge-1 and [key]", str(caught.exception))
    self.assertNotIn("secret", str(caught.exception))

  def test_a_key_is_asked_for_where_none_was_named(self):
    with self.assertRaisesRegex(ValueError, "it wants a key; name the environment variable"):
      self.ask(lambda n, body: (401, {}, ""), key_variable="")

  def test_a_redirection_is_not_followed_with_the_key(self):
    with stub_endpoint.Stub(lambda n, body: says("A")) as other:
      with self.assertRaisesRegex(ValueError, f"it sends to {other.url}, which is not followed"):
        self.ask(lambda n, body: (307, {"Location": other.url}, ""))
      self.assertEmpty(other.asked)

  def test_a_key_said_again_is_blacked_out(self):
    self.assertEqual(self.ask(lambda n, body: says(f"A {KEY}"))[0].text, "A [key]")

  @parameterized.parameters(
      (says(None, "content_filter"), "refused"), (says(None, refusal="I will not."), "refused"),
      (says("", "length"), "cut off"), (says(None), "ended"),
      ((400, {}, json.dumps(dict(error=dict(code="content_filter")))), "refused"),
      ((400, {}, json.dumps(dict(error=dict(code="context_length_exceeded")))), "too long"))
  def test_what_concerns_one_request_alone_is_an_answer(self, said, how):
    found = self.ask(lambda n, body: said if n == 0 else says("B"), 2, at_once=1)
    self.assertEqual([x.how for x in found], [how, "ended"])

  @parameterized.parameters(
      (dict(STUB_KEY=""), {}, "'STUB_KEY', and this environment variable is not set"),
      (dict(STUB_KEY="sk sec\nret"), {}, "STUB_KEY holds spaces or characters"),
      (dict(STUB_KEY="sk-secr€t"), {}, "STUB_KEY holds spaces or characters"),
      ({}, dict(url="localhost:8000/v1"), "must be the whole address, such as http"),
      ({}, dict(url="file:///etc/passwd"), "must be the whole address, such as http"),
      ({}, dict(model=""), "name a model that the endpoint has"))
  def test_what_cannot_work_is_refused_before_anything_is_asked(self, variables, changes, message):
    with mock.patch.dict(os.environ, variables):
      with self.assertRaisesRegex(ValueError, message) as caught:
        endpoint.make(section(**dict(url="http://x/v1") | changes))
    self.assertNotIn("sk", str(caught.exception))

  @parameterized.parameters(
      (dict(key_variable="sk-abc"), "key_variable is not the name of an environment variable"),
      (dict(url="https://me:sk-abc@host/v1"), "endpoint.url names a user"))
  def test_a_key_in_the_config_is_refused_before_the_config_is_written(self, changes, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      configs.validate(configs.judged(endpoint=changes))
    self.assertNotIn("abc", str(caught.exception))


if __name__ == "__main__":
  absltest.main()
