"""AdamW against ten lines of numpy; masks, group rates and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_pretrain import optim

DIMS = {
    "embed": ("V", "D"),
    "head": ("D", "V"),
    "layers": {
        "w": ("N", "D", "F"),
        "experts": ("N", "E", "D", "F"),
        "router": ("N", "D", "E"),
        "scale": ("N", "D"),
        "bias": ("F",),
    },
}
SIZES = {"V": 7, "D": 4, "F": 3, "N": 2, "E": 5}


def tree(rng, dims=DIMS):
    if isinstance(dims, tuple):
        shape = tuple(SIZES[d] for d in dims)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {k: tree(rng, v) for k, v in dims.items()}


def run(config, grads, params, schedule=lambda step: 0.1 / (step + 1.0)):
    rule = optim.AdamW.build(config, DIMS, schedule)
    state = rule.init(params)
    step = jax.jit(rule.update)
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def reference(config, grads, params, decay, factor, schedule):
    p, m, v = np.float64(params), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        g = np.float64(g)
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        m_hat, v_hat = m / (1 - config.b1**t), v / (1 - config.b2**t)
        rate = schedule(t - 1) * factor
        p = p - rate * (m_hat / (np.sqrt(v_hat) + config.eps) + decay * p)
    return p


@pytest.mark.parametrize("decay_embed", [False, True])
def test_against_numpy(rng, decay_embed):
    config = optim.AdamW.Config(
        lr=0.1, clip=0.0, embed_lr=0.5, head_lr=0.25, router_lr=2.0, decay_embed=decay_embed
    )
    params, grads = tree(rng), [tree(rng) for _ in range(6)]
    got = run(config, grads, params)
    schedule = lambda n: 0.1 / (n + 1.0)  # noqa: E731
    rules = {  # written out by hand: (decays, rate factor)
        "embed": (decay_embed, 0.5),
        "head": (True, 0.25),
        "w": (True, 1.0),
        "experts": (True, 1.0),
        "router": (True, 2.0),
        "scale": (False, 1.0),
        "bias": (False, 1.0),
    }
    for name, (decays, factor) in rules.items():
        pick = lambda t, n=name: t[n] if n in t else t["layers"][n]  # noqa: E731
        want = reference(
            config,
            [pick(g) for g in grads],
            pick(params),
            config.weight_decay * decays,
            factor,
            schedule,
        )
        np.testing.assert_allclose(pick(got), want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_zero_gradients_only_decay(rng):
    config = optim.AdamW.Config(lr=0.1, weight_decay=0.5)
    params = tree(rng)
    zeros = jax.tree.map(jnp.zeros_like, params)
    got = run(config, [zeros], params, schedule=lambda step: jnp.float32(0.1))
    np.testing.assert_allclose(got["layers"]["w"], params["layers"]["w"] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(got["layers"]["scale"], params["layers"]["scale"])
    np.testing.assert_array_equal(got["layers"]["bias"], params["layers"]["bias"])
    np.testing.assert_array_equal(got["embed"], params["embed"])


@pytest.mark.parametrize("largest", [0.1, 1e6])
def test_clipping(rng, largest):
    from sparse_pretrain.optim.adamw import clip_by_global_norm

    grads = tree(rng)
    clip = clip_by_global_norm(largest)
    got, _ = clip.update(grads, clip.init(grads))
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    for g, out in zip(jax.tree.leaves(grads), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(out, g * min(1.0, largest / norm), rtol=1e-5)
    want, _ = optax.clip_by_global_norm(largest).update(grads, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_clipping_leaves_zero_gradients_alone(rng):
    params = tree(rng)
    zeros = jax.tree.map(jnp.zeros_like, params)
    got = run(optim.AdamW.Config(lr=0.1, weight_decay=0.0), [zeros], params)
    jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("b2", 1.0), ("weight_decay", -0.1), ("clip", -1.0), ("eps", 0.0)],
)
def test_refuses_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        optim.AdamW.Config(**{field: value})


def test_every_optimizer_has_a_plain_state_that_jit_can_make(rng):
    params = tree(rng)
    for name, kind in optim.TABLE.items():
        rule = kind.build(kind.Config(), DIMS, lambda step: jnp.float32(0.1))
        eager, jitted = rule.init(params), jax.jit(rule.init)(params)
        assert jax.tree.structure(eager) == jax.tree.structure(jitted), name
        for leaf in jax.tree.leaves(eager):
            assert isinstance(leaf, jax.Array), (name, leaf)
        abstract = jax.eval_shape(rule.init, params)
        updates, state = jax.eval_shape(rule.update, params, abstract, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        ), name
        for leaf in jax.tree.leaves(updates):
            assert leaf.dtype == jnp.float32
