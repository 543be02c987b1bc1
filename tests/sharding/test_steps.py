"""Every step under a plan is one device's step from the same state.

Where blocks or experts are chosen by score, a rounding of 1e-7 can change a choice, and twenty
steps later two runs have parted: test_choices.py shows where. Single steps show what a plan does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, mesh, plans
from sparse_pretrain.training import state, step
from tests.sharding import equality


def _schedule(n):
    return jnp.asarray(0.01, jnp.float32)


def _made(model, placed=None):
    """(a state at its start, its step)."""
    definition = lm.define(model)
    table = optim.TABLE["adamw"]
    tx = table.build(table.Config(lr=0.01), definition.dims, _schedule)
    now = state.create(definition, tx, 0, ema=False, placed=placed)
    return now, step.make_train_step(definition, model, tx, schedule=_schedule, placed=placed)


def _plain(x):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.clone(x) if is_key else np.array(x)  # a step consumes its state


def step_by_step(model, plan, text, count):
    """(state, the plan's) after each step that a plan takes from one device's state.

    Losses and norms are one device's, and the run learns.
    """
    found = plans.find(plan)
    laid = apply.Placed(found, mesh.make(found, text))
    now, alone = _made(model)
    like, together = _made(model, laid)
    where = jax.tree.map(lambda x: x.sharding, like)
    losses = []
    for batch in equality.batches(count):
        before = jax.tree.map(_plain, now)
        now, told = alone(now, batch)
        theirs, also = together(jax.device_put(before, where), laid.put(batch, equality.ROWS))
        np.testing.assert_allclose(also["loss"], told["loss"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(also["grad_norm"], told["grad_norm"], rtol=1e-4)
        losses.append(float(told["loss"]))
        yield now, theirs
    assert losses[-1] < losses[0] - 0.2, "a run that does not learn shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["moba", "nsa", "dsa", "mla"])
def test_each_step_equals_one_devices_from_the_same_state(attention):
    model = equality.model(attention)
    for now, theirs in step_by_step(model, "fsdp_tp_cp", "fsdp=2,tensor=2,context=2", 20):
        for a, b in zip(*map(jax.tree.leaves, (theirs.router, now.router)), strict=True):
            np.testing.assert_array_equal(a, b)  # prices move by loads, which are whole numbers
