"""flash's Mosaic TPU kernels, interpreted with race detection, against dense attention in float64.

On a machine with a TPU, JAX_PLATFORMS=tpu,cpu runs the same tests on it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device
from kernels_pallas.chips import CHIPS
from kernels_pallas.flash import flash, op, pairs, specs, tpu_plan
from kernels_pallas.flash.table import table_of
from tests.kernels import test_mosaic_gpu_flash as gpu
from tests.kernels.test_flash import _seen
from tests.kernels.test_mosaic_gpu_flash import SMALL, _arguments
from tests.kernels.test_mosaic_tpu import chip

# Of late keys, documents, a window, rows that see nothing and widths that are no whole lanes.
CROSSING = specs.Spec(B=1, L=140, S=35, H=2, K=1, Dk=24, Dv=40, stride=4, span=8, window=60,
                      segments="packed", ends=True, sinks=True, softcap=2.0)


def check(spec, **more):
    """What is held of Hopper's kernels, of these; blocks of 128, of which there are several."""
    return gpu.check(lambda cores: chip(), spec, backend="mosaic_tpu", **more)


def test_all_that_masks_and_bends_at_once():
    check(dataclasses.replace(CROSSING, block_q=128, block_k=128))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name):
    check(SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_several_steps_of_which_some_are_seen_whole(window, causal):
    check(specs.Spec(B=2, L=600, S=700, H=2, K=1, window=window, causal=causal, block_q=256,
                     block_k=128))


@pytest.mark.slow
def test_float32_is_not_rounded():
    check(dataclasses.replace(CROSSING, L=300, S=75), dtype="float32")
    check(specs.Spec(B=1, L=260, H=2, K=1, block_q=128, block_k=128), dtype="float32")


@pytest.mark.slow
def test_large_and_tiny_numbers():
    scale = jnp.asarray([1e4, 1e-30, 1, 1, 1, 1], jnp.bfloat16)[None, None, :, None]
    got = check(dataclasses.replace(specs.HOPPER["tile_group"], L=70),
                change=lambda q, k, v: (q * scale, k * jnp.asarray(1e-2, k.dtype), v))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 37, 150])
def test_queries_may_be_a_part_of_a_row(first):
    gpu.check_part(lambda cores: chip(), first, backend="mosaic_tpu")


WIDE = {
    "window": specs.Spec(B=2, L=700, window=150, segments="packed"),
    "unseen": specs.Spec(L=600, S=300),
    "late": specs.Spec(B=2, L=900, S=225, stride=4, span=8, window=200, segments="padded",
                       ends=True),
    "full": specs.Spec(L=400, S=700, causal=False),
}


_BLOCKS = ((128, 128), (256, 128), (128, 256))
_QUICK = (("late", (256, 128)), ("window", (128, 256)))


@pytest.mark.parametrize(("name", "blocks"), [
    case if case in _QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(WIDE, _BLOCKS)])
def test_visits_meet_every_pair_that_is_seen_once(name, blocks):
    """Of queries and of keys, in order of tiles, none of which is left out."""
    spec = WIDE[name]
    arguments, keywords = spec.arguments(dtype="bfloat16")
    marks = pairs.Marks(*(keywords.get(n) for n in ("segments_q", "segments_k", "ends_BxS")))
    keywords |= {"block_q": blocks[0], "block_k": blocks[1]}
    S, (t, n) = spec.S or spec.L, blocks
    seen = np.broadcast_to(_seen(spec, keywords)[:, 0], (spec.B, spec.L, S))
    plan = tpu_plan.plan_of(*arguments, **keywords)
    assert (plan.position.block_q, plan.position.block_k) == blocks
    table = jax.jit(functools.partial(table_of, plan))(marks)
    for by_key in (False, True):
        visits = jax.jit(functools.partial(tpu_plan.listed, plan, by_key=by_key))(table)
        used = int(visits.used)
        assert used <= plan.visits == len(visits.mine) - 1
        mine, other, plain = (np.asarray(x) for x in visits[:3])
        tiles = plan.steps if by_key else plan.tiles
        assert (np.diff(mine[:used]) >= 0).all()
        assert mine[used] == -1
        assert set(mine[:used]) == set(range(spec.B * tiles))
        met = np.zeros((spec.B, plan.L, plan.S), int)
        for z in range(used):
            i, s = (other[z], mine[z]) if by_key else (mine[z], other[z])
            (b, i), (same, s) = divmod(i, plan.tiles), divmod(s, plan.steps)
            assert b == same
            met[b, i * t:(i + 1) * t, s * n:(s + 1) * n] += 1
            if plain[z]:
                assert (s + 1) * n <= S
                assert seen[b, i * t:(i + 1) * t, s * n:(s + 1) * n].all()
        assert met.max() == 1
        assert not (seen & (met[:, :spec.L, :S] == 0)).any()


def test_documents_and_windows_are_skipped():
    q, k, v = specs.Spec(B=1, L=4096, H=1, K=1).arguments(dtype="bfloat16")[0]

    def visits(**keywords):
        marks = pairs.Marks(*[keywords.get("segments_q")] * 2)
        plan = tpu_plan.plan_of(q, k, v, scale=1.0, block_q=128, block_k=128, **keywords)

        @jax.jit
        def used(marks):
            table = table_of(plan, marks)
            return [tpu_plan.listed(plan, table, by_key).used for by_key in (False, True)]

        return [int(n) for n in used(marks)]

    documents = jnp.asarray(np.arange(4096)[None] // 512 + 1, jnp.int32)
    assert visits() == [32 * 33 // 2] * 2
    assert visits(segments_q=documents) == [8 * (4 * 5 // 2)] * 2
    assert visits(window=128) == [1 + 31 * 2] * 2


TPU = CHIPS["v5p"].target
REFUSED = {
    "gpu": (CHIPS["h200"].target, {}, {}, "needs a TPU, the device is NVIDIA H200"),
    "dtype": (TPU, {"dtype": "float16"}, {}, "q is float16"),
    "width": (TPU, {"Dk": 1 << 15}, {}, "widths 32768 and 128 take [0-9]+"),
    "blocks": (TPU, {}, {"block_q": 1 << 14, "block_k": 1 << 12}, "4096 keys take [0-9]+"),
    "rows": (TPU, {"B": 1 << 16}, {}, "needs at most 32768 meetings of tiles, 65536 rows"),
}


def _shapes(B=1, **changes):
    return tuple(jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype) for x in _arguments(**changes))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, others, reason = REFUSED[name]
    with device.assume(target):
        assert (op.explain(*_shapes(), scale=1.0)["mosaic_tpu"] is None) == (target is TPU)
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run: .*{reason}"):
            flash(*_shapes(**changes), implementation="mosaic_tpu", scale=1.0, **others)
