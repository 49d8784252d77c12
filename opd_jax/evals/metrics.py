"""Accuracy over several samples a prompt, and how much of a gap a student closes."""

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
  """Unbiased probability that at least one of k samples is correct.

  Args:
    n: samples drawn; c: how many of them are correct; k: 1 <= k <= n.
  Returns: 1 - C(n-c, k) / C(n, k).
  Raises: ValueError if the counts are impossible.
  Source: "Evaluating Large Language Models Trained on Code", equation 1.
  """
  if not 0 <= c <= n or not 1 <= k <= n:
    raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, found n={n}, c={c}, k={k}")
  return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def mean_at_k(rewards: np.ndarray) -> np.ndarray:
  """Mean reward of each prompt: [P, k] -> [P]."""
  return np.mean(rewards, axis=-1)


def performance_gap_recovered(weak: float, student: float | np.ndarray,
                              strong: float) -> float | np.ndarray:
  """(student - weak) / (strong - weak): 0 is the weak teacher, 1 the strong ceiling.

  Args:
    weak, student, strong: the same score (gold reward, accuracy) of the three; student may be
      an array, a curve over training.
  Returns: the share of the gap that is closed; below 0 or above 1 if outside it.
  Raises: ValueError unless strong scores more than weak: there is no gap to recover.
  Source: "Weak-to-Strong Generalization"; METHODS 6.
  """
  if not strong > weak:
    raise ValueError(f"weak scores {weak}, strong {strong}: there is no gap to recover")
  return (student - weak) / (strong - weak)
