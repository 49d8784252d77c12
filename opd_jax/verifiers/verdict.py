"""What a verifier says of a response."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A reward, and one sentence that may be shown to the model (never the answer).

  The reward lies in [0, 1], but for that of a gold reward (notes), which may be any number.
  """

  reward: float
  feedback: str
