"""Runs our model on a peer's weights and reports how far it is from the peer."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import shapes
from sparse_pretrain.interop import huggingface
from sparse_pretrain.model import lm
from sparse_pretrain.training import loss

TOLERANCE = 1e-4


def batch(tokens):
    """Whole rows, each one document: token l predicts token l + 1."""
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    order = np.arange(inputs.shape[1], dtype=np.int32)
    return shapes.Batch(
        tokens=inputs,
        targets=targets,
        segments=np.ones_like(inputs),
        positions=np.broadcast_to(order, inputs.shape).copy(),
        weights=np.ones(inputs.shape, np.float32),
        bytes=np.ones_like(inputs),
        domains=np.zeros_like(inputs),
    )


def model_config(fields, **changes):
    """The peer's model, and without the balance loss, which the peer lacks."""
    config = huggingface.from_hf_config(fields, dtype="float32", **changes)
    if "moe" not in config.blocks:
        return config
    section = config.blocks["moe"]
    router = dataclasses.replace(section.ffn.router, balance=0.0)
    section = dataclasses.replace(section, ffn=dataclasses.replace(section.ffn, router=router))
    return dataclasses.replace(config, blocks={**config.blocks, "moe": section})


def run(config, params, prices, tokens):
    """Logits, loss, gradients by Hugging Face's names, in the model's dtype."""
    definition = lm.define(config)
    one = batch(tokens)

    @jax.jit
    def everything(params):
        def loss_and_logits(p):
            value, _ = loss.loss_sums(definition, p, prices, one, jnp.sum(one.weights), 1)
            model = definition.merge(p, prices)
            hidden, _ = model(one)
            head, layout = model.head_weight()
            head = head.T if layout == "VD" else head
            return value, jnp.einsum("bld,dv->blv", hidden, head)

        return jax.value_and_grad(loss_and_logits, has_aux=True)(params)

    (value, logits), grads = everything(params)
    named = huggingface.to_hf(config, grads, prices, fused=True)
    return {
        "logits": np.asarray(logits),
        "loss": float(value),
        "grads": {k: v for k, v in named.items() if not k.endswith("e_score_correction_bias")},
    }


def golden(name):
    """(what the file says of itself, tokens, weights, the peer's results) of golden/NAME.npz."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    weights = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("weight/")}
    grads = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("grad/")}
    result = {"logits": arrays["logits"], "loss": float(arrays["loss"]), "grads": grads}
    return json.loads(str(arrays["about"])), arrays["tokens"], weights, result


def relative(ours, theirs):
    """Largest difference over the largest value."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def differences(ours, theirs):
    """Name -> relative difference, of logits, loss and every gradient."""
    assert set(ours["grads"]) == set(theirs["grads"])
    out = {
        "logits": relative(ours["logits"], theirs["logits"]),
        "loss": abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]),
    }
    for name, grad in theirs["grads"].items():
        assert np.max(np.abs(grad)) > 0, f"{name}: the peer's gradient is zero and shows nothing"
        out[name] = relative(ours["grads"][name], grad)
    assert all(np.isfinite(v) for v in out.values()), out
    return out
