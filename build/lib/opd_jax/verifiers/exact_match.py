"""Exact match of the answer behind the last "####", as GSM8K writes it."""

from opd_jax.verifiers.verdict import Verdict

MARKER = "####"


def verify(text: str, answer: str) -> Verdict:
  """Compares what follows the last marker with the answer, as strings.

  White space and thousands separators do not count.
  """
  _, marker, found = text.rpartition(MARKER)
  if not marker:
    return Verdict(0.0, f"The response has no final answer behind {MARKER}.")
  found = normalize(found.strip().split("\n")[0])
  if found == normalize(answer):
    return Verdict(1.0, "The answer is correct.")
  return Verdict(0.0, f"The answer {found[:40]} is wrong.")


def normalize(text: str) -> str:
  """Without white space, thousands separators and a closing period."""
  return "".join(text.split()).replace(",", "").rstrip(".")
