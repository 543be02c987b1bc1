"""The FLOP formula against the compiler's own count, on models without loops or custom calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash.xla import keys_per_query
from kernels_pallas.grouped_matmul import aligned
from sparse_pretrain import shapes
from sparse_pretrain.attention import full, mla
from sparse_pretrain.model import block, engram, ffn, lm, residual
from sparse_pretrain.planning import flops
from sparse_pretrain.routing import moe
from sparse_pretrain.sharding import ops
from sparse_pretrain.training import loss

ATTENTION = {
    "full": full.Config(heads=4, kv_heads=2, head_dim=32),
    "mla": mla.Config(heads=4, q_rank=64, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32),
}


def _counted(config, batch, rows, length):
    """FLOPs of forward and backward per token, as the compiler counts the lowered program."""
    definition = lm.define(config)

    def value(params, prices):
        weight = jnp.asarray(float(rows * length), jnp.float32)
        return loss.loss_sums(definition, params, prices, batch, weight, 1)[0]

    lowered = jax.jit(jax.grad(value)).lower(definition.shapes, definition.price_shapes)
    return lowered.cost_analysis()["flops"] / (rows * length)


def _batch(rows, length, vocab):
    zeros = np.zeros((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones = zeros + 1
    return shapes.Batch(zeros, zeros, ones, positions, ones.astype(np.float32), ones, zeros)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("length", [128, 512])
def test_dense_models(attention, length):
    rows, vocab = 2, 512
    config = lm.Config(
        width=512,
        vocab=vocab,
        dtype="float32",
        scan=False,
        blocks={
            "b": block.Config(attention=ATTENTION[attention], ffn=ffn.DenseConfig(hidden=1536))
        },
        pattern=("b",),
        repeats=2,
    )
    counted = _counted(config, _batch(rows, length, vocab), rows, length)
    ours = flops.train_flops_per_token(config, length)
    assert ours.executed == pytest.approx(counted, rel=0.02)
    assert ours.model <= ours.executed


@pytest.mark.parametrize(("streams", "remat"), [(1, "none"), (2, "none"), (1, "full")])
def test_memories(streams, remat):
    """What they add, projections above all."""
    rows, length, vocab = 2, 64, 64
    memory = engram.Config(layers=(0, 1), heads=2, width=1024, rows=64)
    carried = residual.PLAIN if streams == 1 else residual.MHCConfig(streams=2)
    plain = lm.Config(
        width=512, vocab=vocab, dtype="float32", scan=False, residual=carried, remat=remat,
        blocks={"b": block.Config(attention=ATTENTION["full"], ffn=ffn.DenseConfig(hidden=64))},
        pattern=("b",), repeats=2,
    )  # fmt: skip
    config = dataclasses.replace(plain, memory=memory)
    batch = _batch(rows, length, vocab)
    zeros = np.zeros((rows, length, memory.carried), np.int32)
    with_, without = (
        _counted(config, batch._replace(memory=zeros), rows, length),
        _counted(plain, batch, rows, length),
    )
    ours = [flops.train_flops_per_token(c, length).executed for c in (config, plain)]
    assert ours[0] - ours[1] == pytest.approx(with_ - without, rel=0.03)


def test_experts(monkeypatch):
    """With even loads: the branch that is then taken is put in place of the choice."""
    # the even path of the layout with empty seats, which is what the formula counts
    monkeypatch.setattr(ops, "group_layout", aligned)
    monkeypatch.setattr(jax.lax, "switch", lambda path, branches, *args: branches[0](*args))
    rows, length, vocab = 2, 256, 512
    experts = moe.Config(experts=8, top_k=2, hidden=256, shared=1)
    config = lm.Config(
        width=512,
        vocab=vocab,
        dtype="float32",
        scan=False,
        blocks={"b": block.Config(attention=ATTENTION["mla"], ffn=experts)},
        pattern=("b",),
        repeats=2,
    )
    counted = _counted(config, _batch(rows, length, vocab), rows, length)
    ours = flops.train_flops_per_token(config, length, rows * length)
    assert ours.executed == pytest.approx(counted, rel=0.02)
    assert ours.model < ours.executed


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("shape", ["prefix", "two"])
def test_work_done_again(remat, shape, monkeypatch):
    """What a remat policy adds to the compiler's count is what the formula adds."""
    # the even path of the layout with empty seats, which is what the formula counts
    monkeypatch.setattr(ops, "group_layout", aligned)
    monkeypatch.setattr(jax.lax, "switch", lambda path, branches, *args: branches[0](*args))
    rows, length, vocab = 2, 128, 64
    experts = moe.Config(experts=8, top_k=2, hidden=256, shared=1)
    blocks = {
        "dense": block.Config(attention=ATTENTION["full"], ffn=ffn.DenseConfig(hidden=1024)),
        "moe": block.Config(attention=ATTENTION["mla"], ffn=experts),
    }
    layers = {
        "prefix": {"prefix": ("moe",), "pattern": ("dense",), "repeats": 2},
        "two": {"pattern": ("dense", "moe"), "repeats": 1},
    }[shape]
    config = lm.Config(width=512, vocab=vocab, dtype="float32", scan=False, blocks=blocks, **layers)
    batch = _batch(rows, length, vocab)
    counted, ours = [], []
    for policy in ("none", remat):
        config = dataclasses.replace(config, remat=policy)
        counted.append(_counted(config, batch, rows, length))
        ours.append(flops.train_flops_per_token(config, length, rows * length).executed)
    added = counted[1] - counted[0]
    # the compiler counts norms and activations too, which matter where no large product is redone
    assert ours[1] - ours[0] == pytest.approx(added, rel=0.06, abs=0.002 * counted[0])
    assert added > (0.05 if remat == "full" else 0.002) * counted[0]


def test_attention_reaches_every_visible_key():
    for length in (1, 7, 128, 300, 2048, 5000):
        keys = keys_per_query(length)
        assert (length + 1) / 2 <= keys <= max(length + 1024, 1.2 * length)
