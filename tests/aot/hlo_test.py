"""Costs read from HLO text: as counted by hand, and as XLA counts what has no loops."""

import json
import os
import subprocess
import sys

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.aot import hlo

# As libtpu 0.0.42 prints products of jax.nn.dot_product_attention and of a dense layer.
TPU = """HloModule m, num_partitions=16

ENTRY %main (q: f32[8,2047,128]) -> f32[8] {{
  %q = bf16[{left}]{{0}} parameter(0)
  %k = bf16[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{1,3,2,0:T(8,128)}} convolution(%q, %k), {how}
}}
"""
SCORES = dict(left="2047,8,2,128", right="2047,8,128,1", out="8,2047,2,2047",
              how="window={size=8x1 stride=7x1 lhs_dilate=8x1}, dim_labels=b01f_o0i1->0b1f")

# A loop from `start` to 6 in steps of 2.
COUNTED = """HloModule m

%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %b = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%b), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[4,4]{{1,0}}) tuple(%next, %y)
}}

%condition (c: (s32[], f32[4,4])) -> pred[] {{
  %c = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %now = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%now, %end), direction=LT
}}

ENTRY %main (told: s32[], x: f32[4,4]) -> (s32[], f32[4,4]) {{
  %told = s32[] parameter(0)
  %m = f32[4,4]{{1,0}} parameter(1)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %first = (s32[], f32[4,4]{{1,0}}) tuple({start}, %m)
  ROOT %loop = (s32[], f32[4,4]{{1,0}}) while(%first), condition=%condition, body=%body
}}
"""

SCRIPT = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from opd_jax import sharding
from opd_jax.aot import hlo
mesh = sharding.make_mesh(4, 2)
put = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(*axes)))
def costs(f, *args, out=None):
  out = jax.sharding.NamedSharding(mesh, out)
  found = hlo.costs(jax.jit(f, out_shardings=out).lower(*args).compile().as_text())
  return [found.flops, [[c.kind, c.sent * times, c.among] for c, times in found.collectives]]
x, w = put((32, 64), "data"), put((5, 64, 64), None, "data")
print(json.dumps({
    "sum over model": costs(lambda a, b: a @ b, put((32, 64), "data", "model"),
                            put((64, 48), "model"), out=P("data")),
    "gathered in a loop": costs(lambda x, w: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x, w, out=P("data")),
}))
"""


def counted(function, *args, turns=1.0):
  return hlo.costs(jax.jit(function).lower(*args).compile().as_text(), turns)


class HloTest(parameterized.TestCase):

  def test_a_scan_costs_what_it_costs_unrolled(self):
    x, w = jnp.ones((64, 128)), jnp.ones((7, 128, 128))

    def loss(x, w, unroll):
      return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, unroll=unroll)[0])
    gradient = lambda unroll: jax.grad(lambda x, w: loss(x, w, unroll), argnums=(0, 1))
    flat = jax.jit(gradient(7)).lower(x, w).compile()
    product = 2 * 64 * 128 * 128
    by_xla = flat.cost_analysis()["flops"]  # elementwise operations too
    self.assertBetween(counted(gradient(1), x, w).flops / by_xla, 0.97, 1.0)
    self.assertBetween(hlo.costs(flat.as_text()).flops / by_xla, 0.97, 1.0)
    self.assertGreaterEqual(counted(gradient(1), x, w).flops, 3 * 7 * product)
    once = jax.jit(gradient(1)).lower(x, w).compile().cost_analysis()["flops"]
    self.assertLess(once, 0.5 * by_xla)  # or there would be no need for any of this

  def test_loops_in_loops_multiply(self):
    inner = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)
    found = counted(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: inner(x), x), jnp.eye(32))
    self.assertEqual(found.flops, 15 * 2 * 32**3)
    self.assertCountEqual([turns for _, turns in found.loops], [5, 3])

  def test_a_loop_that_ends_by_the_data_turns_as_often_as_told(self):
    def f(x):
      return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x @ x, x)
    found = counted(f, jnp.eye(32), turns=11.0)
    self.assertEqual(found.flops, 11 * 2 * 32**3)
    self.assertEqual([turns for _, turns in found.loops], [None])

  @parameterized.parameters(("%copied", 3), ("%zero", 3), ("%told", None))
  def test_a_loop_counts_from_a_constant_or_its_turns_are_not_known(self, start, turns):
    found = hlo.costs(COUNTED.format(start=start))
    self.assertEqual(found.loops, (("loop", turns),))
    self.assertEqual(found.flops, (turns or 1) * 2 * 4**3)

  def test_of_a_choice_the_dearest_branch_counts(self):
    def f(x, some):
      return jax.lax.cond(some > 0, lambda x: x @ x, lambda x: x, x)
    self.assertEqual(counted(f, jnp.eye(32), 1).flops, 2 * 32**3)

  def test_reading_a_slice_of_stacked_weights_is_not_reading_all(self):
    x, w = jnp.ones((8, 256)), jnp.ones((20, 256, 256))
    found = counted(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)
    self.assertBetween(found.hbm / w.nbytes, 1.0, 3.5)  # sliced out, then read

  def test_pieces_fetched_ahead_cost_what_they_are(self):
    text = """HloModule m

ENTRY %main (w: bf16[64,32]) -> bf16[16,32] {
  %w = bf16[64,32]{1,0} parameter(0)
  %s = ((bf16[64,32]{1,0}), bf16[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:16]}
  ROOT %d = bf16[16,32]{1,0:S(1)} slice-done(%s)
}
"""
    self.assertEqual(hlo.costs(text).hbm, 16 * 32 * 2)

  @parameterized.parameters(("%cut", 4 * 8 * 2), ("%w", 64 * 8 * 2))
  def test_a_fusion_in_a_fusion_may_cut_out_a_piece(self, result, read):
    text = f"""HloModule m

%inner (w: bf16[64,8], i: s32[]) -> bf16[4,8] {{
  %w = bf16[64,8]{{1,0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  %cut = bf16[4,8]{{1,0}} dynamic-slice(%w, %i), dynamic_slice_sizes={{4,8}}
  ROOT %doubled = bf16[4,8]{{1,0}} add({result}, {result})
}}

%outer (w: bf16[64,8], i: s32[]) -> bf16[4,8] {{
  %w = bf16[64,8]{{1,0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %piece = bf16[4,8]{{1,0}} fusion(%w, %i), kind=kLoop, calls=%inner
}}

ENTRY %main (w: bf16[64,8], i: s32[]) -> bf16[4,8] {{
  %w = bf16[64,8]{{1,0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %piece = bf16[4,8]{{1,0:S(1)}} fusion(%w, %i), kind=kLoop, calls=%outer
}}
"""
    self.assertEqual(hlo.costs(text).hbm, read)

  @parameterized.parameters(
      ("tuple", "bf16[2,64]", 0.0), ("dot", "f32[2,2]", 2 * 64 * 2.0))
  def test_a_cache_that_is_written_in_place_costs_its_reading_alone(self, what, shape, read):
    ends = {"tuple": f"ROOT %end = ({shape}{{1,0}}, {shape}{{1,0}}) tuple(%now, %now)",
            "dot": f"ROOT %end = {shape}{{1,0:S(1)}} dot(%now, %now), rhs_contracting_dims={{1}}"}
    results = f"({shape}, {shape})" if what == "tuple" else shape
    said = results.replace("]", "]{1,0:S(1)}") if what == "dot" else results.replace("]", "]{1,0}")
    text = f"""HloModule m

%written (c: bf16[2,64], x: bf16[2,1], i: s32[]) -> bf16[2,64] {{
  %c = bf16[2,64]{{1,0}} parameter(0)
  %x = bf16[2,1]{{1,0:S(1)}} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %now = bf16[2,64]{{1,0}} dynamic-update-slice(%c, %x, %i, %i)
}}

%outer (c: bf16[2,64], x: bf16[2,1], i: s32[]) -> {results} {{
  %c = bf16[2,64]{{1,0}} parameter(0)
  %x = bf16[2,1]{{1,0:S(1)}} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  %now = bf16[2,64]{{1,0}} fusion(%c, %x, %i), kind=kLoop, calls=%written
  {ends[what]}
}}

ENTRY %main (c: bf16[2,64], x: bf16[2,1], i: s32[]) -> {results} {{
  %c = bf16[2,64]{{1,0}} parameter(0)
  %x = bf16[2,1]{{1,0:S(1)}} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %end = {said} fusion(%c, %x, %i), kind=kLoop, calls=%outer
}}
"""
    # What is written is the change, once for each result.
    self.assertEqual(hlo.costs(text).hbm, read or 2 * (2 * 1 * 2))

  def test_a_product_as_a_tpu_writes_it(self):
    found = hlo.costs(TPU.format(**SCORES))
    self.assertEqual(found.flops, 2 * 8 * 2 * 2047 * 2047 * 128)

  def test_a_kernel_costs_what_it_says_of_itself(self):
    how = ('custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
           '{"body":"xyz","cost_estimate":{"flops":"25769803776","transcendentals":"0","bytes_accessed":"7"}}}')
    text = TPU.format(left="8,4", right="4,4", out="8,4", how=how)
    found = hlo.costs(text.replace("convolution(", "custom-call("))
    self.assertEqual((found.flops, found.hbm), (25769803776.0, 7.0))

  @parameterized.parameters(("fwd", 2), ("dq", 3), ("dkv", 4))
  def test_an_attention_kernel_costs_the_blocks_that_it_visits(self, kind, products):
    text = f"""HloModule m

ENTRY %main (n: s8[1,4,4]) -> bf16[6,512,64] {{
  %n = s8[1,4,4]{{2,1,0}} parameter(0)
  %m = s8[1,4,4]{{2,1,0}} parameter(1)
  %q = bf16[6,512,64]{{2,1,0}} parameter(2)
  %k = bf16[2,512,64]{{2,1,0}} parameter(3)
  %v = bf16[2,512,64]{{2,1,0}} parameter(4)
  ROOT %splash_mha_{kind}_segmented.1 = bf16[6,512,64]{{2,1,0}} custom-call(%n, %m, %q, %k, %v)
}}
"""
    found, size = hlo.costs(text), 6 * 512 * 64
    visited = sum(1 for i in range(4) for j in range(4) if j <= i)
    self.assertEqual(found.flops, products * 2 * visited * 6 * 128 * 128 * 64)
    met = visited * 2 * size * 2 / 4  # a pair of bfloat16 blocks, each a quarter of an array
    # Queries and what comes out are read or written once; so are keys and values by `dkv`, which
    # meets queries again and again, and a gradient as large as these, no operand of this text.
    other = 2 * size * 2 / 3 - 2 * size * 2 if kind == "dkv" else 0
    self.assertEqual(found.hbm, 2 * 16 + 2 * (2 * size) + met + other)

  @parameterized.parameters((7, 5, 3, 2, 1, 2, 1), (4, 4, 4, 3, 0, 4, 1), (9, 3, 6, 1, 2, 1, 2))
  def test_positions_of_a_window_are_those_that_meet_an_input(self, size, kernel, out, stride, low,
                                                              dilate, kernel_dilate):
    wanted = 0
    real = {i * dilate for i in range(size)}
    for o in range(out):
      for k in range(kernel):
        wanted += (o * stride + k * kernel_dilate - low) in real
    self.assertEqual(hlo._valid(size, kernel, out, stride, low, dilate, kernel_dilate), wanted)

  @parameterized.parameters(
      ("replica_groups=[16,8]<=[128]", 8), ("replica_groups={{0,1,2},{3,4,5}}", 3),
      ("replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_1'}", 16),
      ("replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_0','axis_1':(2)8}", 32),
      ("replica_groups=mesh['axis_0'=4,'axis_1'=1], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
      ("replica_groups={}", 16))
  def test_who_takes_part_in_a_collective(self, groups, among):
    text = ("HloModule m, num_partitions=16\n\nENTRY %main (x: f32[100]) -> f32[1600] {\n"
            "  %x = f32[100]{0} parameter(0)\n"
            f"  ROOT %g = f32[1600]{{0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}\n"
            "}\n")
    (found, times), = hlo.costs(text).collectives
    self.assertEqual((found.among, found.sent, times), (among, 400.0 * (among - 1), 1.0))

  def test_groups_of_chips_that_cannot_be_read_are_not_all_chips(self):
    text = ("HloModule m, num_partitions=16\n\nENTRY %main (x: f32[100]) -> f32[100] {\n"
            "  %x = f32[100]{0} parameter(0)\n"
            "  ROOT %g = f32[100]{0} all-reduce(%x), channel_id=1, replica_groups=[4x4]\n}\n")
    with self.assertRaisesRegex(ValueError, "which chips are .*4x4"):
      hlo.costs(text)

  def test_on_a_mesh_collectives_are_those_that_the_layout_demands(self):
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                          "JAX_PLATFORMS": "cpu"})
    self.assertEqual(child.returncode, 0, child.stderr[-4000:])
    found = json.loads(child.stdout.splitlines()[-1])
    flops, collectives = found["sum over model"]
    self.assertEqual(flops, 2 * 8 * 32 * 48)  # 8 rows and half of the sum are a device's
    self.assertEqual(collectives, [["all-reduce", 4.0 * 8 * 48, 2]])  # 2 (n - 1) / n of it
    flops, collectives = found["gathered in a loop"]
    self.assertEqual(flops, 5 * 2 * 8 * 64 * 64)
    np.testing.assert_allclose(sum(sent for _, sent, _ in collectives), 5 * 4.0 * 64 * 64 * 3 / 4)


if __name__ == "__main__":
  absltest.main()
