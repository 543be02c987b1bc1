"""token_sparse's Mosaic GPU kernels, interpreted with race detection, against loops in float64.

On a machine with a Hopper GPU or a B200, JAX_PLATFORMS=cuda runs the tests of its generation on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.token_sparse import gpu_plan, mass, op, specs, token_mass, token_sparse
from tests.kernels.test_mosaic_gpu import blackwell, both, hopper, recent, runs

NAMES = ("o", "lse", "dq", "dkv", "mass")
SMALL = [name for name in specs.HOPPER if name.startswith("tile_")]


def oracle(spec, arguments, cotangents):
    """Values, gradients and masses, one query and head at a time in float64."""
    q, kv, chosen = (np.asarray(x, np.float64 if i < 2 else int) for i, x in enumerate(arguments))
    do, d_lse = (np.asarray(x, np.float64) for x in cotangents)
    S, scale = kv.shape[1], spec.Dk**-0.5
    o, lse = np.zeros_like(do), np.full(d_lse.shape, -1e30)
    dq, dkv, weights = np.zeros_like(q), np.zeros_like(kv), np.zeros(chosen.shape)
    for b, i, h in np.ndindex(lse.shape):
        tokens = sorted({t for t in chosen[b, i].tolist() if 0 <= t < S})
        if not tokens:
            continue
        keys, values = kv[b, tokens], kv[b, tokens][:, :spec.v_dim]
        scores = keys @ q[b, i, h] * scale
        lse[b, i, h] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        p = np.exp(scores - lse[b, i, h])
        o[b, i, h] = p @ values
        d_scores = p * (values @ do[b, i, h] - do[b, i, h] @ o[b, i, h] + d_lse[b, i, h]) * scale
        dq[b, i, h] = d_scores @ keys
        dkv[b, tokens] += np.outer(d_scores, q[b, i, h])
        dkv[b, tokens, :spec.v_dim] += np.outer(p, do[b, i, h])
        for n, t in enumerate(chosen[b, i].tolist()):
            weights[b, i, n] += p[tokens.index(t)] if t in tokens else 0
    return dict(zip(NAMES, (o, lse, dq, dkv, weights), strict=True))


def compiled(spec, cores=2, target=None, backend="mosaic_gpu"):
    """Values, gradients and masses from the kernels, for any numbers of one workload's shapes."""
    @jax.jit
    def run(q, kv, chosen, do, d_lse):
        def call(q, kv):
            return token_sparse(q, kv, chosen, v_dim=spec.v_dim, scale=spec.Dk**-0.5,
                                return_lse=True, implementation=backend)

        with device.assume(target or hopper(cores)):
            out, pull = jax.vjp(call, q, kv)
            weights = token_mass(q, kv, chosen, out[1], scale=spec.Dk**-0.5,
                                 implementation=backend)
            return dict(zip(NAMES, (*out, *pull((do, d_lse)), weights), strict=True))

    return run


def check(spec, run, arguments):
    """Hold one call against the oracle, and a second against its bits; return the first."""
    rows = (spec.B, spec.L, spec.H)
    cotangents = numerics.uniform_like(
        (jax.ShapeDtypeStruct((*rows, spec.v_dim), jnp.bfloat16),
         jax.ShapeDtypeStruct(rows, jnp.float32)), seed=7)
    got, again = (run(*arguments, *cotangents) for _ in range(2))
    for name in NAMES:
        assert np.asarray(got[name]).tobytes() == np.asarray(again[name]).tobytes(), name
    want = oracle(spec, arguments, cotangents)
    assert {name: x.dtype.name for name, x in got.items()} == (
        dict.fromkeys(NAMES, "bfloat16") | dict.fromkeys(("lse", "mass"), "float32"))
    unseen = want["lse"] < -1e29
    np.testing.assert_array_equal(np.asarray(got["lse"])[unseen], np.float32(-1e30))
    assert not np.asarray(got["o"], np.float32)[unseen].any()
    held = dict(got, lse=np.where(unseen, 0, np.asarray(got["lse"])))
    want["lse"] = np.where(unseen, 0, want["lse"])
    assert numerics.report(held, {n: want[n] for n in held}, factor=0.4, dtype="bfloat16",
                           floor=1e-3) is None
    for name in ("lse", "mass"):
        assert numerics.error(held[name], want[name], floor=1.0) < 1e-5
    return got


# Three queries over 150 tokens: the first lists 65 of them, which is one more than is multiplied
# at once, the second the same token again and again, the third nothing.
EDGES = specs.Spec(B=1, L=3, S=150, H=3, N=65, Dk=40, v_dim=24)


def edges():
    """Lists with repeated tokens, tokens outside and one that is empty."""
    (q, kv, _), _ = EDGES.arguments(dtype="bfloat16")
    chosen = np.full((1, 3, 65), -1)
    chosen[0, 0] = np.random.default_rng(0).permutation(150)[:65]
    chosen[0, 0, :2] = 127, 128  # of two tiles of sums
    chosen[0, 1, ::2] = 7
    chosen[0, 1, -1] = 150
    return [q, kv, jnp.asarray(chosen, jnp.int32)]


@runs
@pytest.mark.parametrize("gpu", [hopper, pytest.param(blackwell, marks=pytest.mark.slow)])
def test_list_edges_repeated_and_absent_tokens(gpu):
    got = check(EDGES, compiled(EDGES, target=gpu(2)), edges())
    assert not np.asarray(got["dq"], np.float32)[0, 2].any()  # a row that sees nothing


@runs
def test_values_on_blackwell():
    """What costs seconds by default; gradients and masses there are slow."""
    arguments, scale = edges(), EDGES.Dk**-0.5
    with device.assume(blackwell(2)):
        o, lse = jax.jit(lambda *x: token_sparse(
            *x, v_dim=EDGES.v_dim, scale=scale, return_lse=True,
            implementation="mosaic_gpu"))(*arguments)
    want = oracle(EDGES, arguments, (np.zeros(o.shape), np.zeros(lse.shape)))
    assert numerics.report(o, want["o"], factor=0.4, dtype="bfloat16", floor=1e-3) is None
    assert (np.asarray(lse)[0, 2] == np.float32(-1e30)).all()
    assert numerics.error(lse[0, :2], want["lse"][0, :2], floor=1.0) < 1e-5


@runs
@pytest.mark.slow
@both
def test_large_and_tiny_numbers(gpu):
    q, kv, chosen = edges()
    q = q * jnp.asarray([1e4, 1e-30, 1], jnp.bfloat16)[None, :, None, None]
    arguments = [q, kv * jnp.asarray(1e-2, jnp.bfloat16), chosen]
    got = check(EDGES, compiled(EDGES, target=gpu(2)), arguments)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())


@runs
@pytest.mark.slow
@both
@pytest.mark.parametrize("name", SMALL)
def test_every_small_spec(name, gpu):
    spec = specs.HOPPER[name]
    check(spec, compiled(spec, target=gpu(2)), spec.arguments()[0])


@runs
@pytest.mark.slow
@both
def test_chunks_of_queries_add_up(monkeypatch, gpu):
    monkeypatch.setattr(gpu_plan, "GATHERED", 192)
    spec = dataclasses.replace(specs.HOPPER["tile_any"], B=2, L=5)
    check(spec, compiled(spec, target=gpu(3)), spec.arguments()[0])


def _arguments(dtype="bfloat16", Dk=80):
    shape = jax.ShapeDtypeStruct
    return shape((1, 8, 4, Dk), dtype), shape((1, 9, Dk), dtype), shape((1, 8, 5), jnp.int32)


REFUSED = {
    "cpu": (device.Target("cpu"), {}, {}, "needs an NVIDIA GPU, the device is cpu"),
    "ampere": (device.Target("gpu", "A100", (8, 0)), {}, {},
               r"needs Hopper \(9.0\) or .* is \(8, 0\)"),
    "dtype": (CHIPS["h200"].target, {"dtype": "float32"}, {}, "q is float32"),
    "latent": (CHIPS["h200"].target, {"Dk": 577}, {}, "widths up to 576, Dk is 577"),
    "scale": (CHIPS["h100"].target, {}, {"scale": -1.0}, "scale is -1.0"),
}


@recent
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(name):
    target, changes, others, reason = REFUSED[name]
    keywords = {"scale": 1.0} | others
    lse = jax.ShapeDtypeStruct((1, 8, 4), jnp.float32)
    with device.assume(target):
        if changes or others:
            assert op.explain(*_arguments(), v_dim=64, scale=1.0)["mosaic_gpu"] is None
            assert mass.explain(*_arguments(), lse, scale=1.0)["mosaic_gpu"] is None
        with pytest.raises(ValueError, match=f"token_sparse: .* cannot run: .*{reason}"):
            token_sparse(*_arguments(**changes), v_dim=64, implementation="mosaic_gpu", **keywords)
        with pytest.raises(ValueError, match=f"token_mass: .* cannot run: .*{reason}"):
            token_mass(*_arguments(**changes), lse, implementation="mosaic_gpu", **keywords)


@recent
def test_deepseeks_latent_is_served_and_wider_values_are_not():
    with device.assume(CHIPS["h200"].target):
        for v_dim, reason in ((512, None), (513, "needs values of up to 512, v_dim is 513")):
            said = op.explain(*_arguments(Dk=576), v_dim=v_dim, scale=1.0)
            assert said["mosaic_gpu"] == reason


@runs
@pytest.mark.slow
@both
def test_chunks_of_wide_queries_add_up(monkeypatch, gpu):
    monkeypatch.setattr(gpu_plan, "GATHERED", 192)
    spec = dataclasses.replace(specs.HOPPER["tile_wide"], B=2, L=5, H=65)
    check(spec, compiled(spec, target=gpu(3)), spec.arguments()[0])


@runs
@pytest.mark.slow
@both
def test_a_meeting_left_out_is_found(monkeypatch, gpu):
    """The warpgroups of a wide query share memory: race detection sees it when they do not meet."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wait = plgpu.barrier_wait
    arrive = plgpu.barrier_arrive
    alone = {"barrier_wait": wait, "barrier_arrive": arrive}

    def skipping(name):
        def call(barrier, *args, **keywords):
            if barrier.shape == ():  # the meeting's; rings have one for each slot
                return None
            return alone[name](barrier, *args, **keywords)

        return call

    for name in alone:
        monkeypatch.setattr(plgpu, name, skipping(name))
    spec = specs.HOPPER["tile_wide"]
    run, arguments = compiled(spec, target=gpu(2)), spec.arguments()[0]
    with pytest.raises(Exception, match=r"(?i)race"):
        check(spec, run, arguments)
