"""What is foretold from shapes is what a real run takes, on four fake CPU devices.

The number of devices is fixed when JAX starts, so this file's tests run in one child process
and report what they found.
"""

import json
import os
import subprocess
import sys

from absl.testing import absltest

SCRIPT = """
import json, tempfile
from unittest import mock
import jax, numpy as np
from opd_jax import config as configs
from opd_jax import keys, sharding, train_state
from opd_jax.aot import study
from opd_jax.pipelines import on_policy, opd, teachers
from opd_jax.pipelines import policy as policies
from opd_jax.rollouts import batch as batches, engine, slots
from opd_jax.rollouts.sampler import Sampling

config = configs.on_policy(
    student=dict(source="random:tiny_student", tokenizer="opd_jax/tiny/student"),
    reference=dict(source="tiny:student"), mesh=dict(data=2, model=2), total_steps=3,
    rollout=dict(prompts=4, group_size=2, max_prompt=24, max_response=40, slots=4),
    loss=dict(signal="g_opd", lam=1.25, weight="iw_opd", micro_batches=2))
report = study.compiled(config, "cpu:4")
told = {row.name.split(":")[-1].strip().split(" ")[0]: row for row in report.rows}
held = {name: size for row in report.rows for name, size in row.held.items()}

really = {}
def measured(name, function):
  def call(*args, **kw):
    memory = function.lower(*args, **kw).compile().memory_analysis()
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes,
             max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)]
    really[name] = max(really.get(name, sizes), sizes)  # of several shapes the largest
    return function(*args, **kw)
  return call

mesh = sharding.make_mesh(2, 2)
here = lambda tree: sum(shard.data.nbytes for x in jax.tree.leaves(tree)
                        for shard in x.addressable_shards if shard.device == jax.devices()[0])
with jax.set_mesh(mesh):
  root = keys.root(0)
  student = policies.load(config.student, config.model, keys.at(root, "init"), mesh)
  asked = teachers.load(config, teachers.outline(config, student, True), mesh)
  student = asked.student
  optimizer = train_state.make_optimizer(config.optimizer, config.total_steps)
  state = train_state.create(student.params, optimizer, False, mesh)
  lying = {"student": here(state.params), "optimizer": here(state.opt_state),
           "teacher": here(asked.teachers[""].params), "reference": here(asked.reference.params)}
  make = slots.compiled
  def compiled(*args):
    steps = make(*args)
    return steps._replace(**{name: measured(name, getattr(steps, name))
                             for name in ("prefill", "decode")})
  with mock.patch.object(slots, "compiled", compiled), mock.patch.object(engine, "NARROWEST", 1024):
    settings = policies.settings(student.tokenizer, config.rollout, Sampling())._replace(eos_ids=())
    generate = engine.make(student.model, settings)
    rows = np.random.default_rng(0).integers(1, 200, (4, 24)).repeat(2, axis=0)
    drawn = generate(state.params, rows.astype(np.int32), np.ones(rows.shape, bool), root)
  spread = sharding.of_batch(mesh)
  batch = jax.device_put(batches.Batch(rows.astype(np.int32), np.ones(rows.shape, bool),
                                       **drawn._asdict()), spread)
  ask = measured("score", opd.make_score(config, asked))
  batch = ask(state.params, (asked.teachers[""].params,), asked.reference.params, batch)
  update = measured("update", on_policy.make_update(
      config, opd.make_loss(config, student), opd.describe, optimizer, state))
  state, metrics = update(state, batch, None)
print(json.dumps({
    "told": {name: [told[name].arguments, told[name].temporaries, told[name].outputs]
             for name in really},
    "really": really, "held": {name: held[name] for name in lying}, "lying": lying,
    "loss": float(metrics["loss/total"]),
    "steps": sum(row.times for row in report.rows if "decode" in row.name)}))
"""


class ReportTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4",
                          "JAX_PLATFORMS": "cpu"})
    assert child.returncode == 0, child.stderr[-4000:]
    cls.found = json.loads(child.stdout.splitlines()[-1])

  def test_what_lies_there_is_foretold_to_the_byte(self):
    self.assertEqual(self.found["held"], self.found["lying"])

  def test_each_function_takes_the_memory_that_was_foretold(self):
    self.assertEqual(set(self.found["really"]), {"prefill", "decode", "score", "update"})
    for name, real in self.found["really"].items():
      for what, told, took in zip(("arguments", "temporaries", "results"),
                                  self.found["told"][name], real):
        self.assertAlmostEqual(told, took, delta=0.01 * took + 256, msg=f"{name}: {what}")

  def test_rounds_of_decoding_are_those_of_full_responses(self):
    self.assertEqual(self.found["steps"], 2 * 3)  # two fillings of the slots, chunks of 16


if __name__ == "__main__":
  absltest.main()
