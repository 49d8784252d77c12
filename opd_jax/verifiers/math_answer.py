"""Mathematical equality of final answers, through the math-verify library.

math-verify parses with sympy, which a hostile answer can keep busy for hours: run this in
a `pool.Pool`, whose hard limit rules. Its own limits use signals and are turned off.
"""

from opd_jax.verifiers.exact_match import MARKER
from opd_jax.verifiers.verdict import Verdict


def verify(text: str, answer: str) -> Verdict:
  r"""Compares the response's final answer with the true one, as mathematics.

  The final answer is what follows the last "####", or else the last \boxed{}, or else the
  last number or formula.
  """
  import math_verify  # pulls in sympy: only worker processes pay for it
  _, marker, tail = text.rpartition(MARKER)
  candidate = tail.strip().split("\n")[0] if marker else text
  try:
    gold = math_verify.parse(f"${answer}$", parsing_timeout=None)
    found = math_verify.parse(f"${candidate}$" if marker else candidate, parsing_timeout=None)
    if not found:
      return Verdict(0.0, "The response has no final answer that can be read.")
    if math_verify.verify(gold, found, timeout_seconds=None):
      return Verdict(1.0, "The answer is correct.")
  except Exception as error:  # sympy raises anything at all on strange text
    return Verdict(0.0, f"The answer could not be read ({type(error).__name__}).")
  return Verdict(0.0, f"The answer {str(found[-1])[:40]} is wrong.")
