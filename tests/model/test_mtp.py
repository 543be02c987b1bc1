"""Multi-token prediction against a float64 transcription; what it may see; what it moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim, phases, shapes
from sparse_pretrain.attention import full
from sparse_pretrain.model import block, ffn, lm, mtp
from sparse_pretrain.planning import flops
from sparse_pretrain.training import loss, rows, state, step
from tests.model.conftest import EXPERTS, packed, small

HEADS, WIDTH, VOCAB, DEPTH, WEIGHT = 2, 16, 61, 2, 0.7
PLAIN = block.Config(
    attention=full.Config(heads=HEADS, qk_norm=False), ffn=ffn.DenseConfig(hidden=24)
)


def _plain(**changes):
    values = dict(width=WIDTH, vocab=VOCAB, dtype="float32", blocks={"b": PLAIN}, pattern=("b",))
    ahead = mtp.Config(depth=DEPTH, weight=WEIGHT)
    return lm.Config(**(values | dict(repeats=1, mtp=ahead, scan=False) | changes))


# --- equations 21 to 25 of 2412.19437, in numpy and loops ---


def _norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _attention(p, x_LxD, segments, positions):
    q, k, v = (np.einsum("ld,dhe->lhe", x_LxD, p[w]) for w in ("w_q", "w_k", "w_v"))
    half = q.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** -(np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None]
    q, k = ((t[..., :half] + 1j * t[..., half:]) * turn for t in (q, k))
    out = np.zeros_like(x_LxD)
    for i in range(len(x_LxD)):
        seen = [j for j in range(i + 1) if segments[j] == segments[i]]
        for h in range(q.shape[1]):
            score = np.array([(q[i, h] * k[j, h].conj()).real.sum() for j in seen])
            weight = np.exp(score * (2 * half) ** -0.5)
            o = sum(w * v[j, h] for w, j in zip(weight / weight.sum(), seen, strict=True))
            out[i] += o @ p["w_o"][h]
    return out


def _layer(p, x, segments, positions):
    x = x + _attention(p["attention"], _norm(x, p["norm_attention"]["scale"]), segments, positions)
    m, y = p["ffn"]["mlp"], _norm(x, p["norm_ffn"]["scale"])
    gate = y @ m["w_gate"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ m["w_up"])) @ m["w_down"]


def _reference(params, batch):
    """The whole loss of a packed batch."""
    total, count = 0.0, batch.weights.sum()
    for tokens, targets, segments, positions, weights, *_ in zip(*batch.fields, strict=True):
        embedded = params["embedding"][tokens]
        stack = jax.tree.map(lambda a: a[0], params["stack_0"])
        h = _norm(_layer(stack, embedded, segments, positions), params["norm"]["scale"])

        def nats(h_D, target):
            z = h_D @ params["head"]
            return np.log(np.exp(z - z.max()).sum()) + z.max() - z[target]

        total += sum(w * nats(h[i], targets[i]) for i, w in enumerate(weights))
        for k in range(1, DEPTH + 1):
            p, T = params[f"mtp_{k - 1}"], len(tokens)
            e = np.zeros_like(h)
            e[: T - k] = embedded[k:]
            both = [_norm(h, p["norm_hidden"]["scale"]), _norm(e, p["norm_embedding"]["scale"])]
            h = _layer(p, np.concatenate(both, -1) @ p["w_join"], segments, positions)
            out = _norm(h, p["norm"]["scale"])
            for i in range(T - k):
                if segments[i] == segments[i + k] != 0:
                    share = WEIGHT / DEPTH * weights[i + k]
                    total += share * nats(out[i], targets[i + k])
    return total / count


@pytest.fixture(scope="module")
def made():
    """A plain model and a batch of several documents, some longer than the depths."""
    batch = packed(np.random.default_rng(3), rows=2, length=12)
    definition = lm.define(_plain())
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda s: 0.4 * rng.normal(size=s.shape), definition.shapes)
    return definition, params, batch


def test_values_and_gradients_are_the_papers(made):
    definition, params, batch = made

    def value(p):
        weight = jnp.sum(jnp.asarray(batch.weights))
        return loss.loss_sums(definition, p, {}, batch, weight, 1)

    p32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    (got, report), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(p32)
    assert got == pytest.approx(_reference(params, batch), rel=2e-6)
    counted = [
        sum(
            batch.segments[b, i] == batch.segments[b, i + k] != 0
            for b in range(2)
            for i in range(12 - k)
        )
        for k in (1, 2)
    ]
    np.testing.assert_array_equal(report["mtp"][1], counted)
    assert 0 < counted[1] < counted[0] < batch.weights.sum()

    rng, leaves = np.random.default_rng(5), jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), grad in zip(leaves, jax.tree.leaves(grads), strict=True):
        direction = rng.normal(size=leaf.shape)

        def moved(by, path=path, direction=direction):
            return jax.tree_util.tree_map_with_path(
                lambda at, a: a + by * direction if at == path else a, params
            )

        slope = (_reference(moved(1e-5), batch) - _reference(moved(-1e-5), batch)) / 2e-5
        along = float(np.sum(np.asarray(grad, np.float64) * direction))
        assert along == pytest.approx(slope, rel=2e-4, abs=2e-5), path


def test_a_depth_sees_as_far_ahead_as_it_predicts_from_and_no_further(made):
    """Every token has an embedding of its own here, so its gradient says who reads it."""
    definition, params, batch = made
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    batch = batch._replace(tokens=tokens)

    @jax.jit
    def read(table, k, at):
        def one(table):
            given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
            model = definition.merge(given | {"embedding": table}, {})
            _, aux = model(batch, train=True)
            return jnp.sum(jnp.stack(aux.ahead)[k, 0, at] ** 2)

        return jnp.abs(jax.grad(one)(table)).sum(-1)

    table = jnp.asarray(params["embedding"], jnp.float32)
    segments = batch.segments[0]
    for k in range(DEPTH):
        for at in range(12 - k - 1):
            if segments[at + k + 1] != segments[at]:
                continue
            reads = np.asarray(read(table, k, at))[:12] > 0
            want = (segments == segments[at]) & (np.arange(12) <= at + k + 1)
            np.testing.assert_array_equal(reads, want)


def test_scoring_leaves_it_out(made):
    definition, params, batch = made
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    alone = lm.define(_plain(mtp=mtp.Config()))
    main = {k: v for k, v in params.items() if not k.startswith("mtp_")}
    run = jax.jit(lambda made, params: made.merge(params, {})(batch), static_argnums=0)
    hidden, aux = run(definition, params)
    np.testing.assert_array_equal(hidden, run(alone, main)[0])
    assert aux.ahead == ()


def test_its_experts_are_balanced_and_its_loss_is_reported(rng):
    """Prices of its router move by the load of tokens with a token ahead, once a step."""
    experts = block.Config(attention=full.Config(heads=2), ffn=EXPERTS)
    blocks = {"b": PLAIN, "moe": experts}
    config = _plain(blocks=blocks, remat="full", mtp=mtp.Config(depth=1, block="moe"))
    definition = lm.define(config)
    batch = packed(rng)
    table = optim.TABLE["adamw"]

    def schedule(n):
        return jnp.float32(1e-3)

    tx = table.build(table.Config(lr=1e-3), definition.dims, schedule)
    fresh = state.create(definition, tx, 0, ema=False)
    made = step.make_train_step(definition, config, tx, schedule=schedule, accumulate=2)
    after, out = made(fresh, batch)
    load = np.asarray(out["load"]["mtp_0"], np.float64)
    ahead = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] != 0)
    assert load.sum() == 2 * ahead.sum() < 2 * (batch.segments != 0).sum()
    sign = np.sign(load.mean() - load)
    bias = after.router["mtp_0"]["ffn"]["router"]["bias"]
    np.testing.assert_allclose(bias, 0.01 * (sign - sign.mean()), atol=1e-7)
    row = rows.of_step(jax.device_get(out), tokens=1, seconds=1.0, cpu=1.0)
    assert len(row["mtp_loss"]) == 1
    assert abs(row["mtp_loss"][0] - np.log(61)) < 0.5
    assert len(rows.of_experts(jax.device_get(out))["load"]) == 1


def test_it_counts_in_all_parameters_and_in_no_active_ones():
    alone, with_it = small(), small(mtp=mtp.Config(depth=2, block="dense"))
    before, after = flops.parameters(alone), flops.parameters(with_it)
    added = lm.define(with_it).shapes["mtp_1"]
    each = sum(x.size for x in jax.tree.leaves(added))
    assert after == before._replace(total=before.total + 2 * each, mtp=2 * each)
    assert each == 3 * 32 + 2 * 32 * 32 + sum(
        x.size for x in jax.tree.leaves(lm.define(alone).shapes["prefix_0"])
    )
    assert flops.kv_bytes_per_token(alone) == flops.kv_bytes_per_token(with_it)
    assert lm.main_names(with_it) == lm.layer_names(alone)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_its_flops_are_the_compilers(remat):
    layer = block.Config(
        attention=full.Config(heads=4, head_dim=64), ffn=ffn.DenseConfig(hidden=1024)
    )
    config = _plain(width=512, vocab=512, blocks={"b": layer}, repeats=1, remat=remat)
    L = 128
    ones = np.ones((2, L), np.int32)
    at = np.tile(np.arange(L, dtype=np.int32), (2, 1))
    batch = shapes.Batch(ones, ones, ones, at, ones.astype(np.float32), ones, ones)
    definition = lm.define(config)

    def value(params):
        return loss.loss_sums(definition, params, {}, batch, jnp.float32(1), 1)[0]

    counted = jax.jit(jax.grad(value)).lower(definition.shapes).cost_analysis()["flops"]
    ours = flops.train_flops_per_token(config, L)
    assert ours.executed == pytest.approx(counted / (2 * L), rel=0.02)


def test_a_phase_changes_its_weight():
    model = small(mtp=mtp.Config(depth=1))
    later = {"late": phases.Phase(start=0.5, mtp_weight=0.1)}
    phases.check(later, model, 24)
    found = phases.stages(later, model, 24, steps=4, tokens_per_step=24)
    assert [(s.first, s.model.mtp.weight) for s in found] == [(0, 0.3), (2, 0.1)]
    assert found[0].model == model
    with pytest.raises(ValueError, match=r"^phases.late.mtp_weight: 0.1, but model.mtp.depth is 0"):
        phases.check(later, small(), 24)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"^depth: must be 0 to 16, got -1"):
        mtp.Config(depth=-1)
    with pytest.raises(ValueError, match=r"^weight: must be positive, got 0"):
        mtp.Config(weight=0.0)
    with pytest.raises(ValueError, match=r"^mtp.block: block 'x' is not in blocks"):
        dataclasses.replace(small(), mtp=mtp.Config(block="x"))
