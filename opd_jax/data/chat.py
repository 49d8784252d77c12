"""Prompt templates: what a model is told, as lists of chat messages. Pure text.

The wording is ours, the order of the sections is the papers'. Text that comes from data
or from a model is inserted as it is; control tokens inside it are neutralized where text
becomes ids, in `tokenizer.encode_chat`.
"""

from collections.abc import Mapping, Sequence
import re

Messages = list[dict[str, str]]

SUCCESS = "Correct solution:"
ANOTHER_SUCCESS = "Another successful solution:"
FAILURE = "A known failed solution (avoid repeating this mistake):"
CRITIQUE = "Critique of an earlier attempt:"
SOLVE_AGAIN = "Correctly solve the original question."

FEEDBACK = "Feedback:"
# Under these peers' texts stand. One that writes such a line itself, indented or in bold say, is
# quoted: a failed solution must not pass for a correct one.
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # where `str.splitlines` ends a line
_HEADING = re.compile(
    rf"(?:\A|(?<=[{_BREAKS}]))(?=(?:[*_#-]|[^\S{_BREAKS}])*(?:" + "|".join(map(re.escape, (
        SUCCESS, ANOTHER_SUCCESS, FAILURE, FEEDBACK, SOLVE_AGAIN))) + "))", re.IGNORECASE)

# A thought that is cut off, by the length limit say, has no end mark.
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def question(text: str, system: str = "") -> Messages:
  """The plain prompt: one user turn, after an optional system turn."""
  head = [{"role": "system", "content": system}] if system else []
  return head + [{"role": "user", "content": text}]


def with_peers(messages: Messages, successes: Sequence[str] = (), failures: Sequence[str] = (),
               feedback: str = "") -> Messages:
  """Rebuilds the last user turn from peers' attempts at the same question.

  Args:
    messages: the plain conversation; its last turn is the question.
    successes: verified solutions, in the order in which they are shown.
    failures: failed solutions, likewise.
    feedback: what the environment said of the model's own attempt.
  Returns: a new conversation; the plain one if there is nothing to add. A line of a text that
    begins with one of the headings, whatever its case and marks, has "> " before it.
  Source: MOPD (2605.12652), order of sections.
  """
  quoted = lambda text: _HEADING.sub("> ", text)
  titles = [SUCCESS] + [ANOTHER_SUCCESS] * (len(successes) - 1)
  parts = [f"{title}\n{quoted(text)}" for title, text in zip(titles, successes)]
  parts += [f"{FAILURE}\n{quoted(text)}" for text in failures]
  if feedback:
    parts.append(f"{FEEDBACK}\n{quoted(feedback)}")
  if not parts:
    return list(messages)
  last = messages[-1]
  content = "\n\n".join([last["content"], *parts, SOLVE_AGAIN])
  return [*messages[:-1], {**last, "content": content}]


def summary_request(text: str) -> Messages:
  """Asks for the idea of a solution, which stands for it where peers are shown."""
  return question(f"Summarize this solution in a few sentences, with its result:\n\n{text}")


def without_thinking(text: str) -> str:
  """A response without its thoughts, and without white space around what is left.

  A thought that never closes runs to the end of the text. One that never opens began in the
  generation prompt, where templates of reasoning models put the opening mark.
  """
  return _THOUGHT.sub("", text).rpartition("</think>")[2].strip()


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


def with_critique(messages: Messages, critique: str) -> Messages:
  """Shows what a critic said of an attempt, and not the attempt itself.

  Args:
    messages: the plain conversation; its last turn is the question.
    critique: "": none, the question is put again with the request alone.
  Source: OPCD (2606.00424), the self-teacher's x, f.
  """
  last = messages[-1]
  parts = [last["content"], *([f"{CRITIQUE}\n{critique}"] if critique else []), SOLVE_AGAIN]
  return [*messages[:-1], {**last, "content": "\n\n".join(parts)}]


def fill(rubric: str, messages: Messages, shown: Mapping[str, str]) -> Messages:
  """A request: the rubric with texts in its placeholders, after the conversation's system turn.

  Args:
    rubric: a text with {question} and other placeholders.
    messages: the conversation whose last turn is the {question}.
    shown: the other placeholders -> their texts.
  """
  shown = dict(question=messages[-1]["content"], **shown)
  # At once: a placeholder in one of the texts is text.
  text = re.sub(rf"\{{({'|'.join(shown)})\}}", lambda match: shown[match[1]], rubric)
  return [*(x for x in messages if x["role"] == "system"), {"role": "user", "content": text}]
