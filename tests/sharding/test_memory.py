"""Memories under plans: tables cut by rows compute what one device does."""

import numpy as np
import pytest

from sparse_pretrain.data import ngrams
from sparse_pretrain.model import engram
from tests.sharding import equality

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
def test_losses_are_those_of_one_device(plan, text, remembered):
    model = equality.model("mla", memory=MEMORY)
    alone, ours = equality.losses(model, steps=8)
    spread, theirs = equality.losses(model, plan, text, steps=8)
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)
    for place in range(2):
        name = f"memory_{place}"
        np.testing.assert_allclose(
            theirs[name]["table"], ours[name]["table"], rtol=1e-3, atol=1e-3
        )
