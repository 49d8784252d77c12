"""What a run measured on its way, for pictures: no table is made of it, and no verdict."""

import math
from typing import Any

from opd_jax import writer

KEPT = ("eval/", "critique/", "judge/", "refine/")  # what their names begin with


def of(workdir: str) -> dict[str, list[Any]]:
  """Every evaluation of a run: "step", and by the name of a metric its values at these steps.

  With an evaluation goes what is `KEPT` of the step, an epoch say, that led to it.

  Returns: None in the place of a value that is not there or not finite; {} without evaluations.
  """
  lines = [line for line in writer.read(workdir)
           if any(name.startswith("eval/") for name in line)]
  names = sorted({name for line in lines for name in line if name.startswith(KEPT)})
  value = lambda x: x if x is not None and math.isfinite(x) else None
  return {"step": [line["step"] for line in lines]} | {
      name: [value(line.get(name)) for line in lines] for name in names} if lines else {}
