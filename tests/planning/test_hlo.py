"""Products and collectives counted in programs: by hand, and as this machine compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_pretrain.planning import hlo

X = jax.ShapeDtypeStruct((6, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 6 * 8 * 8


def counted(call, *arguments):
    return hlo.count(jax.jit(call).lower(*arguments).compile().as_text())


def test_products_alone_and_in_batches():
    def call(x, w, y):
        return jnp.einsum("rd,ndk->nkr", x @ w @ w.T, y)

    y = jax.ShapeDtypeStruct((3, 8, 5), jnp.float32)
    found = counted(call, X, W, y)
    assert found.flops == 2 * ONE + 2 * 3 * 6 * 8 * 5
    assert (found.open_loops, found.kernels, found.collectives) == (0, 0, {})


def test_a_scan_is_counted_by_its_trips_in_loops_of_loops_too():
    def call(x, w):
        def inner(x, _):
            return jnp.tanh(x @ w), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=7)[0]

    assert counted(call, X, W).flops == 35 * ONE


def test_a_loop_whose_trips_the_data_decides_is_taken_once_and_reported():
    def call(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    found = counted(call, X, W, jax.ShapeDtypeStruct((), jnp.int32))
    assert (found.flops, found.open_loops) == (ONE, 1)


def test_of_a_choice_the_dearer_branch_is_taken():
    def call(x, w, n):
        return jax.lax.cond(n > 3, lambda: x @ w @ w, lambda: jnp.sin(x @ w))

    assert counted(call, X, W, jax.ShapeDtypeStruct((), jnp.int32)).flops == 2 * ONE


def test_collectives_by_their_runs_and_bytes_on_each_device():
    laid = Mesh(np.array(jax.devices()[:4]), ("x",))

    def local(x):
        def one(total, _):
            return total + jax.lax.psum(jnp.sin(total), "x"), None

        total = jax.lax.scan(one, x, None, length=3)[0]
        return jax.lax.all_gather(total, "x", tiled=True)

    call = jax.shard_map(local, mesh=laid, in_specs=P("x"), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(laid, P("x")))
    found = counted(call, x).collectives
    assert found["all-reduce"] == {"count": 3, "bytes": 3 * 2 * 16 * 4}
    assert found["all-gather"] == {"count": 1, "bytes": 8 * 16 * 4}


# As the compilers for NVIDIA's chips and TPUs write them.
GPU = """HloModule jit_step, is_scheduled=true

%gemm_fusion_dot.1_computation (parameter_0: bf16[4,32,64], parameter_1: bf16[4,64,16]) -> bf16[4,32,16] {
  %parameter_0 = bf16[4,32,64]{2,1,0} parameter(0)
  %parameter_1 = bf16[4,64,16]{2,1,0} parameter(1)
  ROOT %dot.1 = bf16[4,32,16]{2,1,0} dot(%parameter_0, %parameter_1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="a(b)"}
}

%body.2 (param.3: (s32[], bf16[4,32,64], /*index=2*/bf16[4,64,16])) -> (s32[], bf16[4,32,64], bf16[4,64,16]) {
  %param.3 = (s32[], bf16[4,32,64]{2,1,0}, /*index=2*/bf16[4,64,16]{2,1,0}) parameter(0)
  %get-tuple-element.4 = bf16[4,32,64]{2,1,0} get-tuple-element(%param.3), index=1
  %get-tuple-element.5 = bf16[4,64,16]{2,1,0} get-tuple-element(%param.3), index=2
  %gemm_fusion_dot.1 = bf16[4,32,16]{2,1,0} fusion(%get-tuple-element.4, %get-tuple-element.5), kind=kCustom, calls=%gemm_fusion_dot.1_computation, backend_config={"a":{"b":["x"]}}
  %all-gather-start.1 = (bf16[4,32,16]{2,1,0}, bf16[8,32,16]{2,1,0}) all-gather-start(%gemm_fusion_dot.1), channel_id=1, dimensions={0}
  %all-gather-done.1 = bf16[8,32,16]{2,1,0} all-gather-done(%all-gather-start.1)
  ROOT %tuple.6 = (s32[], bf16[4,32,64]{2,1,0}, bf16[4,64,16]{2,1,0}) tuple(%param.3, %get-tuple-element.4, %get-tuple-element.5)
}

%cond.2 (param.7: (s32[], bf16[4,32,64], bf16[4,64,16])) -> pred[] {
  %param.7 = (s32[], bf16[4,32,64]{2,1,0}, bf16[4,64,16]{2,1,0}) parameter(0)
  ROOT %unknown.8 = pred[] custom-call(%param.7), custom_call_target="x"
}

ENTRY %main.9 (p.1: bf16[128,512], p.2: bf16[512,256]) -> f32[128,256] {
  %p.1 = bf16[128,512]{1,0} parameter(0)
  %p.2 = bf16[512,256]{1,0} parameter(1)
  %cublas.1 = (f32[128,256]{1,0}, s8[4194304]{0}) custom-call(%p.1, %p.2), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  %mosaic.1 = f32[128,256]{1,0} custom-call(%p.1), custom_call_target="mosaic_gpu_v2"
  %while.1 = (s32[], bf16[4,32,64]{2,1,0}, bf16[4,64,16]{2,1,0}) while(%tuple.0), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"11"}}
  ROOT %out = f32[128,256]{1,0} get-tuple-element(%cublas.1), index=0
}
"""  # noqa: E501


def test_nvidias_products_are_fusions_and_calls_of_cublas():
    found = hlo.count(GPU)
    assert found.flops == 2 * 128 * 256 * 512 + 11 * 2 * 4 * 32 * 16 * 64
    assert found.collectives == {"all-gather": {"count": 11, "bytes": 11 * 8 * 32 * 16 * 2}}
    assert (found.open_loops, found.kernels) == (0, 1)


TPU = """HloModule jit_step

%fused.1 (p.0: bf16[16,128,64], p.1: bf16[16,256,64]) -> f32[16,128,256] {
  %p.0 = bf16[16,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[16,256,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution-base-dilated.1 = f32[16,128,256]{2,1,0:T(8,128)} convolution(%p.0, %p.1), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0oi->0bf
}

%add.2 (p.5: s32[]) -> s32[] {
  %p.5 = s32[]{:T(128)} parameter(0)
  %constant.6 = s32[]{:T(128)} constant(2)
  ROOT %add.7 = s32[]{:T(128)} add(%p.5, %constant.6)
}

%body.3 (p.8: (s32[], bf16[16,128,64], bf16[16,256,64], s32[])) -> (s32[], bf16[16,128,64], bf16[16,256,64], s32[]) {
  %p.8 = (s32[]{:T(128)}, bf16[16,128,64]{2,1,0:T(8,128)(2,1)}, bf16[16,256,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%p.8), index=0
  %gte.1 = bf16[16,128,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.8), index=1
  %gte.2 = bf16[16,256,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.8), index=2
  %gte.3 = s32[]{:T(128)} get-tuple-element(%p.8), index=3
  %fusion.1 = f32[16,128,256]{2,1,0:T(8,128)} fusion(%gte.1, %gte.2), kind=kOutput, calls=%fused.1
  %fusion.2 = s32[]{:T(128)} fusion(%gte.0), kind=kLoop, calls=%add.2
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[16,128,64]{2,1,0:T(8,128)(2,1)}, bf16[16,256,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%fusion.2, %gte.1, %gte.2, %gte.3)
}

%cond.4 (p.9: (s32[], bf16[16,128,64], bf16[16,256,64], s32[])) -> pred[] {
  %p.9 = (s32[]{:T(128)}, bf16[16,128,64]{2,1,0:T(8,128)(2,1)}, bf16[16,256,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %gte.5 = s32[]{:T(128)} get-tuple-element(%p.9), index=0
  %gte.6 = s32[]{:T(128)} get-tuple-element(%p.9), index=3
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.5, %gte.6), direction=LT
}

ENTRY %main.5 (q.0: bf16[16,128,64], q.1: bf16[16,256,64], q.2: bf16[256,4,1], q.3: bf16[32,256]) -> f32[] {
  %q.0 = bf16[16,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[16,256,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %q.2 = bf16[256,4,96]{2,1,0:T(8,128)(2,1)} parameter(2)
  %q.3 = bf16[256,2,1]{1,0,2:T(8,128)(2,1)} parameter(3)
  %constant.1 = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%constant.1)
  %constant.2 = s32[]{:T(128)} constant(8)
  %tuple.2 = (s32[]{:T(128)}, bf16[16,128,64]{2,1,0:T(8,128)(2,1)}, bf16[16,256,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%copy.1, %q.0, %q.1, %constant.2)
  %while.1 = (s32[]{:T(128)}, bf16[16,128,64]{2,1,0:T(8,128)(2,1)}, bf16[16,256,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%tuple.2), condition=%cond.4, body=%body.3
  %convolution.468 = bf16[4,2,96]{1,2,0:T(8,128)(2,1)} convolution(%q.3, %q.2), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=fb0_i0o->0bf
  %kernel.1 = f32[8,128]{1,0} custom-call(%q.0), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"4096","bytes_accessed":7}}}
  ROOT %end = f32[] constant(0)
}
"""  # noqa: E501


def test_a_tpus_products_are_convolutions_and_its_loops_have_no_note_of_their_trips():
    found = hlo.count(TPU)
    batched = 2 * 16 * 128 * 256 * 64  # one of 16 positions of the kernel meets a number
    heads = 2 * 4 * 2 * 96 * 256  # [256, 2] times [256, 4, 96], the 4 as a window over one number
    assert found.flops == 4 * batched + heads + 4096  # 1, 3, 5, 7
    assert (found.open_loops, found.kernels) == (0, 0)
    again = hlo.count(
        TPU.replace("%copy.1, %q.0", "%q.9, %q.0").replace(
            "%copy.1 = s32[]{:T(128)} copy(%constant.1)", "%q.9 = s32[] parameter(4)"
        )
    )
    assert again.flops == batched + heads + 4096
    assert again.open_loops == 1


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.count("HloModule x")
