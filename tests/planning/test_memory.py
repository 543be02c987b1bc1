"""Memory estimates: the state's bytes against the state itself, activations against each other."""

import dataclasses

import jax
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.attention import full, mla
from sparse_pretrain.model import block, ffn, lm, mtp
from sparse_pretrain.optim import adamw, muon
from sparse_pretrain.planning import memory
from sparse_pretrain.routing import moe
from sparse_pretrain.training import state

BLOCKS = {
    "dense": block.Config(attention=full.Config(heads=2), ffn=ffn.DenseConfig(hidden=48)),
    "moe": block.Config(
        attention=mla.Config(heads=2, q_rank=8, kv_rank=16), ffn=moe.Config(experts=4, hidden=24)
    ),
}
MODEL = lm.Config(
    width=32, vocab=97, blocks=BLOCKS, prefix=("dense",), pattern=("dense", "moe"), repeats=3
)


def _bytes(tree):
    """What the arrays of an abstract tree will take; a key is its 2 words of 32 bits."""
    total = 0
    for x in jax.tree.leaves(tree):
        size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += int(np.prod(x.shape, dtype=np.int64)) * size
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(
    "optimizer", [adamw.Config(), muon.Config(), muon.Config(router="muon", per_head=True)]
)
def test_the_state_to_the_byte(optimizer, ema, tied):
    config = dataclasses.replace(MODEL, tied=tied, mtp=mtp.Config(depth=int(ema), block="dense"))
    definition = lm.define(config)
    tx = optim.TABLE[optimizer.KIND].build(optimizer, definition.dims, lambda n: 1e-3 * (n + 1.0))
    real = jax.eval_shape(lambda: state.create(definition, tx, 0, ema=ema))
    got = memory.training_bytes(config, 64, optimizer=optimizer, ema=ema)
    assert got["parameters"] == got["gradients"] == _bytes(real.params)
    assert got["optimizer"] == _bytes(real.opt)
    assert got["average"] == _bytes(real.ema)
    assert got["prices"] == _bytes(real.router) > 0
    counted = sum(got[k] for k in ("parameters", "optimizer", "average", "prices"))
    assert counted + 4 + 8 == _bytes(real)  # and the step and the key
    assert got["total"] == sum(v for k, v in got.items() if k != "total")
    if optimizer.KIND == "muon":  # embedding and head have Adam's two moments
        assert 4 * 97 * 32 < got["optimizer"] - got["parameters"] < got["parameters"]


def test_each_policy_keeps_less_than_the_one_before():
    kept = []
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(MODEL, remat=remat, repeats=12)
        kept.append(memory.training_bytes(config, 64, optimizer=adamw.Config(), ema=False))
    none, dots, whole = (k["activations"] for k in kept)
    assert none > dots > whole > 0
    prefix = dataclasses.replace(MODEL, repeats=0)  # is never recomputed
    alone = memory.training_bytes(prefix, 64, optimizer=adamw.Config(), ema=False)["activations"]
    assert whole > alone + 12 * 64 * 32 * 2
