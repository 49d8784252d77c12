"""Exact match of the answer behind the last "####", as GSM8K writes it."""

import re

from opd_jax.verifiers.verdict import Verdict

MARKER = "####"

# What stands between the groups of three digits of one number.
THOUSANDS = re.compile(r"(?<=\d)[,\s](?=\d{3}(?!\d))")
# White space that parts no two words: beside a sign, a bracket, or the ends.
LOOSE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")


def verify(text: str, answer: str) -> Verdict:
  """Compares what follows the last marker with the answer, as strings.

  White space and thousands separators do not count; "1, 2" and "1 2" are not 12.
  """
  _, marker, found = text.rpartition(MARKER)
  found = normalize(found.strip().split("\n")[0])
  if not marker or not found:
    return Verdict(0.0, f"The response has no final answer behind {MARKER}.")
  if found == normalize(answer):
    return Verdict(1.0, "The answer is correct.")
  return Verdict(0.0, f"The answer {found[:40]} is wrong.")


def normalize(text: str) -> str:
  """Without white space but between words, thousands separators and a closing period."""
  text = " ".join(THOUSANDS.sub("", text).split())
  return LOOSE.sub("", text).rstrip(".")
