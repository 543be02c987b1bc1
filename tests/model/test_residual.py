"""mHC against a float64 transcription of its equations; its mixing neither grows nor shrinks."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device
from kernels_pallas.chips import CHIPS
from kernels_pallas.op import prefer
from kernels_pallas.sinkhorn import sinkhorn
from sparse_pretrain import nn, shapes
from sparse_pretrain.attention import full
from sparse_pretrain.model import block, decode, ffn, lm, mtp, residual
from sparse_pretrain.optim import adamw
from sparse_pretrain.planning import flops, memory
from sparse_pretrain.sharding import ops
from sparse_pretrain.training import loss
from tests.kernels.test_mosaic_gpu import recent
from tests.model.conftest import packed

MHC = residual.MHCConfig(streams=3, iterations=4, scale=0.7)
LITE = dataclasses.replace(MHC, mixing="permutations")
WIDTH = 8


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _balanced(raw, c):
    b = np.exp(raw) / np.exp(raw).sum(-1, keepdims=True) + c.eps
    b = b / (b.sum(-2, keepdims=True) + c.eps)
    for _ in range(c.iterations - 1):
        b = b / (b.sum(-1, keepdims=True) + c.eps)
        b = b / (b.sum(-2, keepdims=True) + c.eps)
    return b


def _permuted(raw, R):
    b = np.zeros((R, R))
    for weight, to in zip(np.exp(raw) / np.exp(raw).sum(), itertools.permutations(range(R)),
                          strict=True):
        for m in range(R):
            b[m, to[m]] += weight
    return b


def _reference(p, x_LxRxD, layer, c):
    """One site and the layer in it, for one row, token by token."""
    out = np.zeros_like(x_LxRxD)
    R = c.streams
    for t, x in enumerate(x_LxRxD):
        flat = x.reshape(-1)
        mix = (flat / np.sqrt(np.mean(flat**2) + 1e-6)) @ p["w"]
        a = _sigmoid(mix[:R] * p["scale"][0] + p["base"][:R]) + c.eps
        post = c.post * _sigmoid(mix[R : 2 * R] * p["scale"][1] + p["base"][R : 2 * R])
        raw = mix[2 * R :] * p["scale"][2] + p["base"][2 * R :]
        b = _permuted(raw, R) if c.mixing == "permutations" else _balanced(raw.reshape(R, R), c)
        y = layer(sum(a[m] * x[m] for m in range(R)))
        for n in range(R):
            out[t, n] = sum(b[m, n] * x[m] for m in range(R)) + post[n] * y
    return out


@pytest.mark.parametrize("config", [MHC, LITE], ids=lambda c: c.mixing)
def test_a_site_is_its_equations_in_values_and_gradients(config, rng):
    site = nn.define(lambda keys: residual.Site(config, WIDTH, keys, eps=1e-6))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape), site.shapes)
    x, w = rng.normal(size=(1, 5, 3, WIDTH)), rng.normal(size=(WIDTH, WIDTH))
    weight = rng.normal(size=x.shape)

    def ours(params, x):
        made = site.merge(params, {})
        inner, held = made.open(x)
        return jnp.sum(made.close(held, jnp.tanh(inner @ w.astype(np.float32))) * weight)

    def theirs(params, x):
        return np.sum(_reference(params, x[0], lambda h: np.tanh(h @ w), config) * weight[0])

    weight32, weight = weight, jnp.asarray(weight, jnp.float32)
    p32, x32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(p32, x32)
    weight = weight32
    assert value == pytest.approx(theirs(params, x), rel=1e-5)
    for name in ("w", "base", "scale", "x"):
        held = x if name == "x" else params[name]
        direction = rng.normal(size=held.shape)

        def at(by, name=name, held=held, direction=direction):
            moved = held + by * direction
            return theirs(params, moved) if name == "x" else theirs({**params, name: moved}, x)

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        got = np.sum(
            np.asarray(grads[1] if name == "x" else grads[0][name], np.float64) * direction
        )
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-4), name


def test_sixty_mixing_matrices_in_a_row_keep_their_gain():
    """Claim A14: largest row or column sum at most 1.05, above 5 for the logits themselves."""
    logits = np.random.default_rng(0).normal(size=(60, 4, 4))
    made = sinkhorn(jnp.asarray(logits, jnp.float32), iterations=20, eps=1e-6)
    mixing = np.asarray(made, np.float64)

    def gain(matrices):
        product = np.linalg.multi_dot(list(matrices))
        return max(np.abs(product).sum(0).max(), np.abs(product).sum(1).max())

    assert 0.9 < gain(mixing) <= 1.05
    assert gain(logits) > 5
    once = sinkhorn(jnp.asarray(logits, jnp.float32), iterations=1, eps=1e-6)
    assert abs(np.asarray(once).sum(-1) - 1).max() > 0.05 > abs(mixing.sum(-1) - 1).max()


def test_means_of_permutations_reach_every_corner_and_sum_to_one_however_large(rng):
    logits = rng.normal(size=(1, 40, 24)) * 30
    made = np.asarray(residual._mean_permutation(jnp.asarray(logits, jnp.float32), 4), np.float64)
    np.testing.assert_allclose(made.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(made.sum(-2), 1, atol=1e-6)
    corners = residual._mean_permutation(jnp.asarray(np.eye(24)[None] * 200, jnp.float32), 4)
    assert len({c.tobytes() for c in np.asarray(corners[0]).round(6)}) == 24


@recent
@pytest.mark.parametrize(("preferred", "kernels"), [((), 0), (("mosaic_gpu",), 1)])
def test_the_matrices_are_made_in_one_kernel_where_that_is_preferred(preferred, kernels):
    x = jax.ShapeDtypeStruct((2, 3, 3, 3), jnp.float32)
    with device.assume(CHIPS["h200"].target), prefer(*preferred):
        text = str(jax.make_jaxpr(lambda x: ops.sinkhorn(x, iterations=4, eps=1e-6))(x))
    assert len(re.findall(r"\b(?:mpmd_map|core_map)\[", text)) == kernels


def _model(**changes):
    plain = block.Config(attention=full.Config(heads=2, head_dim=8), ffn=ffn.DenseConfig(hidden=24))
    values = dict(width=16, vocab=61, dtype="float32", blocks={"b": plain}, pattern=("b",))
    return lm.Config(**(values | dict(repeats=2, scan=False) | changes))


def test_streams_that_are_mixed_evenly_are_one_stream(rng):
    """With the input-dependent parts and biases at zero; decoding is the parallel pass."""
    sizes = {"repeats": 1, "mtp": mtp.Config(depth=1)}
    config = _model(residual=residual.MHCConfig(iterations=3), **sizes)
    definition, plain = lm.define(config), lm.define(_model(**sizes))
    params = jax.jit(definition.init)(jax.random.key(0))[0]

    def still(path, leaf):
        inside = any(str(k.key).startswith(("site_", "end")) for k in path)
        return leaf * 0 if inside else leaf

    even = jax.tree_util.tree_map_with_path(still, params)

    def without(tree):
        keep = {k: v for k, v in tree.items() if not k.startswith(("site_", "end"))}
        return {k: without(v) if isinstance(v, dict) else v for k, v in keep.items()}

    batch = packed(rng, rows=2, length=8)
    run = jax.jit(lambda d, p: d.merge(p, {})(batch, train=True), static_argnums=0)
    got, want = run(definition, even), run(plain, without(params))
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    np.testing.assert_allclose(got[1].ahead[0], want[1].ahead[0], atol=1e-4)
    assert np.abs(run(definition, params)[0] - want[0]).max() > 1e-4

    ids = rng.integers(0, 61, (2, 5)).astype(np.int32)
    ones = np.ones_like(ids)
    at = np.tile(np.arange(5, dtype=np.int32), (2, 1))
    alone = shapes.Batch(ids, ids, ones, at, ones.astype(np.float32), ones, ones * 0)
    model = definition.merge(params, {})
    hidden = jax.jit(lambda: model(alone)[0])()
    logits = np.einsum("bld,dv->blv", hidden, params["head"])
    cache = decode.init_cache(model, 2, 5)
    one = jax.jit(lambda token, cache, t: decode.decode(model, token, cache, t))
    for t in range(5):
        out, cache = one(jnp.asarray(ids[:, t]), cache, t)
        np.testing.assert_allclose(out, logits[:, t], atol=2e-5)


@pytest.mark.parametrize(("remat", "mixing"), [
    ("none", "sinkhorn"), ("full", "sinkhorn"), ("none", "permutations")])
def test_its_flops_are_the_compilers_and_its_memory_grows(remat, mixing):
    layer = block.Config(
        attention=full.Config(heads=4, head_dim=128), ffn=ffn.DenseConfig(hidden=1536)
    )
    config = _model(width=512, vocab=64, blocks={"b": layer}, remat=remat,
                    residual=residual.MHCConfig(mixing=mixing))
    L = 128
    ones = np.ones((2, L), np.int32)
    at = np.tile(np.arange(L, dtype=np.int32), (2, 1))
    batch = shapes.Batch(ones, ones, ones, at, ones.astype(np.float32), ones, ones)

    def counted(config):
        definition = lm.define(config)

        def value(params):
            return loss.loss_sums(definition, params, {}, batch, jnp.float32(1), 1)[0]

        lowered = jax.jit(jax.grad(value)).lower(definition.shapes)
        return lowered.cost_analysis()["flops"] / (2 * L)

    ours = flops.train_flops_per_token(config, L).executed
    assert ours == pytest.approx(counted(config), rel=0.02)
    plain = dataclasses.replace(config, residual=residual.PlainConfig())
    held = [
        memory.training_bytes(c, 64, optimizer=adamw.Config(), ema=False)["activations"]
        for c in (plain, config)
    ]
    assert held[0] < held[1]


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"^streams: must be 2 to 16, got 1"):
        residual.MHCConfig(streams=1)
    with pytest.raises(ValueError, match=r"^iterations: must be 1 to 100, got 0"):
        residual.MHCConfig(iterations=0)
    with pytest.raises(ValueError, match=r"^mixing: 'all' is not one of sinkhorn, permutations"):
        residual.MHCConfig(mixing="all")
    with pytest.raises(ValueError, match=r"^streams: must be 2 to 5 .* got 6: there are 720 "):
        residual.MHCConfig(mixing="permutations", streams=6)
