"""Every key of the golden file is matched: one row a key, in float32 and in float64."""

import pathlib
import types

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.evals import metrics
from opd_jax.losses import (
    divergences, fused, masked, policy_gradient, preference, signals, supervised, weights)

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden/kernels.npz"))

INPUTS = """student_logits teacher_logits mask tokens student_logps teacher_logps reference_logps
    sampler_logps topk_ids student_topk_logps teacher_topk_logps teachers_logps teacher_index
    weak_logps weak_ref_logps eve_student_logps eve_mask dpo_policy_chosen dpo_policy_rejected
    dpo_ref_chosen dpo_ref_rejected group_rewards pass_n pass_c""".split()


def opd_signal(g):
  return signals.opd(g.student_logps, g.teacher_logps)


def per_token(x, mask):
  """In place of an aggregation: the golden file holds the surrogate's unreduced values."""
  del mask
  return x


def clipped(g, dual=None):
  everywhere = jnp.ones_like(g.mask, bool)
  return policy_gradient.clipped_surrogate_loss(
      g.student_logps, g.sampler_logps, opd_signal(g), everywhere, dual=dual,
      aggregate=per_token)[0]


def topk(kind, tail):
  return lambda g: divergences.topk_divergence(
      g.student_topk_logps, g.teacher_topk_logps, kind, beta=0.5, tail=tail)


def dpo(beta):
  return lambda g: preference.dpo(g.dpo_policy_chosen, g.dpo_policy_rejected, g.dpo_ref_chosen,
                                  g.dpo_ref_rejected, beta=beta)[0]


# Output key -> how the package computes it from the golden inputs. beta 0 and 1 are the KLs.
KERNELS = {
    "jsd_beta0.0": lambda g: divergences.forward_kl(g.student_logits, g.teacher_logits),
    "jsd_beta1.0": lambda g: divergences.reverse_kl(g.student_logits, g.teacher_logits),
    **{f"jsd_beta{beta}": lambda g, beta=beta: divergences.jsd(
        g.student_logits, g.teacher_logits, beta) for beta in (0.1, 0.5, 0.9)},
    **{f"topk_{tail}_beta{beta}": topk(kind, tail) for tail in ("bucket", "renormalize")
       for beta, kind in (("0.0", "forward_kl"), ("0.5", "jsd"), ("1.0", "reverse_kl"))},
    **{f"kl_{k}": lambda g, k=k: divergences.kl_estimate(g.student_logps, g.teacher_logps, k)
       for k in ("k1", "k2", "k3")},
    **{f"advantage_lam{lam}": lambda g, lam=lam: signals.g_opd(
        g.student_logps, g.teacher_logps, g.reference_logps, lam)
       for lam in (0.0, 0.5, 1.0, 1.25, 1.5)},
    "multi_teacher": lambda g: signals.select_teacher(g.teachers_logps, g.teacher_index),
    "group_advantages": lambda g: signals.group_advantage(g.group_rewards),
    "group_advantages_mean_only": lambda g: signals.group_advantage(
        g.group_rewards, normalize_std=False),
    **{f"iw_weights_max{most}": lambda g, most=most: weights.iw_opd(
        g.student_logps, g.teacher_logps, g.mask, most) for most in (1.0, 1.5, 3.0)},
    **{f"position_{side}{part}": lambda g, side=side, part=part: weights.position(
        g.mask, part, side) for side in ("prefix", "suffix") for part in (0.3, 0.5)},
    "truncated_is_cap2": lambda g: weights.truncated_importance(
        g.student_logps, g.sampler_logps, 2.0),
    **{f"eve_weights_{ratio}": lambda g, ratio=ratio: weights.self_normalized(
        g.weak_logps, g.weak_ref_logps, ratio) for ratio in (0.0, 0.5, 1.0, 2.0)},
    "aggregate_token-mean": lambda g: masked.token_mean(g.jsd, g.mask),
    "aggregate_seq-mean-token-mean": lambda g: masked.sequence_mean(g.jsd, g.mask),
    "aggregate_seq-mean-token-sum": lambda g: masked.sequence_sum(g.jsd, g.mask),
    "opd_pg_loss_token_mean": lambda g: policy_gradient.score_function_loss(
        g.student_logps, opd_signal(g), g.mask)[0],
    "iw_opd_pg_loss_token_mean": lambda g: policy_gradient.score_function_loss(
        g.student_logps, opd_signal(g), g.mask,
        weights.iw_opd(g.student_logps, g.teacher_logps, g.mask))[0],
    "clipped_surrogate": clipped,
    "clipped_surrogate_dual3": lambda g: clipped(g, dual=3.0),
    "eve_loss": lambda g: supervised.weighted_sft(
        g.eve_student_logps, g.eve_mask,
        weights.self_normalized(g.weak_logps, g.weak_ref_logps))[0],
    "dpo_loss_beta0.05": dpo(0.05),
    "dpo_loss_beta0.1": dpo(0.1),
    "bradley_terry_loss": lambda g: preference.bradley_terry(
        g.dpo_policy_chosen, g.dpo_policy_rejected)[0],
}

# Computed on the host, in float64.
METRICS = {
    **{f"pass_at_{k}": lambda g, k=k: [
        metrics.pass_at_k(n, c, k) for n, c in zip(g.pass_n.tolist(), g.pass_c.tolist())]
       for k in (1, 4, 8)},
    "pgr": lambda g: metrics.performance_gap_recovered(
        weak=0.2, student=np.array([0.1, 0.2, 0.5, 0.9]), strong=0.8),
}


def fused_values(kind, beta=0.5, **top):
  """Logits as hidden states before a head that is the identity, in tiles that do not divide."""
  eye = np.eye(GOLDEN["student_logits"].shape[-1], dtype=np.float32)
  return lambda g: fused.fused_divergence(
      g.student_logits, eye, g.teacher_logits, eye, jnp.ones_like(g.mask, bool), kind, beta,
      tile=(4, 7), **top)[1]


# The same keys by way of hidden states; topk_ids are the most likely tokens of the teacher.
FUSED = {
    "jsd_beta0.0": fused_values("forward_kl"), "jsd_beta1.0": fused_values("reverse_kl"),
    **{f"jsd_beta{beta}": fused_values("jsd", beta) for beta in (0.1, 0.5, 0.9)},
    **{f"topk_{tail}_beta{beta}": fused_values(kind, top_k=8, top_of="teacher", tail=tail)
       for tail in ("bucket", "renormalize")
       for beta, kind in (("0.0", "forward_kl"), ("0.5", "jsd"), ("1.0", "reverse_kl"))},
    **{f"{who}_logps": lambda g, who=who: fused.fused_logprobs(
        getattr(g, f"{who}_logits"), np.eye(64, dtype=np.float32), g.tokens, tile=(4, 7))[0]
       for who in ("student", "teacher")},
    "teacher_topk_logps": lambda g: fused.fused_topk(
        g.teacher_logits, np.eye(64, dtype=np.float32), 8, tile=(4, 7))[1],
}


def tolerance(key: str, dtype: str) -> float:
  """METHODS, Settled points: relative, |got - want| / (1 + |want|)."""
  if dtype == "float64":
    return 1e-10
  return 2e-4 if key.startswith("topk_bucket") else 1e-5


def inputs(dtype: str) -> dict:
  """The golden inputs, with the reverse KL that the aggregations are given."""
  cast = lambda x: x.astype(dtype) if x.dtype == np.float64 else x
  arrays = {key: cast(GOLDEN[key]) for key in INPUTS}
  return arrays | dict(jsd=cast(GOLDEN["jsd_beta1.0"]), mask=arrays["mask"].astype(bool),
                       eve_mask=arrays["eve_mask"].astype(bool))


def assert_matches(got, key: str, tolerance: float):
  got, want = np.asarray(got, np.float64), GOLDEN[key]
  assert got.shape == want.shape, f"{key}: shape {got.shape}, not {want.shape}"
  error = np.max(np.abs(got - want) / (1 + np.abs(want)))
  assert error <= tolerance, f"{key}: off by {error:.2g}, over {tolerance}"  # NaN fails too


class GoldenTest(parameterized.TestCase):

  @parameterized.product(key=tuple(KERNELS), dtype=("float32", "float64"))
  def test_kernel_matches_key(self, key, dtype):
    with jax.enable_x64(dtype == "float64"):
      got = jax.jit(lambda g: KERNELS[key](types.SimpleNamespace(**g)))(inputs(dtype))
      self.assertIn(got.dtype, (bool, dtype))
      assert_matches(got, key, tolerance(key, dtype))

  @parameterized.parameters(*FUSED)
  def test_fused_matches_key(self, key):
    got = jax.jit(lambda g: FUSED[key](types.SimpleNamespace(**g)))(inputs("float32"))
    assert_matches(got, key, tolerance(key, "float32"))

  @parameterized.parameters(*METRICS)
  def test_metric_matches_key(self, key):
    assert_matches(METRICS[key](types.SimpleNamespace(**GOLDEN)), key, 1e-10)

  def test_gathered_log_probabilities_match_their_logits(self):  # the keys tokens and topk_ids
    for who in ("student", "teacher"):
      logprobs = jax.nn.log_softmax(GOLDEN[f"{who}_logits"].astype(np.float32))
      gather = lambda ids: np.take_along_axis(np.asarray(logprobs), ids, axis=-1)
      assert_matches(gather(GOLDEN["tokens"][..., None])[..., 0], f"{who}_logps", 1e-5)
      assert_matches(gather(GOLDEN["topk_ids"]), f"{who}_topk_logps", 1e-5)

  def test_no_key_is_left_unmatched(self):
    self.assertCountEqual(GOLDEN, [*INPUTS, *KERNELS, *METRICS])


if __name__ == "__main__":
  absltest.main()
