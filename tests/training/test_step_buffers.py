"""What a compiled training step holds: no dense mask, no logits of all tokens, no E-fold rows.

The lengths differ so much that an array's shape tells what it is. The same search finds all three
in a step of the references, so that it would see them.
"""

import contextlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import device
from kernels_pallas.chips import CHIPS
from kernels_pallas.op import prefer
from sparse_pretrain import optim, shapes
from sparse_pretrain.attention import dsa, moba, nsa
from sparse_pretrain.model import block, lm
from sparse_pretrain.routing import moe
from sparse_pretrain.sharding import apply, mesh, plans
from sparse_pretrain.training import state, step

L, D = 1024, 192  # one sequence
V, E = 16381, 31  # primes: no reshape hides them
DENSE = {"mask": L * L, "logits": L * V // 2, "E-fold": E * L * D}
HEADS = dict(heads=6, kv_heads=2, head_dim=64)
ATTENTION = {
    "moba": moba.Config(**HEADS, block=64),
    "nsa": nsa.Config(**HEADS, block=64, top_k=4, window=128),
    "dsa": dsa.Config(heads=4, q_rank=64, kv_rank=192, nope_dim=32, rope_dim=32, v_dim=32,
                      top=128, index_heads=2, index_dim=64),
}  # fmt: skip


def compiled(attention, devices, target, *preferred):
    """The text of the training step of a layer for one of these devices."""
    experts = moe.Config(experts=E, top_k=2, hidden=128, shared=0)
    config = lm.Config(
        width=D, vocab=V, dtype="bfloat16", pattern=("layer",), repeats=1,
        blocks={"layer": block.Config(attention=attention, ffn=experts)},
    )  # fmt: skip
    definition = lm.define(config)
    table = optim.TABLE["adamw"]
    rate = lambda n: jnp.asarray(1e-3, jnp.float32)  # noqa: E731
    tx = table.build(table.Config(lr=1e-3), definition.dims, rate)
    placed = apply.Placed(plans.find("ddp"), mesh.make(plans.find("ddp"), "data=1", devices[:1]))
    fields = dict.fromkeys(shapes.FIELDS, jnp.int32) | {"weights": jnp.float32}
    rows: Any = {f: jax.ShapeDtypeStruct((1, L), d) for f, d in fields.items()}
    with contextlib.ExitStack() as stack:
        if target is not None:
            stack.enter_context(device.assume(target))
        stack.enter_context(prefer(*preferred))
        like = state.abstract(definition, tx, ema=False, placed=placed)
        run = step.make_train_step(definition, config, tx, schedule=rate, placed=placed)
        return run.lower(like, placed.like_batch(shapes.Batch(**rows))).compile().as_text()


def arrays(text):
    """The shapes of all arrays that a compiled program names."""
    found = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", text)
    return {tuple(int(n) for n in dims.split(",")) for dims in found}


def dense(found):
    """Which of the three are held, each with its largest array.

    Logits have the vocabulary as a dim, or what it is padded to for a product: of that, no
    parameter has half as many numbers. A mask has two dims of the sequence, or their product; rows
    repeated for every expert have the experts as a factor of a dim.
    """
    kinds = {
        "logits": lambda s: V in s or V + 3 in s,
        "mask": lambda s: sum(n % L == 0 for n in s) >= 2 or any(n % (L * L) == 0 for n in s),
        "E-fold": lambda s: any(n % E == 0 for n in s),
    }
    seen = {what: max(filter(of, found), key=math.prod, default=(0,)) for what, of in kinds.items()}
    return {what: s for what, s in seen.items() if math.prod(s) >= DENSE[what]}


@pytest.mark.slow
@pytest.mark.skipif(
    CHIPS["h200"].missing() is not None,
    reason=f"needs {CHIPS['h200'].missing()}, of the extra 'compile'",
)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_step_with_kernels_for_an_h200_holds_nothing_dense(name):
    chip = CHIPS["h200"]
    text = compiled(ATTENTION[name], chip.devices(), chip.target, "mosaic_gpu")
    assert text.count('custom_call_target="mosaic_gpu') > 6  # experts' and attention's
    assert not dense(arrays(text))


@pytest.mark.slow
def test_the_same_on_this_machine():
    text = compiled(ATTENTION["moba"], jax.devices("cpu"), None)
    assert not dense(arrays(text))


@pytest.mark.slow
def test_the_references_hold_all_of_it():
    text = compiled(ATTENTION["moba"], jax.devices("cpu"), None, "reference")
    assert set(dense(arrays(text))) == set(DENSE)
