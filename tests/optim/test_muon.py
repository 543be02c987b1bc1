"""Muon: orthogonality against the SVD, independence of copies, and optax as an oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from sparse_pretrain import optim
from sparse_pretrain.optim import groups, muon, newton_schulz

SIZES = {"N": 2, "E": 3, "D": 24, "F": 16, "H": 4, "Dh": 8, "Dv": 12, "Dc": 10, "V": 32}

# dims -> (copies, reduction, output) as sets of positions, written out by hand
FLAT = {
    ("D", "F"): ((), (0,), (1,)),
    ("N", "D", "F"): ((0,), (1,), (2,)),
    ("E", "D", "F"): ((0,), (1,), (2,)),
    ("N", "E", "D", "F"): ((0, 1), (2,), (3,)),
    ("D", "H", "Dh"): ((), (0,), (1, 2)),
    ("N", "Dc", "H", "Dh"): ((0,), (1,), (2, 3)),
    ("H", "Dv", "D"): ((), (0, 1), (2,)),
    ("N", "H", "Dv", "D"): ((0,), (1, 2), (3,)),
}
PER_HEAD = {
    ("D", "H", "Dh"): ((1,), (0,), (2,)),
    ("N", "Dc", "H", "Dh"): ((0, 2), (1,), (3,)),
    ("H", "Dv", "D"): ((0,), (1,), (2,)),
    ("N", "H", "Dv", "D"): ((0, 1), (2,), (3,)),
}
CASES = [(d, v, False) for d, v in FLAT.items()] + [(d, v, True) for d, v in PER_HEAD.items()]
NAMES = ["x".join(d) + ("-per-head" if p else "") for d, _, p in CASES]
every_case = pytest.mark.parametrize(
    ("name", "positions"), [(n, v) for n, (_, v, _) in zip(NAMES, CASES, strict=True)], ids=NAMES
)


def array(rng, dims):
    return jnp.asarray(rng.normal(size=tuple(SIZES[d] for d in dims)), jnp.float32)


def as_list(x, positions):
    """Every matrix of x as numpy [reduction, output], by explicit loops."""
    copies, rows, cols = positions
    x = np.transpose(np.asarray(x, np.float64), copies + rows + cols)
    size = lambda dims: int(np.prod([x.shape[i] for i in dims]))  # noqa: E731
    a, b = len(copies), len(copies) + len(rows)
    shape = (size(range(a)), size(range(a, b)), size(range(b, x.ndim)))
    return list(x.reshape(shape))


def direction(config, dims, grads):
    rule = muon.scale_by_muon(config, {"w": dims})
    state = rule.init({"w": grads[0]})
    for g in grads:
        updates, state = jax.jit(rule.update)({"w": g}, state)
    return updates["w"]


@functools.cache
def gradients():
    rng = np.random.default_rng(0)
    return {n: array(rng, d) for n, (d, _, _) in zip(NAMES, CASES, strict=True)}


@functools.cache
def first_updates(**fields):
    """Muon's first direction for every case, compiled together."""
    out = {}
    for per_head in (False, True):
        dims = {n: d for n, (d, _, p) in zip(NAMES, CASES, strict=True) if p == per_head}
        rule = muon.scale_by_muon(optim.Muon.Config(per_head=per_head, **fields), dims)
        grads = {n: gradients()[n] for n in dims}
        updates, _ = jax.jit(rule.update)(grads, rule.init(grads))
        out |= updates
    return out


@every_case
@pytest.mark.parametrize("dtype", muon.DTYPES)
def test_updates_are_orthogonal_and_keep_the_singular_vectors(name, positions, dtype):
    update = first_updates(ns_dtype=dtype, rms=0.0)[name]
    matrices, updates = as_list(gradients()[name], positions), as_list(update, positions)
    for matrix, u in zip(matrices, updates, strict=True):
        fan_in, fan_out = matrix.shape
        u = u / np.sqrt(max(1.0, fan_out / fan_in))
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        values = np.linalg.svd(u, compute_uv=False)
        assert values.min() > 0.6, values
        assert values.max() < 1.25, values
        # In the gradient's own singular basis the update is diagonal, and positive there.
        inside = left.T @ u @ right.T
        off = inside - np.diag(np.diag(inside))
        assert np.abs(off).max() < (2e-5 if dtype == "float32" else 0.08)
        assert np.diag(inside).min() > 0.55


@every_case
def test_copies_are_independent(name, positions):
    """The stacked update equals a loop over its matrices in float64 numpy."""
    together = as_list(first_updates(ns_dtype="float32", rms=0.0)[name], positions)
    for matrix, u in zip(as_list(gradients()[name], positions), together, strict=True):
        fan_in, fan_out = matrix.shape
        alone = quintic(matrix) * np.sqrt(max(1.0, fan_out / fan_in))
        np.testing.assert_allclose(u, alone, rtol=1e-4, atol=1e-5)


def quintic(x):
    """Five Newton-Schulz steps on one matrix in float64."""
    a, b, c = newton_schulz.QUINTIC
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@every_case
def test_consistent_root_mean_square(name, positions):
    update = first_updates(ns_steps=12, ns_polish=6, ns_dtype="float32", rms=0.18)[name]
    # An orthogonal n x m matrix has root mean square 1 / sqrt(max(n, m)).
    for u in as_list(update, positions):
        assert np.sqrt(np.mean(u**2)) == pytest.approx(0.18, rel=0.02)


@pytest.mark.parametrize("per_head", [False, True])
def test_against_optax(rng, per_head):
    """Without Nesterov the missing bias correction is a factor, which orthogonalising removes."""
    cases = {n: (d, v) for n, (d, v, p) in zip(NAMES, CASES, strict=True) if p == per_head}
    dims = {n: d for n, (d, _) in cases.items()}
    numbers = {n: MuonDimensionNumbers(v[1], v[2]) for n, (_, v) in cases.items()}
    config = optim.Muon.Config(
        per_head=per_head, nesterov=False, ns_dtype="float32", ns_steps=2, clip=0.0
    )
    make = lambda: {n: array(rng, d) for n, d in dims.items()}  # noqa: E731
    params, grads = make(), [make() for _ in range(3)]
    schedule = lambda step: 0.1 / (step + 1.0)  # noqa: E731
    ours = optim.Muon.build(config, dims, schedule)
    theirs = optax.contrib.muon(
        schedule,
        nesterov=False,
        ns_steps=2,  # optax unrolls them, which is what compiling takes its time for
        weight_decay=config.weight_decay,
        consistent_rms=config.rms,
        muon_weight_dimension_numbers=numbers,
    )

    @jax.jit
    def step(got, want, a, b, g):
        u, a = ours.update(g, a, got)
        v, b = theirs.update(g, b, want)
        return optax.apply_updates(got, u), optax.apply_updates(want, v), a, b

    with jax.numpy_dtype_promotion("standard"):
        got, want, a, b = params, params, ours.init(params), theirs.init(params)
        for g in grads:
            got, want, a, b = step(got, want, a, b, g)
    for n in dims:
        np.testing.assert_allclose(got[n], want[n], rtol=1e-4, atol=1e-5, err_msg=n)


def test_nesterov_looks_ahead(rng):
    config = optim.Muon.Config(momentum=0.9, ns_dtype="float32")
    g1, g2 = array(rng, ("D", "F")), array(rng, ("D", "F"))
    m = 0.9 * g1 + g2
    plain = optim.Muon.Config(momentum=0.0, ns_dtype="float32")
    want = direction(plain, ("D", "F"), [0.9 * m + g2])
    np.testing.assert_allclose(direction(config, ("D", "F"), [g1, g2]), want, rtol=1e-4, atol=1e-6)


def test_groups():
    want = {
        ("V", "D"): "embed",
        ("D", "V"): "head",
        ("D", "E"): "router",
        ("N", "D", "E"): "router",
        ("D",): "vector",
        ("N", "D"): "vector",
        ("N", "E", "F"): "vector",
        ("D", "D"): "matrix",
        ("N", "E", "F", "D"): "matrix",
        ("D", "H", "Dh"): "matrix",
        ("A", "B", "C"): "unknown",
        ("D", "Dh", "H"): "unknown",
        ("H", "J", "D"): "unknown",
        ("N", "E", "A", "B", "C"): "unknown",
    }
    assert {d: groups.group(d) for d in want} == want


@pytest.mark.parametrize("dims", [("A", "B", "C"), ("D", "Dh", "H"), ("N", "A", "B", "C", "D")])
def test_unnamed_parameters_are_refused(dims):
    tree = {"layers": {"ok": ("D", "F"), "odd": dims}}
    with pytest.raises(ValueError, match=r"^layers\.odd: dims .*no Muon dimension numbers"):
        optim.Muon.build(optim.Muon.Config(), tree, lambda step: 0.1)
    optim.AdamW.build(optim.AdamW.Config(), tree, lambda step: 0.1)  # which has no such need


def test_everything_else_follows_adamw(rng):
    """Embedding, head, norms and routers move exactly as AdamW moves them, at adam_lr."""
    dims = {
        "embed": ("V", "D"),
        "head": ("D", "V"),
        "router": ("N", "D", "E"),
        "scale": ("N", "D"),
        "w": ("N", "D", "F"),
    }
    make = lambda: {k: array(rng, d) for k, d in dims.items()}  # noqa: E731
    params, grads = make(), [make() for _ in range(3)]
    schedule = lambda step: 0.1 / (step + 1.0)  # noqa: E731

    def run(kind, config, scale):
        rule = kind.build(config, dims, lambda step: scale * schedule(step))
        update = jax.jit(rule.update)
        p, state = params, rule.init(params)
        for g in grads:
            u, state = update(g, state, p)
            p = optax.apply_updates(p, u)
        return p

    common = {"lr": 0.1, "embed_lr": 3.0, "clip": 0.5}
    got = run(optim.Muon, optim.Muon.Config(adam_lr=0.02, **common), 1.0)
    want = run(optim.AdamW, optim.AdamW.Config(**common), 0.2)
    for name in ("embed", "head", "router", "scale"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert float(jnp.max(jnp.abs(got["w"] - want["w"]))) > 1e-3


def test_router_on_request(rng):
    dims = {"router": ("N", "D", "E")}
    params = {"router": array(rng, dims["router"])}
    config = optim.Muon.Config(router="muon", rms=0.0, weight_decay=0.0)
    rule = optim.Muon.build(config, dims, lambda step: 1.0)
    updates, _ = rule.update(params, rule.init(params), params)
    for u in np.asarray(updates["router"]):
        values = np.linalg.svd(u, compute_uv=False)
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_dead_experts_stay_finite(rng):
    g = array(rng, ("E", "D", "F")).at[1].set(0.0)
    update = direction(optim.Muon.Config(), ("E", "D", "F"), [g])
    assert bool(jnp.all(jnp.isfinite(update)))
    np.testing.assert_array_equal(update[1], 0.0)


def test_polishing_reaches_one(rng):
    """DeepSeek-V4's eight quintic steps and two polishing ones."""
    x = jnp.asarray(rng.normal(size=(3, 20, 32)), jnp.float32)
    coefficients = (newton_schulz.QUINTIC,) * 8 + (newton_schulz.POLISH,) * 2
    out = newton_schulz.orthogonalize(x, coefficients, dtype=jnp.float32)
    left, _, right = np.linalg.svd(np.asarray(x), full_matrices=False)
    polar = left @ right
    values = np.linalg.svd(np.asarray(out), compute_uv=False)
    assert np.abs(values - 1).max() < 0.05
    assert np.abs(np.asarray(out) - polar).max() < 0.03


@pytest.mark.parametrize("shape", [(4, 48, 16), (4, 16, 48)])
def test_matmul_transpose_is_exact(rng, shape):
    x = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    got = jax.jit(newton_schulz._transpose_by_matmul)(x)
    np.testing.assert_array_equal(got, jnp.swapaxes(x, 1, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("momentum", 1.0),
        ("rms", -0.2),
        ("ns_steps", 0),
        ("ns_dtype", "float16"),
        ("router", "sgd"),
        ("adam_lr", 0.0),
    ],
)
def test_refuses_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        optim.Muon.Config(**{field: value})
