"""What a verifier says of a response."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A reward in [0, 1], and one sentence that may be shown to the model (never the answer)."""

  reward: float
  feedback: str


class NoVerdict(RuntimeError):
  """What checks responses has failed, which is no response's fault: nothing is known of it."""
