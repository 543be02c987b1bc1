"""DSA against Hugging Face's DeepSeek-V3.2 attention layer, where it can be had.

Its indexer has no gradient there (it runs under no_grad), so values, and gradients of all else, are
compared; the indexer's own are held to finite differences in tests/attention. Of tokens with one
score torch chooses any and we the earliest, so inputs are drawn until no choice is so close. It
neither turns queries and keys by a Hadamard matrix nor rounds them to 8 bits, as we.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import attention, nn, spec
from sparse_pretrain.attention import base

torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
theirs = pytest.importorskip(
    "transformers.models.deepseek_v32.modeling_deepseek_v32",
    reason="this transformers has no V3.2",
)
pytestmark = pytest.mark.filterwarnings("default")  # their warnings are not ours to fix

WIDTH, LENGTH = 24, 31
SHARED = {
    "heads": 3, "q_rank": 10, "kv_rank": 14, "nope_dim": 6, "rope_dim": 8, "v_dim": 5,
    "index_heads": 8, "index_dim": 12, "index_rope_dim": 8,
}
YARN = {
    "factor": 16.0, "original": 8, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "interleaved": True,
}
CASES = {
    "sparse": SHARED | {"top": 5},
    "yarn": SHARED | {"top": 7, "rope": YARN},
    "all": SHARED | {"top": 40},
}
every = pytest.mark.parametrize("case", CASES)


def peer(case):
    """Their layer with random parameters, and a function of x that runs it."""
    from transformers import DeepseekV32Config

    c = CASES[case]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if "rope" in c:
        rope |= {
            "rope_type": "yarn", "factor": YARN["factor"], "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": YARN["original"],
            "beta_fast": YARN["beta_fast"], "beta_slow": YARN["beta_slow"],
        }
    config = DeepseekV32Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=c["heads"],
        num_key_value_heads=c["heads"], q_lora_rank=c["q_rank"], kv_lora_rank=c["kv_rank"],
        qk_nope_head_dim=c["nope_dim"], qk_rope_head_dim=c["rope_dim"], v_head_dim=c["v_dim"],
        head_dim=c["rope_dim"], index_n_heads=c["index_heads"], index_head_dim=c["index_dim"],
        index_topk=c["top"], rope_parameters=rope, max_position_embeddings=128,
        attn_implementation="eager",
    )
    layer = theirs.DeepseekV32Attention(config, 0).float()
    rotary = theirs.DeepseekV32RotaryEmbedding(config)
    rng = np.random.default_rng(3)
    for name, tensor in sorted(layer.named_parameters()):
        noise = rng.standard_normal(tensor.shape)
        value = 1 + 0.3 * noise if "norm" in name else noise * tensor.shape[-1] ** -0.5
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value))
    later = np.arange(LENGTH)[:, None] < np.arange(LENGTH)
    mask = torch.from_numpy(np.where(later, -np.inf, 0.0))[None, None].float()

    def run(x):
        place = torch.arange(LENGTH)[None].expand(len(x), -1)
        return layer(x, rotary(x, place), mask.expand(len(x), -1, -1, -1))[0]

    return layer, run


def converted(arrays, c):
    """Their parameters (or gradients) as a nested dict of ours."""

    def heads(w, count):
        return w.reshape(count, -1, w.shape[1]).transpose(2, 0, 1)

    up = heads(arrays["kv_b_proj.weight"], c["heads"])
    return {
        "w_dq": arrays["q_a_proj.weight"].T,
        "q_norm": {"scale": arrays["q_a_layernorm.weight"]},
        "w_uq": heads(arrays["q_b_proj.weight"], c["heads"]),
        "w_dkv": arrays["kv_a_proj_with_mqa.weight"].T,
        "kv_norm": {"scale": arrays["kv_a_layernorm.weight"]},
        "w_uk": up[:, :, : c["nope_dim"]],
        "w_uv": up[:, :, c["nope_dim"] :],
        "w_o": arrays["o_proj.weight"].T.reshape(c["heads"], c["v_dim"], -1),
        "indexer": {
            "w_q": heads(arrays["indexer.wq_b.weight"], c["index_heads"]),
            "w_k": arrays["indexer.wk.weight"].T,
            "k_scale": arrays["indexer.k_norm.weight"],
            "k_bias": arrays["indexer.k_norm.bias"],
            "w_w": arrays["indexer.weights_proj.weight"].T,
        },
    }


def made(case):
    changes = CASES[case]
    variant = attention.TABLE["dsa"]
    config = spec.build(variant.Config, changes)
    return config, nn.define(lambda keys: variant(config, WIDTH, keys))


def ours(definition, params, x):
    place = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], x.shape[:2])
    return definition.merge(params, {}).attend(x, base.Context(jnp.ones_like(place), place))[0]


def inputs(layer, run, top):
    """The first x [2, LENGTH, WIDTH] on which the indexer's choices are not close."""
    for seed in range(4, 200):
        x = np.random.default_rng(seed).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
        if top >= LENGTH or margin(layer, run, x, top) > 1e-4:
            return x
    raise AssertionError("every input has a near tie")


def margin(layer, run, x, top):
    """The smallest gap between a chosen and a rejected token's score."""
    held = []
    weights = layer.indexer.weights_proj.register_forward_hook(
        lambda m, args, out: held.append(out.numpy())
    )
    found = []
    relu = theirs.F.relu
    theirs.F.relu = lambda s: found.append(relu(s).numpy()) or relu(s)
    try:
        with torch.no_grad():
            run(torch.from_numpy(x))
    finally:
        theirs.F.relu = relu
        weights.remove()
    scores = np.einsum("blj,bljs->bls", held[0], found[0]) * held[0].shape[-1] ** -0.5
    gaps = []
    for row in scores:
        for t, each in enumerate(row):
            if t + 1 > top:
                ranked = np.sort(each[: t + 1])
                gaps.append(ranked[-top] - ranked[-top - 1])
    return min(gaps)


@every
def test_values_and_gradients_equal_the_peer(case):
    changes = CASES[case]
    layer, run = peer(case)
    x = inputs(layer, run, changes["top"])
    cotangent = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    x_torch = torch.from_numpy(x).requires_grad_()
    y = run(x_torch)
    (y * torch.from_numpy(cotangent)).sum().backward()

    _, definition = made(case)
    arrays = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    params = jax.tree.map(jnp.asarray, converted(arrays, changes))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, definition.shapes)

    def both(params, x):
        y, pull = jax.vjp(lambda p, x: ours(definition, p, x), params, x)
        return y, pull(jnp.asarray(cotangent))

    got, (d_params, d_x) = jax.jit(both)(params, jnp.asarray(x))
    grads = {
        n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for n, p in layer.named_parameters()
    }
    want = {"y": y.detach().numpy(), "x": x_torch.grad.numpy()} | converted(grads, changes)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path({"y": got, "x": d_x} | d_params)[0],
        jax.tree.leaves(want), strict=True,
    ):
        name = jax.tree_util.keystr(path)
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=5e-5, err_msg=name)
        assert ("indexer" in name) == (not np.abs(b).max() > 1e-3), name
