"""What contexts held and cost in a sitting of configs/claims/mopd.py, from its metrics.jsonl.

    python tests/bench/contexts.py runs/claims_mopd

A row a method, means over the updates and seeds that are in the workdir.
"""

import json
import pathlib
import sys

import numpy as np

from opd_jax import writer
from opd_jax.claims import markdown

COLUMNS = {"without, %": "without", "parts": "parts", "tokens": "length",
           "some dropped, %": "over_budget", "some the same text, %": "same_text"}


def main(workdir):
  cells = {}
  for path in sorted(pathlib.Path("results/mopd/methods").glob("*.json")):
    cell = json.loads(path.read_text())
    lines = writer.read(f"{workdir}/methods/{path.stem}")
    updates = [line for line in lines if "rollout/ever_solved" in line]
    cells.setdefault(cell["who"], []).append((cell["config"], updates))
  rows = []
  for who, found in cells.items():
    config, updates = found[0][0], [line for _, lines in found for line in lines]
    mean = lambda name: np.mean([line[name] for line in updates])
    solved = np.mean([lines[-1]["rollout/ever_solved"] for _, lines in found])
    asked = config["rollout"]["prompts"] * config["total_steps"]
    told = "context" in config
    values = [mean(f"context/{name}") * (100 if "%" in title else 1)
              for title, name in COLUMNS.items()] if told else []
    needed, computed = (mean(f"context/tokens_{name}") if told else np.nan
                        for name in ("needed", "computed"))
    widest = config["rollout"]["prompts"] * config["rollout"]["group_size"] * (
        config["context"]["budget"] + config["rollout"]["max_response"]) if told else np.nan
    rows.append([f"`{who}`", str(len(found)), f"{100 * solved / asked:.0f}",
                 *(f"{value:.1f}" for value in values),
                 *([f"{needed:,.0f}", f"{computed / needed:.2f}", f"{widest / needed:.2f}"]
                   if told else [])])
  print(markdown.table(("method", "seeds", "questions ever solved, %", *COLUMNS, "tokens needed",
                        "computed / needed", "with one bucket"), rows))


if __name__ == "__main__":
  main(*sys.argv[1:])
