"""Keys that go round a ring: dense attention in float64, one device's losses, bytes and memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.planning import hlo
from sparse_pretrain.sharding import apply, mesh, ops, plans, ring, zigzag
from tests.sharding.test_plans import equal

B, H, DK, DV = 2, 4, 8, 6


def placed(text, plan="fsdp_cp", **options):
    plan = plans.find(plan)
    devices = jax.devices()[: math.prod(mesh.parse(text).values())]
    return apply.Placed(plan, mesh.make(plan, text, devices), **options)


def arguments(L, K, seed=0):
    """(q, k, v, sinks, d_o, d_lse) in float64 that float32 holds exactly, and packed segments."""
    rng = np.random.default_rng(seed)
    shapes = (B, L, H, DK), (B, L, K, DK), (B, L, K, DV), (H,), (B, L, H, DV), (B, L, H)
    arrays = [rng.normal(size=s).astype(np.float32).astype(np.float64) for s in shapes]
    # documents that begin and end inside parts, one longer than several; padding at the end
    cuts = np.sort(rng.choice(np.arange(1, L), (B, 3), replace=True), axis=1)
    segments = 1 + np.sum(np.arange(L)[None, :, None] >= cuts[:, None], axis=-1)
    segments[-1, L - L // 5 :] = 0
    return arrays, segments.astype(np.int32)


def dense(arrays, segments, *, window, softcap, scale):
    """o, lse and the gradients of q, k, v and sinks, written out over all pairs."""
    q, k, v, sinks, d_o, d_lse = arrays
    L, G = q.shape[1], H // k.shape[2]
    k, v = (np.repeat(x, G, axis=2) for x in (k, v))
    place = np.arange(L)
    seen = (place[:, None] >= place[None]) & (place[:, None] - place[None] < (window or L))
    seen = seen[None] & (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None]
    raw = np.einsum("blhd,bshd->bhls", q, k) * scale
    bent = softcap * np.tanh(raw / softcap) if softcap else raw
    w = np.where(seen[:, None], np.exp(bent), 0)
    total = w.sum(-1) + (0 if sinks is None else np.exp(sinks)[None, :, None])
    none = total == 0
    p = w / np.where(none, 1, total)[..., None]
    o = np.einsum("bhls,bshd->blhd", p, v)
    lse = np.where(none, -1e30, np.log(np.where(none, 1, total)))
    d_p = np.einsum("blhd,bshd->bhls", d_o, v)
    delta = np.sum(d_p * p, axis=-1) - np.where(none, 0, d_lse.transpose(0, 2, 1))
    d_s = p * (d_p - delta[..., None])
    d_sinks = None
    if sinks is not None:
        d_sinks = -np.sum(np.exp(sinks)[None, :, None] / total * delta, axis=(0, 2))
    if softcap:
        d_s *= 1 - np.tanh(raw / softcap) ** 2

    def grouped(x):
        return x.reshape(B, L, H // G, G, -1).sum(3)

    dq = np.einsum("bhls,bshd->blhd", d_s, k) * scale
    dk = grouped(np.einsum("bhls,blhd->bshd", d_s, q) * scale)
    dv = grouped(np.einsum("bhls,blhd->bshd", p, d_o))
    return o, lse.transpose(0, 2, 1), dq, dk, dv, d_sinks


def check(text, *, L, K=2, window=None, softcap=None, sinks=False, context="ring"):
    arrays, segments = arguments(L, K)
    if not sinks:
        arrays[3] = None
    scale = DK**-0.5
    want = dense(arrays, segments, window=window, softcap=softcap, scale=scale)
    laid = placed(text, context=context)

    def run(q, k, v, sinks, d_o, d_lse, segments):
        def attend(q, k, v, sinks):
            return ops.flash(
                q, k, v, segments_q=segments, scale=scale, window=window, softcap=softcap,
                sinks_H=sinks, return_lse=True,
            )  # fmt: skip

        (o, lse), pull = jax.vjp(attend, q, k, v, sinks)
        return o, lse, *pull((d_o, d_lse))

    low = [None if a is None else np.asarray(a, np.float32) for a in arrays]
    program = laid.jit(run).lower(*low, segments).compile()
    sent = hlo.count(program.as_text()).collectives
    assert ("collective-permute" in sent) == (context == "ring" and window != 1)
    for name, got, wanted in zip(("o", "lse", "dq", "dk", "dv", "d_sinks"),
                                 program(*low, segments), want, strict=True):  # fmt: skip
        if wanted is not None:
            wanted = wanted.astype(np.float32).astype(np.float64)  # -1e30, where nothing is seen
            error = np.abs(np.asarray(got, np.float64) - wanted).max()
            far = np.abs(np.where(np.abs(wanted) > 1e29, 0, wanted)).max()
            assert error < 1e-5 * max(far, 1), (name, error, far)


def test_values_and_gradients_are_those_of_dense_attention_in_float64():
    check("context=4,fsdp=2", L=48, sinks=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("context=8,fsdp=1", dict(L=72, K=1)),  # parts of 9 cannot be halved: no zig-zag
        ("context=8,fsdp=1", dict(L=96, K=1, softcap=5.0, sinks=True)),
        ("context=3,fsdp=1", dict(L=36)),
        ("context=2,fsdp=1", dict(L=40, K=4, softcap=3.0)),
        ("context=8,fsdp=1", dict(L=64, window=1)),
        ("context=8,fsdp=1", dict(L=64, window=9)),
        ("context=8,fsdp=1", dict(L=64, window=10, sinks=True)),
        ("context=4,fsdp=2", dict(L=64, window=40, softcap=5.0)),
        ("context=8,fsdp=1", dict(L=64, window=200)),
        ("context=4,fsdp=2", dict(L=48, sinks=True, context="gather")),
    ],
)
def test_heads_windows_softcaps_and_sinks(text, options):
    check(text, **options)


def test_a_window_takes_as_many_turns_as_it_reaches_parts():
    for devices in (2, 8):
        for rows in (1, 4, 7):
            for window in range(1, 3 * devices * rows):
                far = [max(0, (part * rows - window + 1) // rows) for part in range(devices)]
                reached = max(part - first for part, first in enumerate(far)) + 1
                assert ring.turns(devices, rows, window=window) == reached
    assert ring.turns(8, 4) == ring.turns(8, 4, causal=False, window=2) == 8


def test_zigzag_gives_every_device_as_many_pairs_of_chunks_and_none_twice():
    for n in (2, 3, 4, 8, 16):
        each = [zigzag.pairs(n, me) for me in range(n)]
        done = sorted(pair for pairs in each for pair in pairs)
        assert done == [(query, key) for query in range(2 * n) for key in range(query + 1)]
        # of a chunk with itself half is read
        work = [sum(1 if a > b else 0.5 for a, b in pairs) for pairs in each]
        assert work == [2 * n] * n
        plain = [4 * part + 2 for part in range(n)]  # a part of two chunks and all before it
        assert sum(work) == sum(plain)
        assert max(plain) == 4 * n - 2


def test_the_compiled_ring_runs_as_many_products_as_zigzag_says():
    """On every device, since no loop is left to what a device finds."""
    devices, L, K = 4, 64, 2
    where = placed(f"context={devices},fsdp=1", context="ring")
    arrays, segments = arguments(L, K)
    low = [np.asarray(a, np.float32) for a in arrays[:3]]

    def run(q, k, v, segments):
        return ops.flash(q, k, v, segments_q=segments, scale=DK**-0.5)

    found = hlo.count(where.jit(run).lower(*low, segments).compile().as_text())
    assert not found.open_loops
    chunk = L // devices // 2
    # a device's own two chunks are one block of scores, of which the mask leaves half
    pairs = 4 + len(zigzag.pairs(devices, 0)[3:])
    assert found.flops == pairs * chunk**2 * 2 * B * H * (DK + DV)


def test_keys_go_round_where_that_saves_bytes_or_memory():
    small, large = ring.WORTH - 1, ring.WORTH
    assert not ring.serves("auto", 8, 8, small)
    assert ring.serves("auto", 8, 8, large)
    assert not ring.serves("auto", 4, 4, large)
    # 4 parts of others round a ring are 40 bytes a number where 7 gathered ones are 42
    assert ring.serves("auto", 5, 8, small)
    assert not ring.serves("auto", 6, 8, small)
    assert ring.serves("ring", 8, 8, small)
    assert not ring.serves("gather", 2, 8, large)


def compiled(laid, rows, devices):
    """A program of attention and its gradients for rows x devices tokens, float32."""
    L = rows * devices
    where = laid.named(laid.rows)
    like = [jax.ShapeDtypeStruct((1, L, h, 64), jnp.float32, sharding=where) for h in (8, 8, 8)]
    segments = jax.ShapeDtypeStruct((1, L), jnp.int32, sharding=where)

    def run(q, k, v, segments, d_o):
        def attend(q, k, v):
            return ops.flash(q, k, v, segments_q=segments, scale=0.125)

        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(d_o)

    return laid.jit(run, out_shardings=(where,) * 4).lower(*like, segments, like[0]).compile()


@pytest.mark.slow
def test_memory_is_of_parts_of_a_row_and_bytes_are_counted():
    rows, part = 512, 512 * 8 * 64 * 4  # bytes of a device's keys, and of its values
    held = {}
    for how in ("gather", "ring"):
        for devices in (4, 8):
            laid = placed(f"context={devices},fsdp=1", context=how)
            program = compiled(laid, rows, devices)
            held[how, devices] = program.memory_analysis().temp_size_in_bytes
            sent = hlo.count(program.as_text()).collectives
            if how == "ring":
                # keys, values and segments in both passes, gradients of both in one; queries,
                # keys, values, segments and o to their chunks' places or back, gradients too, and
                # that of the softmax's logarithm
                size = (devices - 1) * (6 * part + 2 * 4 * rows)
                size += 8 * part + 4 * rows + 4 * 8 * rows
                assert sent["collective-permute"]["bytes"] == size
                assert not {"all-gather", "all-to-all"} & set(sent)
    # with 8 devices a row is twice as long: gathered keys, values and gradients grow with it
    assert held["gather", 8] - held["gather", 4] >= 4 * 4 * part, held
    assert held["ring", 8] <= 1.02 * held["ring", 4], held
    assert held["ring", 8] < 0.55 * held["gather", 8], held


@pytest.fixture(scope="module")
def alone():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mla", "full", "sliding"])
def test_losses_are_those_of_one_device_to_1e_5(attention, alone):
    """20 steps in float32 with experts; rows of packed documents cut in 4."""
    equal(alone, attention, "fsdp_ep_cp", "fsdp=1,expert=2,context=4", asked={"context": "ring"})
