"""A chat-completions endpoint, as OpenAI's API has made them: conversations in, texts out.

The key comes from the environment and goes into the requests' header alone: where the endpoint
says it again it is blacked out, and a redirection is not followed, lest another host be shown it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import http.client
import json
import os
import re
import threading
from typing import Any, NamedTuple
import urllib.error
import urllib.parse
import urllib.request

import ml_collections

from opd_jax.data import chat

FIRST_PAUSE_S = 1.0     # before the second try; each further pause is twice as long
LONGEST_PAUSE_S = 60.0  # whatever the endpoint asks for
# What an endpoint may say of one request without anything being wrong with the others.
OF_ONE = {"content_filter": "refused", "context_length_exceeded": "too long"}
WHOLE = "the whole address, such as http://localhost:8000/v1/chat/completions"


class Answer(NamedTuple):
  text: str
  how: str    # "ended"; "cut off", by the length limit; "refused"; "too long", the request was
  model: str  # that answered, in the endpoint's words


class Again(Exception):
  """A failure that may pass; `after` is how long the endpoint wants to be left alone, seconds."""

  def __init__(self, what: str, after: float = 0.0):
    super().__init__(what)
    self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *arguments: Any) -> None:
    return None  # it is an HTTPError then


def read_key(variable: str) -> str:
  """The key in an environment variable; "" for no variable: the endpoint wants none.

  Raises: ValueError if the variable is not set, or holds what cannot be one, of which it shows
    nothing.
  """
  if not variable:
    return ""
  key = os.environ.get(variable, "").strip()
  if not key:
    raise ValueError(f"endpoint.key_variable is {variable!r}, and this environment variable is not "
                     "set; put the key there, or set endpoint.key_variable='' for an endpoint that "
                     "wants none")
  if not re.fullmatch(r"[!-~]+", key):
    raise ValueError(f"the environment variable {variable} holds spaces or characters that no "
                     "header may have; put the key alone there")
  return key


def make(section: ml_collections.ConfigDict) -> Callable[[Sequence[chat.Messages]],
                                                         Iterator[Answer]]:
  """A function from requests to their answers, in order and as they come.

  `at_once` requests are under way together, and no answer is waited for longer than that many
  others: who stops reading loses at most those. Busy and failing endpoints (408, 429, 5xx, no
  connection, no completion in the body) are asked again, at most `retries` times.

  Args:
    section: url, model, settings, key_variable, timeout_s, retries, at_once.
  Raises: ValueError, there or when read, saying what is wrong and what to do.
  """
  address = urllib.parse.urlsplit(section.url)
  if address.scheme not in ("http", "https") or not address.hostname:
    raise ValueError(f"endpoint.url is {section.url!r}; it must be {WHOLE}")
  if not section.model:
    raise ValueError("endpoint.model is ''; name a model that the endpoint has")
  key = read_key(section.key_variable)
  opener = urllib.request.build_opener(_NoRedirect)
  headers = {"Content-Type": "application/json"} | (
      {"Authorization": f"Bearer {key}"} if key else {})
  hide = lambda text: text.replace(key, "[key]") if key else text

  def post(messages: chat.Messages) -> Answer:
    asked = dict(model=section.model, messages=messages, **section.settings.to_dict())
    request = urllib.request.Request(section.url, json.dumps(asked).encode(), headers)
    try:
      with opener.open(request, timeout=section.timeout_s) as response:
        body = response.read()
    except urllib.error.HTTPError as error:
      return _of_error(section, error, hide)
    except (OSError, http.client.HTTPException) as error:  # a timeout among them
      raise Again(hide(str(getattr(error, "reason", error)) or repr(error))) from None
    return _of_body(hide(body.decode(errors="replace")))

  def patient(messages: chat.Messages, stop: threading.Event) -> Answer:
    for tried in range(section.retries + 1):
      try:
        return post(messages)
      except Again as again:
        last = again
      pause = max(FIRST_PAUSE_S * 2 ** tried, last.after)
      if tried < section.retries and stop.wait(min(pause, LONGEST_PAUSE_S)):
        break
    raise ValueError(
        f"the endpoint {section.url} gave no answer in {tried + 1} tries of at most "
        f"{section.timeout_s:g} s; the last: {last}. What was answered so far is kept: see that it "
        "runs (endpoint.url, a proxy), or ask less at once (endpoint.at_once), and run the same "
        "command again")

  def ask(requests: Sequence[chat.Messages]) -> Iterator[Answer]:
    stop, left = threading.Event(), iter(requests)
    with futures.ThreadPoolExecutor(section.at_once) as pool:
      try:
        waiting = deque(pool.submit(patient, x, stop) for _, x in zip(range(section.at_once), left))
        while waiting:
          answer = waiting.popleft().result()
          waiting.extend(pool.submit(patient, x, stop) for _, x in zip(range(1), left))
          yield answer
      finally:
        stop.set()  # or the others would sit out their pauses

  return ask


def _of_body(body: str) -> Answer:
  """A completion. Raises: Again if it is none: so do proxies answer whose server restarts."""
  try:
    made = json.loads(body)
    choice = made["choices"][0]
    message, why = choice["message"], choice.get("finish_reason")
    said = message.get("content") or ""
    refused = message.get("refusal") or ""
    if not isinstance(said + refused, str):
      raise TypeError
  except (ValueError, LookupError, TypeError, AttributeError):
    raise Again(f"it answered with what is no chat completion, {body[:200]!r}; endpoint.url must "
                f"be {WHOLE}") from None
  how = ("refused" if refused or why == "content_filter" else
         "cut off" if why == "length" else "ended")
  return Answer(refused or said, how, str(made.get("model", "")))


def _of_error(section: ml_collections.ConfigDict, error: urllib.error.HTTPError,
              hide: Callable[[str], str]) -> Answer:
  """What an answer that is not 200 means. Raises: Again, or ValueError for what will not pass."""
  try:
    body = hide(error.read().decode(errors="replace"))
  except (OSError, http.client.HTTPException):
    body = ""
  said = f"{error.code} {error.reason}" + (f", {body[:300]!r}" if body else "")
  if error.code in (408, 429) or error.code >= 500:
    after = error.headers.get("Retry-After", "")
    raise Again(said, float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0) from None
  try:
    code = json.loads(body)["error"]["code"]
  except (ValueError, LookupError, TypeError):
    code = None
  if code in OF_ONE:
    return Answer(body, OF_ONE[code], "")
  if error.code in (401, 403):
    hint = (f"it does not take the key in the environment variable {section.key_variable}"
            if section.key_variable else
            "it wants a key; name the environment variable that holds it in endpoint.key_variable")
  elif error.code in (404, 405):
    hint = f"endpoint.url must be {WHOLE}, and endpoint.model ({section.model!r}) one that it has"
  elif error.code < 400:
    hint = (f"it sends to {hide(error.headers.get('Location', 'nowhere'))}, which is not followed "
            "with a key; name that address in endpoint.url if it is the right one")
  else:
    hint = "look at endpoint.model and endpoint.settings, which it may not know"
  raise ValueError(f"the endpoint {section.url} answered {said}: {hint}") from None
