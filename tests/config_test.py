"""Configs are complete and locked, and a mistake in one is named with its nearest key."""

from absl.testing import absltest, parameterized

from opd_jax import config as configs



class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(optimizer=dict(learning_rat=1.0)), "config.optimizer.learning_rat.*'learning_rate'"),
      (dict(rolout={}), "config.rolout.*'rollout'"),
      (dict(total_steps="3"), "config.total_steps must be a int, found '3'"),
      (dict(optimizer=3), "config.optimizer is a section"),
  )
  def test_mistakes_are_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      configs.on_policy(**changes)

  def test_a_config_is_locked_and_whole_numbers_serve_as_floats(self):
    config = configs.on_policy(optimizer=dict(learning_rate=1))
    self.assertIsInstance(config.optimizer.learning_rate, float)
    with self.assertRaises(AttributeError):
      config.optimizer.nope = 3

  def test_impossible_numbers_are_refused(self):
    for changes, message in (
        (dict(rollout=dict(prompts=0)), "rollout.prompts is 0; it must be at least 1"),
        (dict(log_every=0), "log_every is 0"),
        (dict(optimizer=dict(learning_rate=-1.0)), "optimizer.learning_rate is -1.0"),
        (dict(eval=dict(top_p=0.0)), "eval.top_p is 0.0; it must be above 0"),
        (dict(ema=dict(rate=1.0)), "ema.rate is 1.0"),
        (dict(eval=dict(ks=(1, 0))), r"eval.ks is \(1, 0\)"),
        (dict(rollout=dict(prompt_buckets=(99,))), r"prompt_buckets \(99,\) must not exceed"),
        (dict(rollout=dict(response_buckets=(99,))), r"response_buckets \(99,\) must not exceed"),
        (dict(student=dict(alpha=1.5)), "student.alpha is 1.5, .* without student.base"),
        (dict(teacher_memory="disk"), "teacher_memory is .disk.; it must be .device. or .host."),
        (dict(eval=dict(ks=(16,))), "eval.samples >= 16"),
        (dict(checkpoint=dict(best_metric="eval/nonsense")),
         "best_metric is 'eval/nonsense'; .* one of eval/mean@8, eval/pass@1, eval/pass@8, "
         "eval/length, eval/truncated, eval/reverse_kl"),
        (dict(eval=dict(samples=4, ks=(1,))), "'eval/mean@8'; with eval.samples=4 .*eval/mean@4"),
        (dict(checkpoint=dict(best_mode="least")), "best_mode is 'least'"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        configs.validate(configs.on_policy(**changes))

  def test_the_best_metric_may_be_anything_that_the_evaluation_measures(self):
    configs.validate(configs.on_policy(
        eval=dict(samples=4, ks=(2,)), checkpoint=dict(best_metric="eval/pass@2")))
    configs.validate(configs.on_policy(
        checkpoint=dict(best_metric="eval/reverse_kl", best_mode="min")))
    configs.validate(configs.on_policy(checkpoint=dict(best_metric="", keep_best=0)))
    with self.assertRaisesRegex(ValueError, "'eval/reverse_kl'"):  # there is no teacher
      configs.validate(configs.offline(checkpoint=dict(best_metric="eval/reverse_kl")))

  @parameterized.parameters(dict(temperature=0.7), dict(top_k=20), dict(top_p=0.95))
  def test_sampling_that_biases_the_kl_must_be_asked_for(self, **sampling):
    with self.assertRaisesRegex(ValueError, "biased.*allow_biased_sampling"):
      configs.validate(configs.on_policy(rollout=sampling))
    configs.validate(configs.on_policy(rollout=dict(allow_biased_sampling=True, **sampling)))

  @parameterized.parameters(configs.on_policy, configs.offline, configs.evaluate,
                            configs.context_use, configs.claims, configs.position_bias,
                            configs.critique_refine, configs.judged)
  def test_defaults_are_valid(self, make):
    configs.validate(make())

  def test_a_claims_config_names_the_run_that_is_wrong_and_keeps_the_files_order(self):
    config = configs.claims(methods=dict(b=configs.on_policy(), a=configs.on_policy(log_every=0)),
                            seeds=dict(b=(0, 1), a=(0,)), claims=dict(x=dict(a="b", effect=1)))
    self.assertEqual(list(config.methods), ["b", "a"])
    self.assertEqual(config.seeds.b, (0, 1))
    self.assertEqual((config.claims.x.kind, config.claims.x.effect), ("difference", 1.0))
    with self.assertRaisesRegex(ValueError, "methods.a: log_every is 0"):
      configs.validate(config)
    with self.assertRaisesRegex(ValueError, "config.claims.x.efect.*'effect'"):
      configs.claims(claims=dict(x=dict(efect=1.0)))
    with self.assertRaisesRegex(ValueError, "minutes is -1"):
      configs.validate(configs.claims(minutes=-1))

  def test_an_unknown_form_lists_the_known(self):
    with self.assertRaisesRegex(ValueError, "no form 'qick'; it has '', 'quick'"):
      configs.form("qick", "", "quick")


if __name__ == "__main__":
  absltest.main()
