"""CSA and HCA against Hugging Face's DeepSeek-V4 attention layer, where it can be had.

Its causality comes first: a version that pads compressed entries without masking them lets a query
see the future, and is no peer. Known divergences of versions, from the paper and its release:

- before overlap came to its compressor, CSA pooled `m` tokens and not 2m: such a version has
  gate_proj of one head's width and is skipped;
- before q_b_norm, queries had no per-head RMS: skipped as well;
- sigmoid instead of softmax before Sinkhorn and no factor 2 on the post weights concern its
  hyper-connections, not this layer.

transformers 5.24.0 has none of those here. What remains: it drops nothing and rounds nothing to 4
or 8 bits in the indexer, as we; it takes YaRN's frequencies without rescaling scores, as we; its
norms and poolings are float32 whatever the input, so it is compared in float32. Of entries with one
score (0, where every head's product is negative) torch chooses any and we the earliest, so inputs
are drawn until no choice is so close.
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
    "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="this transformers has no V4"
)
pytestmark = pytest.mark.filterwarnings("default")  # their warnings are not ours to fix

WIDTH, LENGTH, WINDOW = 24, 43, 6
SHARED = {
    "heads": 4, "q_rank": 10, "dim": 16, "rope_dim": 8, "window": WINDOW, "groups": 2,
    "group_rank": 7,
}
CASES = {
    "hca": ("hca", SHARED | {"ratio": 8}),
    "csa": (
        "csa",
        SHARED
        | {"ratio": 4, "top": 3, "index_heads": 3, "index_dim": 12, "index_rope_dim": 8},
    ),
}
every = pytest.mark.parametrize("case", CASES)
LAYERS = {"csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}


def peer(case):
    """Their layer with random parameters, and a function of x that runs it."""
    from transformers import DeepseekV4Config

    kind, c = CASES[case]
    yarn = {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8,
        "beta_fast": 32.0, "beta_slow": 1.0,
    }
    config = DeepseekV4Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=c["heads"],
        head_dim=c["dim"], q_lora_rank=c["q_rank"], qk_rope_head_dim=c["rope_dim"],
        layer_types=[LAYERS[kind]], compress_rates={LAYERS[kind]: c["ratio"]},
        sliding_window=WINDOW, o_groups=c["groups"], o_lora_rank=c["group_rank"],
        index_n_heads=c.get("index_heads", 1), index_head_dim=c.get("index_dim", 8),
        index_topk=c.get("top", 1), rope_parameters=yarn if "rope" in c else None,
        max_position_embeddings=128, attn_implementation="eager",
    )
    layer = theirs.DeepseekV4Attention(config, 0).float()
    rotary = theirs.DeepseekV4RotaryEmbedding(config)
    rng = np.random.default_rng(3)
    for name, tensor in sorted(layer.named_parameters()):
        noise = rng.standard_normal(tensor.shape)
        value = 1 + 0.3 * noise if "norm" in name else noise * tensor.shape[-1] ** -0.5
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value))
    wide = layer.compressor.gate_proj.weight.shape[0] == (1 + (kind == "csa")) * c["dim"]
    if not wide or not hasattr(layer, "q_b_norm"):
        pytest.skip("this transformers has no overlap or no norm of queries")
    behind = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    mask = np.where((behind >= 0) & (behind < WINDOW), 0.0, -np.inf)
    mask = torch.from_numpy(mask)[None, None].float()

    def run(x):
        place = torch.arange(LENGTH)[None].expand(len(x), -1)
        turn = {"compress": rotary(x, place, layer_type="compress")}
        return layer(x, turn, place, mask.expand(len(x), -1, -1, -1))[0]

    return layer, run


def converted(arrays, groups):
    """Their parameters (or gradients) as a nested dict of ours."""

    def compressor(prefix):
        return {
            "w_kv": arrays[f"{prefix}.kv_proj.weight"].T,
            "w_gate": arrays[f"{prefix}.gate_proj.weight"].T,
            "bias": arrays[f"{prefix}.position_bias"].reshape(-1),
            "norm": {"scale": arrays[f"{prefix}.kv_norm.weight"]},
        }

    def heads(w, count):
        return w.reshape(count, -1, w.shape[1]).transpose(2, 0, 1)

    count = arrays["sinks"].shape[0]
    found = {
        "w_dq": arrays["q_a_proj.weight"].T,
        "q_norm": {"scale": arrays["q_a_norm.weight"]},
        "w_uq": heads(arrays["q_b_proj.weight"], count),
        "w_kv": arrays["kv_proj.weight"].T,
        "kv_norm": {"scale": arrays["kv_norm.weight"]},
        "sinks": arrays["sinks"],
        "compressor": compressor("compressor"),
        "w_group": heads(arrays["o_a_proj.weight"], groups).transpose(1, 0, 2),
        "w_o": arrays["o_b_proj.weight"].T,
    }
    index = "compressor.indexer"
    if f"{index}.q_b_proj.weight" in arrays:
        w_iw = arrays[f"{index}.scorer.weights_proj.weight"].T
        found |= {
            "w_iq": heads(arrays[f"{index}.q_b_proj.weight"], w_iw.shape[1]),
            "w_iw": w_iw,
            "index_compressor": compressor(index),
        }
    return found


def inputs(layer, run):
    """The first x [2, LENGTH, WIDTH] on which the indexer's choices are not close."""
    scorer = layer.compressor.indexer.scorer if hasattr(layer.compressor, "indexer") else None
    for seed in range(4, 100):
        x = np.random.default_rng(seed).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
        if scorer is None:
            return x
        scores = []
        hook = scorer.register_forward_hook(lambda m, args, out, s=scores: s.append(out.numpy()))
        with torch.no_grad():
            run(torch.from_numpy(x))
        hook.remove()
        top, ratio = layer.compressor.indexer.index_topk, layer.compressor.compress_rate
        margins = [
            ranked[-top] - ranked[-top - 1]
            for row in scores[0]
            for t, each in enumerate(row)
            if len(ranked := np.sort(each[: (t + 1) // ratio])) > top
        ]
        if min(margins) > 1e-4:
            return x
    raise AssertionError("every input has a near tie")


@every
def test_the_peer_is_causal(case):
    layer, run = peer(case)
    x = inputs(layer, run)
    with torch.no_grad():
        before = run(torch.from_numpy(x)).numpy()
        for cut in (5, 8, 20, 33):
            later = x.copy()
            later[:, cut:] += 1
            after = run(torch.from_numpy(later)).numpy()
            np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
            assert np.abs(after[:, cut:] - before[:, cut:]).max() > 0.1


@every
def test_values_and_gradients_equal_the_peer(case):
    kind, changes = CASES[case]
    layer, run = peer(case)
    x, cotangent = inputs(layer, run), np.random.default_rng(5).standard_normal((2, LENGTH, WIDTH))
    cotangent = cotangent.astype(np.float32)
    x_torch = torch.from_numpy(x).requires_grad_()
    y = run(x_torch)
    (y * torch.from_numpy(cotangent)).sum().backward()

    variant = attention.TABLE[kind]
    config = spec.build(variant.Config, changes)
    definition = nn.define(lambda keys: variant(config, WIDTH, keys))
    arrays = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    params = jax.tree.map(jnp.asarray, converted(arrays, config.groups))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, definition.shapes)
    place = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, LENGTH))
    context = base.Context(jnp.ones((2, LENGTH), jnp.int32), place)

    def ours(params, x):
        y, pull = jax.vjp(lambda p, x: definition.merge(p, {}).attend(x, context)[0], params, x)
        return y, pull(jnp.asarray(cotangent))

    got, (d_params, d_x) = jax.jit(ours)(params, jnp.asarray(x))
    grads = {
        n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for n, p in layer.named_parameters()
    }
    want = {"y": y.detach().numpy(), "x": x_torch.grad.numpy()} | converted(grads, config.groups)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path({"y": got, "x": d_x} | d_params)[0],
        jax.tree.leaves(want), strict=True,
    ):
        name = jax.tree_util.keystr(path)
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=5e-5, err_msg=name)
        assert ("index" in name or "w_i" in name) == (not np.abs(b).max() > 1e-3), name
