"""Memories in the model: against loops in numpy; causal, apart by document, alike one at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import config, nn, optim, shapes
from sparse_pretrain.model import decode, engram, lm, residual
from sparse_pretrain.optim import groups
from sparse_pretrain.planning import flops, layout, network
from sparse_pretrain.sharding import apply, mesh, ops, plans
from tests.model.conftest import drawn, packed, small

MEMORY = engram.Config(layers=(0, 1, 3), orders=(2, 3), heads=2, width=16, rows=40)
STREAMS = {"plain": residual.PLAIN, "mhc": residual.MHCConfig(streams=2, iterations=2)}


def layered(**changes):
    """Dense layers alone: a prefix and three repeats."""
    return small(pattern=("dense",), repeats=3, **changes)


def rows_of(config, tokens, segments):
    """Rows that depend on the last tokens of the document, as hashes do; not those of data/."""
    out = np.zeros((*tokens.shape, config.carried), np.int32)
    for b, t in np.ndindex(tokens.shape):
        for a in range(config.carried):
            place, table = divmod(a, config.reads)
            order = config.orders[table // config.heads]
            seen = [
                int(tokens[b, t - k]) + 1 if t >= k and segments[b, t - k] == segments[b, t] else 0
                for k in range(order)
            ]
            sizes = engram.tables(config)[place]
            found = sum((x * (7 * k + 3 + a)) for k, x in enumerate(seen)) % sizes[table]
            out[b, t, a] = found + sum(sizes[:table])
    return out


def remembered(batch, config=MEMORY):
    """The batch with such rows."""
    rows = rows_of(config, np.asarray(batch.tokens), np.asarray(batch.segments))
    return batch._replace(memory=rows)


def one_token_at_a_time(params, config, x, rows, segments, eps):
    """The module in float64 loops: gates of every stream, then the convolution."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    B, L, R, D = x.shape
    back = max(config.orders)

    def norm(v, scale):
        return v / np.sqrt((v * v).mean() + eps) * scale

    gated, normed, out = (np.zeros((B, L, R, D)) for _ in range(3))
    for b, t, r in np.ndindex(B, L, R):
        e = np.concatenate([p["table"][row] for row in rows[b, t]])
        alike = norm(e @ p["w_key"][r], p["norm_key"][r]) @ norm(x[b, t, r], p["norm_stream"][r])
        alike /= np.sqrt(D)
        a = np.sign(alike) * np.sqrt(max(abs(alike), 1e-6))
        gated[b, t, r] = e @ p["w_value"] / (1 + np.exp(-a))
        normed[b, t, r] = norm(gated[b, t, r], p["norm_value"][r])
    for b, t, r in np.ndindex(B, L, R):
        total = np.zeros(D)
        for k in range(config.taps):
            s = t - k * back
            if s >= 0 and segments[b, s] == segments[b, t]:
                total += p["taps"][k, r] * normed[b, s, r]
        out[b, t, r] = x[b, t, r] + gated[b, t, r] + total / (1 + np.exp(-total))
    return out


@pytest.mark.parametrize("streams", [1, 3])
def test_the_module_is_its_equations(streams, rng):
    c = dataclasses.replace(MEMORY, layers=(2,))
    definition = nn.define(
        lambda keys: engram.Memory(c, 8, keys, place=0, eps=1e-5, out_gain=0.5, streams=streams)
    )
    params, prices = drawn(definition.shapes, 0.3), drawn(definition.price_shapes)
    assert params["table"].shape == (256, 4)  # 173 rows, filled up
    still = params | {"taps": np.zeros_like(params["taps"])}
    batch = remembered(packed(rng, rows=2, length=15), c)
    x = rng.normal(size=(2, 15, streams, 8)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope(params, x):
        y = definition.merge(params, prices)(
            x[:, :, 0] if streams == 1 else x, batch.memory, batch.segments
        )
        return jnp.sum(jnp.square(y)), y.reshape(x.shape)

    def run(params, x):
        return slope(params, x)[1]

    for p in (still, params):
        want = one_token_at_a_time(
            p, c, x.astype(np.float64), batch.memory, np.asarray(batch.segments), 1e-5
        )
        np.testing.assert_allclose(run(p, x), want, rtol=2e-5, atol=2e-5)
    # the convolution starts at zero: what it reads changes nothing, and yet it learns
    deaf = still | {"norm_value": np.asarray(params["norm_value"]) * 7}
    np.testing.assert_array_equal(run(deaf, x), run(still, x))
    assert np.abs(slope(still, x)[0]["taps"]).min() > 0


@pytest.mark.parametrize("kind", ["plain", pytest.param("mhc", marks=pytest.mark.slow)])
def test_a_model_with_memories_is_causal_keeps_documents_apart_and_decodes_alike(kind, rng):
    c = layered(memory=MEMORY, residual=STREAMS[kind])
    assert c.memory_cuts == [0, 2, 3]  # the second stands before the first of the repeats
    definition = lm.define(c)
    params, prices = drawn(definition.shapes, 0.2), drawn(definition.price_shapes)
    batch = remembered(packed(rng, rows=2, length=12))
    at = 6

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope(table, batch):
        own = params | {"memory_2": params["memory_2"] | {"table": table}}
        out = definition.merge(own, prices)(batch)[0]
        return jnp.sum(jnp.square(out[0, at])), out

    def hidden(table, batch):
        return np.asarray(slope(table, batch)[1])

    # a row's gradient reaches its token and those after it in the document, and no other
    table = params["memory_2"]["table"]
    grads, _ = slope(table, batch)
    own = np.asarray(batch.segments)
    seen = [t for t in range(at + 1) if own[0, t] == own[0, at]]
    rows = batch.memory[0, seen][:, 2 * MEMORY.reads :]
    reached = np.flatnonzero(np.abs(grads).max(1))
    assert set(reached) <= set(rows.ravel().tolist())
    assert set(batch.memory[0, at, 2 * MEMORY.reads :].tolist()) <= set(reached.tolist())
    # packed documents are what they are alone
    b, first = 1, int(own[1, 4])
    alone = np.flatnonzero(own[b] == first)
    fields = [np.zeros_like(np.asarray(f)) for f in batch.fields]
    for mine, theirs in zip(fields, batch.fields, strict=True):
        mine[0, : len(alone)] = np.asarray(theirs)[b, alone]
    fields[2][0, : len(alone)] = 1
    single = remembered(shapes.Batch(*fields))
    np.testing.assert_allclose(
        hidden(table, single)[0, : len(alone)], hidden(table, batch)[b, alone], atol=2e-5
    )
    # one token at a time
    ids = np.asarray(batch.tokens)
    ones, place = np.ones_like(ids), np.broadcast_to(np.arange(12), ids.shape)
    whole = remembered(
        shapes.Batch(ids, ids, ones, place, ones.astype(np.float32), ones, 0 * ones)
    )
    model = definition.merge(params, prices)
    head, _ = model.head_weight()
    want = hidden(table, whole) @ head
    cache = decode.init_cache(model, 2, 12)
    one = jax.jit(lambda token, cache, t, rows: decode.decode(model, token, cache, t, rows))
    for t in range(12):
        logits, cache = one(ids[:, t], cache, t, whole.memory[:, t])
        np.testing.assert_allclose(logits, want[:, t], rtol=1e-4, atol=2e-4)


def test_a_model_without_a_memory_starts_the_same(monkeypatch):
    """So that arms of a comparison start alike; taps start at zero. Draws stand for their keys."""

    def draw(key, shape, dtype):
        return jnp.broadcast_to(jnp.sum(jax.random.key_data(key)).astype(dtype), shape)

    monkeypatch.setattr(jax.random, "normal", draw)
    start = dict(prefix=(), pattern=("dense",), repeats=1)
    one = dataclasses.replace(MEMORY, layers=(0,))
    with_, without = (
        jax.jit(lm.define(small(**start, memory=section)).init)(jax.random.key(0))[0]
        for section in (one, engram.Config())
    )
    assert set(with_) - set(without) == {"memory_0"}
    assert not with_["memory_0"]["taps"].any()
    for name, part in without.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, part, with_[name])), name


def test_tables_are_looked_up_where_they_lie(rng):
    """Values and gradients under a mesh are one device's, to the bit."""
    table = rng.normal(size=(256, 4)).astype(np.float32)
    rows = rng.integers(0, 256, (4, 8, 3)).astype(np.int32)
    seen = rng.normal(size=(4, 8, 3, 4)).astype(np.float32)

    def total(table):
        found = ops.lookup(table, rows, ("Row", "Dm"), jnp.float32)
        return jnp.sum(found * seen), found

    run = jax.value_and_grad(total, has_aux=True)
    (_, want), want_grad = jax.jit(run)(table)
    np.testing.assert_array_equal(want, table[rows])
    by_hand = np.zeros(table.shape)
    np.add.at(by_hand, rows, seen.astype(np.float64))
    np.testing.assert_allclose(want_grad, by_hand, rtol=1e-5, atol=1e-6)
    for name, text, devices in (
        ("fsdp_ep_cp", "fsdp=2,expert=2,context=2", 8), ("fsdp_tp", "fsdp=2,tensor=2", 4),
        ("ddp", "data=2", 2), ("zero1_ep", "data=2,expert=2", 4),
    ):  # fmt: skip
        plan = plans.find(name)
        placed = apply.Placed(plan, mesh.make(plan, text, jax.devices()[:devices]))
        spec = placed.parameter(("Row", "Dm"), table.shape)
        assert spec[1] is None
        assert (spec[0] is None) == (name == "ddp")
        held = jax.device_put(table, placed.named(spec))
        (_, got), grad = placed.jit(run)(held)
        np.testing.assert_array_equal(got, want, name)
        np.testing.assert_allclose(grad, by_hand, rtol=1e-5, atol=1e-6, err_msg=name)


def test_tables_have_primes_of_their_own_and_the_published_sizes():
    found = engram.tables(engram.Config(layers=(1, 15), heads=8, width=1280, rows=646_400))
    flat = [n for sizes in found for n in sizes]
    assert len(set(flat)) == len(flat) == 32
    assert flat == sorted(flat)  # every one the next after the one before it
    assert flat[0] == 646_403
    # 2601.07372, table 5; and the newest of them: 384,006,168 and 384,016,682 rows a layer
    big = engram.Config(layers=(1, 14), orders=(2, 3, 4), heads=8, width=6144, rows=16_000_000)
    assert [sum(sizes) for sizes in engram.tables(big)] == [384_006_168, 384_016_682]
    c = layered(memory=MEMORY)
    counts, without = flops.parameters(c), flops.parameters(layered())
    tables = sum(map(sum, engram.tables(MEMORY))) * MEMORY.row_width
    own = 3 * (16 * 32 * 2 + 3 * 32 + 4 * 32)
    assert counts.total - without.total == tables + own
    assert counts.active - without.active == own


def test_plans_count_what_a_memory_sends_and_keeps():
    """On four parts of a table three send what is not there: 2 passes of 16 numbers in bfloat16."""
    c, plain = layered(memory=MEMORY), layered()
    load = network.Load(tokens=100, micro=1, passes=2)
    sizes = {"data": 2, "fsdp": 2, "expert": 2}
    sent = {m.what: m for m in network.activations(c, sizes, load)}
    assert sent["rows of memories"].axis == "fsdp+expert"
    assert sent["rows of memories"].size == 2 * 2 * 16 * 3 * 100 * 3
    assert "rows of memories" not in {m.what for m in network.activations(plain, sizes, load)}
    assert network.activations(c, {"data": 8}, load) == []
    definition = lm.define(c)
    more = layout.shapes(c, definition).beside.whole
    more -= layout.shapes(plain, lm.define(plain)).beside.whole
    assert more == engram.kept(MEMORY, 32, 1) == 3 * (16 + 32 + 4 * 32)
    # tables are looked up where they lie, not gathered
    assert not network.gathers(c, ("Row", "Dm"))
    assert network.gathers(c, ("U", "D"))


def test_tables_learn_faster_do_not_decay_and_are_no_matrix_of_muons():
    dims = {"table": ("Row", "Dm"), "w": ("U", "D")}
    params = {k: np.ones((4, 4), np.float32) for k in dims}
    slope = np.full((4, 4), 0.5, np.float32)
    slope[1] = -0.25
    grads = dict.fromkeys(dims, slope)
    assert groups.group(dims["table"]) == "memory"
    for name in ("adamw", "muon"):
        table = optim.TABLE[name]
        c = table.Config(lr=0.01, weight_decay=0.5, clip=0.0)
        tx = table.build(c, dims, lambda n: jnp.float32(0.01))
        updates, _ = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p))(grads, params)
        # Adam's first step has the size of the rate, whatever the gradient's
        np.testing.assert_allclose(updates["table"], -0.05 * np.sign(grads["table"]), rtol=1e-5)
        assert not np.allclose(np.abs(updates["w"]), 0.05)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (dict(layers=(3, 1)), r"layers: must grow from 0 or more, got \(3, 1\)"),
        (dict(orders=(1, 2)), r"orders: must grow within 2 to 8, got \(1, 2\)"),
        (dict(width=30), "width: 30 does not divide over 8 heads x 2 orders, which are 16 tables"),
        (dict(rows=2**28), "rows: 268435456 in each of 16 tables are beyond a 32-bit number"),
    ],
)
def test_bad_settings_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        engram.Config(**values)


def test_where_a_memory_cannot_stand_is_named():
    with pytest.raises(ValueError, match=r"memory.layers: 2 lies within .* before one, at 0, 1, 3"):
        small(memory=engram.Config(layers=(2,), heads=2, width=16))
    with pytest.raises(ValueError, match=r"memory.layers: 5 is not below 5 layers"):
        small(memory=engram.Config(layers=(5,), heads=2, width=16))
    values = dict(
        name="x", steps=4, data=dict(source="synthetic:copy", seq=64, batch=2, tokenizer="bytes"),
        model=dict(width=32, vocab=64, blocks=dict(block={}), repeats=2,
                   memory=dict(layers=(0,), heads=2, width=16)),
        optim=dict(kind="adamw"), phases=dict(short=dict(start=0.5, seq=32)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"phases.short.seq: 32 cuts rows of 64 whose n-grams"):
        config.from_config_dict(values)
    plan = plans.find("fsdp_ep_pp")
    placed = apply.Placed(plan, mesh.make(plan, "pipe=2,expert=2", jax.devices()[:4]))
    with pytest.raises(ValueError, match="mesh: pipe=2 of plan fsdp_ep_pp: a pipeline carries no"):
        placed.check(lm.define(small(memory=MEMORY)), rows=4, length=8)
