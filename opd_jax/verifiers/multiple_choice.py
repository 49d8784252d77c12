r"""The letter that a response decides for, among the options of a multiple-choice question.

Harnesses differ in the form that they ask for, and models in what they make of it. A decision is
a letter in <answer></answer>, in \boxed{}, behind "####", or behind "answer is" or "Answer:"; the
last decision counts. A response without one decides by its last line that names an option. Two
letters in one decision are none: naming every option must not pay.
"""

import re

from opd_jax.verifiers.verdict import Verdict

# What may stand before a letter: white space, Markdown, quotation marks, brackets, LaTeX.
BEFORE = r"(?:[\s*_`'\"“”‘’$({\[<]|\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm)\b)*"
# A letter that is no word and no part of one: "A/B" has two, "A-level" and "I'm" none.
LETTER = r"(?<![\w'’\\-])[A-J](?![\w'’]|-\w)"
# A small one only where nothing else stands: "the answer is a leaf" does not say A.
SMALL = r"(?<![\w'’\\-])[a-j](?=[*_`'\")\]}.$]*\s*(?:[.:)]\s|\Z))"

# Contents are bounded, or a text of nothing but beginnings would take quadratic time.
FORMS = (re.compile(r"<answer>(.{0,500}?)</answer>", re.DOTALL | re.IGNORECASE),
         re.compile(r"\\boxed\s?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,500})\}"),
         re.compile(r"####([^\n]{0,500})"))
PHRASE = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+(?:is|would be|should be|must be)\b|[\s*_]*[:=]))"
    rf"(?i:\s*(?:option|choice|answer)\b)?:?(?=({BEFORE}(?:{LETTER}|[a-j]\b)[^\n]{{0,200}}))")
# A second letter beside the first takes the decision back.
SEPARATOR = r"[*_`'\")\]}$.]*(?:\s*(?:[/,&]|\bor\b|\band\b))+\s*(?i:\b(?:option|choice)\s)?"
MORE = re.compile(rf"{SEPARATOR}{BEFORE}(?:({LETTER})(?!\s+(?!or\b|and\b)[a-z])|({SMALL}))")
FIRST = re.compile(rf"{BEFORE}(?:({LETTER})|({SMALL}))")
LABEL = re.compile(r"\W{0,9}([A-J])[).:]\s*\S")
AROUND = "*_`'\"“”‘’()[]{}<>.,:;!?$"
# "A" and "I" where they are words of a sentence.
WORD = re.compile(r"(?<!(?i:option|choice|answer)\s)\b[AI](?=\s+(?!or\b|and\b|but\b|is\b)[a-z])")


def verify(text: str, answer: str) -> Verdict:
  """Compares the letter that the response decides for with the answer, a letter."""
  found = decide(text)
  if not found:
    return Verdict(0.0, "The response decides for no option.")
  if len(found) > 1:
    return Verdict(0.0, f"The response decides for more than one option: {', '.join(found)}.")
  if found == answer.strip().upper():
    return Verdict(1.0, "The answer is correct.")
  return Verdict(0.0, f"The answer is not {found}.")


def decide(text: str) -> str:
  """The letter; "" for none; all of them, in the order of the alphabet, if it is not clear."""
  text = text.rpartition("</think>")[2]
  decisions = [(match.start(), exact(match[1])) for form in FORMS for match in form.finditer(text)]
  for match in PHRASE.finditer(text):
    if letters := beginning(match[1]):
      decisions.append((match.start(), letters))
  return max(decisions)[1] if decisions else last_line(text)


def exact(content: str) -> str:
  """Letters of a content that should be one: "B", "(b)", "B. a leaf", "A or B"."""
  words = re.sub(r"\\(?:text|math)?(?:bf|it|rm|sf)?\b|[^\w\s]", " ", content).split()
  letters = {word.upper() for word in words} - {"OR", "AND"}
  if letters and all(re.fullmatch("[A-J]", letter) for letter in letters):
    return "".join(sorted(letters))
  return beginning(content)


def beginning(content: str) -> str:
  """Letters at the beginning of a content, which may go on with the option's text."""
  letters, match = set(), FIRST.match(content)
  while match:
    letters.add((match[1] or match[2]).upper())
    match = MORE.match(content, match.end())
  return "".join(sorted(letters))


def last_line(text: str) -> str:
  """Letters that stand alone, in the last line with any, but not before a list of the options."""
  lines = [line for line in text.split("\n") if line.strip()]
  labels = {match[1] for line in lines if (match := LABEL.match(line))}
  for line in reversed(lines):
    if label := LABEL.match(line):
      return label[1] if len(labels) == 1 else ""
    words = [word.strip(AROUND) for word in WORD.sub(" ", line).split()]
    if letters := {word for word in words if re.fullmatch("[A-J]", word)}:
      return "".join(sorted(letters))
    if small := re.fullmatch(r"\W{0,9}([a-j])\W{0,9}", line):
      return small[1].upper()
  return ""
