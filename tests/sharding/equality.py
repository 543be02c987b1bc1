"""Runs of a tiny model under a plan and on one device, for the tests of what must be equal."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import attention, config, optim, shapes
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, mesh, plans
from sparse_pretrain.training import state, step

ROWS, LENGTH, VOCAB = 8, 64, 64
MLA = dict(kind="mla", heads=4, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8)
ATTENTIONS = {
    "full": dict(kind="full", heads=4, kv_heads=2, head_dim=8, softcap=20.0),
    "mla": MLA,
    "sliding": dict(kind="sliding", heads=4, kv_heads=2, head_dim=8, window=24),
    "moba": dict(kind="moba", heads=4, kv_heads=2, head_dim=8, block=8, top_k=3),
    "nsa": dict(
        kind="nsa", heads=4, kv_heads=2, head_dim=8, span=8, stride=4, block=8, top_k=4, window=16
    ),
    "dsa": MLA | dict(kind="dsa", top=12),
    "dsa warmup": MLA | dict(kind="dsa", top=12, mode="warmup"),
    "csa": dict(kind="csa", heads=4, q_rank=16, dim=16, rope_dim=8, window=16, ratio=4, top=6,
                groups=2, group_rank=8, index_heads=2, index_dim=8, index_rope_dim=4),
    "hca": dict(kind="hca", heads=4, q_rank=16, dim=16, rope_dim=8, window=16, ratio=8, groups=2,
                group_rank=8),
}
ATTENTIONS |= {kind: dict(kind=kind) for kind in attention.TABLE if kind not in ATTENTIONS}


def model(attention="mla", **changes):
    """A mixture of experts with DeepSeek's router under the attention, float32."""
    router = dict(kind="sigmoid_bias", rate=0.01, balance=0.01)
    moe = dict(kind="moe", experts=8, top_k=2, hidden=16, shared=1, router=router)
    block = dict(attention=ATTENTIONS[attention], ffn=moe)
    values = dict(
        name="tiny",
        steps=1,
        data=dict(source="synthetic:copy", seq=LENGTH, batch=ROWS),
        model=dict(
            width=32, vocab=VOCAB, dtype="float32", blocks=dict(moe=block), pattern=("moe",),
            repeats=2,
        ) | changes,
        optim=dict(kind="adamw"),
    )
    return config.from_config_dict(values).model


def batches(count):
    """Packed rows that can be learned: every second token follows from the one before it."""
    rng, place = np.random.default_rng(0), np.arange(LENGTH)[None]
    for _ in range(count):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        tokens[:, 1::2] = (tokens[:, 0:-1:2] * 3 + 1) % VOCAB
        cut = rng.integers(10, LENGTH - 10, (ROWS, 1))
        segments = np.where(place < cut, 1, 2).astype(np.int32)
        positions = np.where(place < cut, place, place - cut).astype(np.int32)
        segments[-1, -10:] = 0
        weights = (segments > 0).astype(np.float32)
        ones, zeros = np.ones_like(segments), np.zeros_like(segments)
        yield shapes.Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, weights, ones, zeros)


def losses(
    model, plan="single", text="", *, accumulate=1, steps=20, optimizer="adamw", asked=None,
    host=False, devices=None,
):  # fmt: skip
    """(the loss of every step, the state after the last) under the plan, with what is asked."""
    definition = lm.define(model)
    table = optim.TABLE[optimizer]

    def schedule(n):
        return jnp.asarray(0.01, jnp.float32)

    tx = table.build(table.Config(lr=0.01), definition.dims, schedule)
    placed = None
    if plan != "single":
        found = plans.find(plan)
        laid = mesh.make(found, text, devices)
        placed = apply.Placed(found, laid, accumulate, **(asked or {}))
        placed.check(definition, rows=ROWS, length=LENGTH)
    now = state.create(definition, tx, 0, ema=False, placed=placed, host=host)
    run = step.make_train_step(
        definition, model, tx, schedule=schedule, accumulate=accumulate, placed=placed, host=host
    )
    out = []
    for batch in batches(steps):
        batch = batch if placed is None else placed.put(batch, ROWS)
        now, told = run(now, batch)
        out.append(float(told["loss"]))
    if host:
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(now.opt) if x.ndim}
        assert kinds == {"pinned_host"}
    return np.array(out), jax.device_get(now.params)
