"""Memories under plans: tables cut by rows compute what one device does, step by step.

Runs part, by up to 2e-4 nats within eight steps: experts are chosen by score, a gate jumps where
its key is at right angles to its stream, and Adam makes steps of one size of gradients of any.
Which of these does it has not been looked at.
"""

import jax
import numpy as np
import pytest

from sparse_pretrain.data import ngrams
from sparse_pretrain.model import engram
from tests.sharding import equality
from tests.sharding.test_steps import step_by_step

MEMORY = dict(layers=(0, 1), heads=2, width=16, rows=100)


@pytest.fixture
def remembered(monkeypatch):
    """Batches that carry rows."""
    config = engram.Config(**MEMORY)
    rng = np.random.default_rng(0)
    odd = 2 * rng.integers(0, 2**40, (2, 3)) + 1
    found = ngrams.Addresses(config, np.arange(equality.VOCAB), odd, 0)
    plain = equality.batches
    monkeypatch.setattr(equality, "batches", lambda count: map(found.carried, plain(count)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "text"),
    [("fsdp_ep_cp", "fsdp=2,expert=2,context=2"), ("fsdp_tp", "fsdp=2,tensor=4")],
)
def test_each_step_equals_one_devices_from_the_same_state(plan, text, remembered):
    model = equality.model("mla", memory=MEMORY)
    for now, theirs in step_by_step(model, plan, text, 8):
        for place in range(2):  # moments of the tables: the gradients before Adam sizes them
            name = f"memory_{place}"
            for a, b in zip(moments(theirs, name), moments(now, name), strict=True):
                # 99 of 100: a root's slope near zero sizes rounding up, in the largest gradients
                off = np.quantile(np.abs(a - b), 0.99)
                assert off <= 1e-4 * np.abs(b).max(), (name, off)


def moments(state, name):
    """Adam's two of a memory's table."""
    found = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt)
        if [k.key for k in path if hasattr(k, "key")][-2:] == [name, "table"]
    ]
    assert len(found) == 2
    return found
