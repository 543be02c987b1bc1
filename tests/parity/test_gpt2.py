"""The GPT-2 side of a claim against Hugging Face's: logits, and the gradients of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.claims import gpt2
from sparse_pretrain.shapes import Batch

torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `parity`)"
)
pytestmark = pytest.mark.filterwarnings("default")  # their warnings are not ours to fix

SIZES = {"vocab": 37, "length": 16, "width": 24, "layers": 2}
HEADS = 3
LAYER = {  # ours: theirs
    "norm_attention": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm_mlp": "ln_2",
    "up": "mlp.c_fc", "down": "mlp.c_proj",
}
PARTS = {"w": "weight", "scale": "weight", "b": "bias"}


def named(tree):
    """Our parameters, or gradients, under their names."""
    out = {"wte.weight": tree["tokens"]["w"], "wpe.weight": tree["places"]["w"]}
    blocks = [(f"h.{n}.{LAYER[k]}", v) for n, x in enumerate(tree["layers"]) for k, v in x.items()]
    for place, part in (*blocks, ("ln_f", tree["norm"])):
        out |= {f"{place}.{PARTS[k]}": v for k, v in part.items()}
    return {k: np.asarray(v) for k, v in out.items()}


def test_logits_and_gradients_equal_hugging_faces(rng):
    params = gpt2.init(jax.random.key(0), **SIZES)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype("f4"), params)
    tokens, targets = (rng.integers(0, 37, (2, 16)).astype(np.int32) for _ in range(2))
    ones = np.ones_like(tokens)
    batch = Batch(tokens, targets, ones, ones, ones.astype(np.float32), ones, ones)

    def loss(p):
        total, count = gpt2.nats(p, batch, HEADS)
        return total / count

    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=24, n_layer=2, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    loaded = theirs.transformer.load_state_dict(
        {k: torch.tensor(v) for k, v in named(params).items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert not [k for k in loaded.missing_keys if not k.endswith("attn.bias")]
    scores = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    said = torch.nn.functional.cross_entropy(
        scores.reshape(-1, 37), torch.tensor(targets.reshape(-1), dtype=torch.long)
    )
    said.backward()
    ours = gpt2.logits(params, jnp.asarray(tokens), HEADS)
    np.testing.assert_allclose(ours, scores.detach().numpy(), atol=1e-4)
    value, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, said.item(), rtol=1e-5)
    own = dict(theirs.transformer.named_parameters())
    for name, ours in named(grads).items():
        np.testing.assert_allclose(ours, own[name].grad.numpy(), atol=1e-4, err_msg=name)
