"""block_sparse: every backend against a loop over queries in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from kernels_pallas.block_sparse import block_sparse, op, specs
from kernels_pallas.block_sparse.xla import keys_per_query

FAST = [backend.name for backend in op.backends
        if backend.name == "xla"]  # Mosaic kernels have tests of their own


def _numpy(spec, arguments, cotangents):
    """Output and gradients, one query and head at a time."""
    q, k, v, blocks, starts = (np.asarray(x, np.float64 if i < 3 else int)
                               for i, x in enumerate(arguments))
    do, d_lse = (np.asarray(x, np.float64) for x in cotangents)
    M, scale = starts.shape[1], spec.Dk**-0.5
    o, lse = np.zeros_like(do), np.full(d_lse.shape, -1e30)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, i, h in np.ndindex(lse.shape):
        own = h // (spec.H // spec.K)
        choices = {m for m in blocks[b, i, h // (spec.H // spec.G)].tolist() if 0 <= m < M}
        if not choices:
            continue
        at = np.concatenate([starts[b, m] + np.arange(spec.block) for m in sorted(choices)])
        keys, values = k[b, at, own], v[b, at, own]
        weights = np.exp(keys @ q[b, i, h] * scale)
        lse[b, i, h] = np.log(weights.sum())
        p = weights / weights.sum()
        o[b, i, h] = p @ values
        d_s = p * (values @ do[b, i, h] - do[b, i, h] @ o[b, i, h] + d_lse[b, i, h]) * scale
        dq[b, i, h] = d_s @ keys
        dk[b, at, own] += np.outer(d_s, q[b, i, h])
        dv[b, at, own] += np.outer(p, do[b, i, h])
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _graded(implementation, arguments, keywords, cotangents):
    """Output and gradients; weighing the output tests every element with one gradient."""
    blocks, starts = arguments[3:]

    def loss(q, k, v):
        out = block_sparse(q, k, v, blocks, starts, return_lse=True,
                           implementation=implementation, **keywords)
        parts = [jnp.where(x > -1e29, x.astype(c.dtype) * c, jnp.zeros_like(c)).sum()
                 for x, c in zip(out, cotangents, strict=True)]  # -1e30 would round all else away
        return sum(parts), out

    graded = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    def run():
        (_, out), gradients = graded(*arguments[:3])
        return dict(zip(("o", "lse", "dq", "dk", "dv"), (*out, *gradients), strict=True))

    return run


def _check(backend, spec, dtype):
    arguments, keywords = spec.arguments(dtype=dtype)
    wide = jnp.dtype("float64" if dtype == "float64" else "float32")
    rows = (spec.B, spec.L, spec.H)
    sizes = [jax.ShapeDtypeStruct(s, wide) for s in ((*rows, spec.Dv), rows)]
    cotangents = numerics.uniform_like(sizes, seed=7)
    run = _graded(backend, arguments, keywords, cotangents)
    got, again = run(), run()
    for name in got:  # the same bits
        assert np.asarray(got[name]).tobytes() == np.asarray(again[name]).tobytes(), name
    want = _numpy(spec, arguments, cotangents)
    assert {n: x.dtype.name for n, x in got.items()} == (
        dict.fromkeys(("o", "dq", "dk", "dv"), dtype) | {"lse": wide.name})
    unseen = want["lse"] < -1e29
    np.testing.assert_allclose(np.asarray(got["lse"])[unseen], -1e30, rtol=1e-6)
    for results in (got, want):
        results["lse"] = jnp.where(unseen, 0, np.asarray(results["lse"]))
    assert numerics.report(got, {n: want[n] for n in got}, dtype=dtype, floor=0.1) is None


@pytest.mark.parametrize("name", specs.PARITY)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_in_float64(backend, name):
    with jax.enable_x64(True):
        _check(backend, specs.PARITY[name], "float64")


@pytest.mark.parametrize("name", ["heads_share", "any", "documents"])
def test_the_reference(name):
    with jax.enable_x64(True):
        _check("reference", specs.PARITY[name], "float64")


@pytest.mark.parametrize(("name", "dtype"), [("widths", "float32"), ("odd", "bfloat16")])
def test_values_and_gradients_rounded(name, dtype):
    _check("xla", specs.PARITY[name], dtype)


def test_memory_is_far_below_that_of_scores():
    def temporary(implementation):
        L = 8192
        shapes = ((1, L, 4, 64), (1, L, 1, 64), (1, L, 1, 64), (1, L, 1, 16), (1, L // 64))
        dtypes = (jnp.bfloat16,) * 3 + (jnp.int32,) * 2
        arguments = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, dtypes, strict=True)]
        graded = jax.jit(jax.grad(lambda *a: block_sparse(
            *a, block=64, scale=0.1, implementation=implementation).astype(jnp.float32).sum(),
            (0, 1, 2)))
        return graded.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 8192 * 8192  # in bytes: one of each
    assert temporary("xla") < scores
    assert temporary("reference") > 2 * scores


def test_the_keys_counted_hold_the_keys_chosen():
    """Tiles are filled up: a little more is executed than a query's choices hold."""
    sizes = {"heads": 4, "kv_heads": 1, "groups": 4, "block": 512, "choices": 3}
    for length in (8192, 32768):
        chosen = sum(min(i // 512, 3) for i in range(length)) * 512 / length
        assert chosen <= keys_per_query(length, **sizes) <= 1.5 * chosen
    assert keys_per_query(500, **sizes) == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"k": (2, 9, 2, 5)}, "do not fit"),
    ({"v": (2, 9, 4)}, "v has shape"),
    ({"q": (2, 8, 6, 4)}, "6 heads, 4 selection heads and 2 key heads"),
    ({"blocks": (2, 7, 4, 3)}, r"blocks \(2, 7, 4, 3\)"),
    ({"block": 0}, "block=0"),
    ({"implementation": "cudnn"}, "'cudnn' is unknown"),
])
def test_mistakes_are_named(change, message):
    shapes = {"q": (2, 8, 4, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 4), "blocks": (2, 8, 4, 3),
              "starts": (2, 2)}
    shapes |= {n: s for n, s in change.items() if n in shapes}
    keywords = {"block": 4} | {n: s for n, s in change.items() if n not in shapes}
    dtypes = (jnp.float32,) * 3 + (jnp.int32,) * 2
    arguments = [jnp.zeros(s, t) for s, t in zip(shapes.values(), dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        block_sparse(*arguments, scale=1.0, **keywords)
