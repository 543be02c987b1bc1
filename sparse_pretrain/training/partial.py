"""Training a part of the parameters while the rest of the state stands still."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain.model import lm
from sparse_pretrain.training.state import TrainState

# Batches that a price remembers when it settles. Quantile's own memory of 0.9 is ten of them, and
# then the averages weigh the batches of a phase about evenly.
SETTLE = 16.0


def own_mask(config: lm.Config, params: Any) -> Any:
    """Like `params`: True at each one that an attention trains by a loss of its own."""
    owned = lm.own_parameters(config)
    assert owned, "no attention has parameters of its own"

    def is_own(path, leaf):
        del leaf
        keys = _keys(path)
        return any(keys[: len(place)] == place for place in owned)

    return jax.tree_util.tree_map_with_path(is_own, params)


def no_mask(params: Any) -> Any:
    """Like `params`: False at each one."""
    return jax.tree.map(lambda _: False, params)


def settled(old: Any, moved: Any, n: jax.Array) -> Any:
    """The prices after a part of a move: all of the first, half of that of step SETTLE, and so on.

    Steps that fall as 1/n average out what one batch says beside what all say, and still reach any
    price (Robbins and Monro, 1951). `n` is 0 at the first step of the phase.
    """
    share = SETTLE / (SETTLE + n.astype(jnp.float32))
    return jax.tree.map(lambda was, new: was + (share * (new - was)).astype(was.dtype), old, moved)


def only(mask: Any, params: Any) -> Any:
    """The parameters, those outside the mask as constants: they get no backward pass."""
    return jax.tree.map(lambda own, p: p if own else jax.lax.stop_gradient(p), mask, params)


def stand_still(mask: Any, old: TrainState, new: TrainState) -> TrainState:
    """`new` with everything that belongs to a parameter outside the mask as in `old`, and prices.

    Counts of steps go on, since the schedule is read from them: Adam's correction for its first
    steps then counts those in which a parameter stood still.
    """
    marks = {_keys(path): own for path, own in jax.tree_util.tree_leaves_with_path(mask)}

    def choose(path, was, now):
        keys = _keys(path)
        # an optimizer's state holds trees like the parameters, deeper down
        ends = (keys[i:] for i in range(len(keys)))
        own = next((marks[end] for end in ends if end in marks), True)
        return now if own else was

    params, opt, ema = jax.tree_util.tree_map_with_path(
        choose, (old.params, old.opt, old.ema), (new.params, new.opt, new.ema)
    )
    return new._replace(params=params, opt=opt, ema=ema, router=old.router)


def _keys(path) -> tuple[str, ...]:
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
