"""Mathematical equality of final answers, through the math-verify library.

math-verify parses with sympy, which a hostile answer can keep busy for hours: run this in
a `pool.Pool`, whose hard limit rules. Its own limits use signals and are turned off.
"""

import logging

from opd_jax.verifiers.exact_match import MARKER
from opd_jax.verifiers.verdict import Verdict

BOX = "\\boxed{"


def verify(text: str, answer: str) -> Verdict:
  r"""Compares the response's final answer with the true one, as mathematics.

  The final answer is what follows the last "####", or else the last \boxed{}, or else what
  math-verify finds: a number or formula announced as the answer, or the last one.
  """
  import math_verify  # pulls in sympy: only worker processes pay for it
  logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn at every text
  try:
    gold = math_verify.parse(f"${_bare(answer)}$", parsing_timeout=None)
    found = math_verify.parse(_final(text), parsing_timeout=None)
    if not found:
      return Verdict(0.0, "The response has no final answer that can be read.")
    if math_verify.verify(gold, found, timeout_seconds=None):
      return Verdict(1.0, "The answer is correct.")
    return Verdict(0.0, f"The answer {str(found[-1])[:40]} is wrong.")
  except Exception as error:  # sympy raises anything at all on strange text
    return Verdict(0.0, f"The answer could not be read ({type(error).__name__}).")


def _final(text: str) -> str:
  """The part of the text that math-verify is to read."""
  _, marker, tail = text.rpartition(MARKER)
  if marker:
    return f"${_bare(tail.strip().split(chr(10))[0])}$"
  start = text.rfind(BOX)
  while start >= 0:
    # math-verify would join all boxes into one set, so that a second thought is never right.
    depth = 0
    for end in range(start + len(BOX) - 1, len(text)):
      depth += {"{": 1, "}": -1}.get(text[end], 0)
      if depth == 0:
        return f"${_bare(text[start + len(BOX):end])}$"
    start = text.rfind(BOX, 0, start)  # never closed: cut off by the length limit
  return text


def _bare(formula: str) -> str:
  """Without dollar signs, as currency or around mathematics, and a closing period."""
  return formula.replace("\\$", "").replace("$", "").strip().rstrip(".")
