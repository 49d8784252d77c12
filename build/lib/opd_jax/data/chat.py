"""Prompt templates: what a model is told, as lists of chat messages. Pure text.

The wording is ours, the order of the sections is the papers'. Text that comes from data
or from a model is inserted as it is; control tokens inside it are neutralized where text
becomes ids, in `tokenizer.encode_chat`.
"""

from collections.abc import Sequence

Messages = list[dict[str, str]]

SOLVE_AGAIN = "Correctly solve the original question."


def question(text: str, system: str = "") -> Messages:
  """The plain prompt: one user turn, after an optional system turn."""
  head = [{"role": "system", "content": system}] if system else []
  return head + [{"role": "user", "content": text}]


def with_peers(messages: Messages, successes: Sequence[str] = (), failures: Sequence[str] = (),
               feedback: str = "") -> Messages:
  """Rebuilds the last user turn from peers' attempts at the same question.

  Args:
    messages: the plain conversation; its last turn is the question.
    successes: verified solutions, best first.
    failures: failed solutions.
    feedback: what the environment said of the model's own attempt.
  Returns: a new conversation; the plain one if there is nothing to add.
  Source: MOPD (2605.12652), order of sections.
  """
  titles = ["Correct solution:"] + ["Another successful solution:"] * (len(successes) - 1)
  parts = [f"{title}\n{text}" for title, text in zip(titles, successes)]
  parts += [f"A known failed solution (avoid repeating this mistake):\n{text}"
            for text in failures]
  if feedback:
    parts.append(f"Feedback:\n{feedback}")
  if not parts:
    return list(messages)
  last = messages[-1]
  content = "\n\n".join([last["content"], *parts, SOLVE_AGAIN])
  return [*messages[:-1], {**last, "content": content}]


def critique_request(messages: Messages, attempt: str) -> Messages:
  """Asks a critic to check an attempt at the conversation's last question.

  Source: OPCD (2606.00424), c = W(x, a).
  """
  last = messages[-1]
  content = (f"{last['content']}\n\nProposed solution:\n{attempt}\n\n"
             "Find the first mistake in the proposed solution.")
  return [*messages[:-1], {**last, "content": content}]


def refine_request(messages: Messages, attempt: str, critique: str) -> Messages:
  """Asks the author of an attempt to solve again, given a critique.

  Source: OPCD (2606.00424), r = S(x, a, c).
  """
  return [*messages, {"role": "assistant", "content": attempt},
          {"role": "user", "content": f"{critique}\n\n{SOLVE_AGAIN}"}]
