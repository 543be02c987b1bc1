"""Experts re-placed while training: copies go to the devices where the last steps' load asks.

The weights of a moved expert go with all that belongs to it: moments, momentum, average. Maps and
indices are data, so moving experts compiles nothing, and the model computes what it did before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_pretrain.model import lm
from sparse_pretrain.routing import copies
from sparse_pretrain.sharding import placement
from sparse_pretrain.training.state import TrainState

EXPERTS = ("w_gate", "w_up", "w_down")
MAP = "phy2log"


def maps(router: dict) -> dict[str, jax.Array]:
    """Which expert every slot holds, [R] or stacked [N, R], by layer group with copies."""
    found = {group: told.get("ffn", {}) for group, told in router.items()}
    return {group: ffn[MAP] for group, ffn in found.items() if MAP in ffn}


def start(config: lm.Config) -> dict[str, Any]:
    """The state of re-placement before the first step: no load seen, by layer group."""
    window = {}
    for group, name in lm.layer_names(config).items():
        ffn: Any = config.blocks[name].ffn
        if getattr(ffn, "copies", 0):
            lead = (config.repeats,) if group.startswith("stack_") else ()
            window[group] = jnp.zeros((*lead, ffn.experts), jnp.float32)
    return {"window": window}


def watch(game: dict[str, Any], load: dict[str, jax.Array]) -> dict[str, Any]:
    """The state with the loads of one more step."""
    if "window" not in game:
        return game
    return game | {"window": {group: old + load[group] for group, old in game["window"].items()}}


def gradient_norm(grads: dict, router: dict) -> jax.Array:
    """The global norm in which every expert counts once, however many copies it has."""
    held = maps(router)
    if not held:
        return optax.tree.norm(grads)
    square = jnp.zeros((), jnp.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        group, name = _place(path)
        if group in held and name in EXPERTS:
            square = square + copies.square_norm(leaf, held[group])
        else:
            square = square + jnp.sum(jnp.square(leaf))
    return jnp.sqrt(square)


def replace(state: TrainState, config: placement.Config) -> TrainState:
    """The state with its experts placed for the loads of the window, which starts again.

    Source: EPLB. Differs: devices are renamed, and slots in them kept, so that few experts move.
    """
    load = jax.device_get(state.game["window"])
    old = jax.device_get(maps(state.router))
    new, source = {}, {}
    for group, held in old.items():
        before, seen = np.atleast_2d(held), np.atleast_2d(load[group])
        placed = placement.rebalance_experts(
            seen, before.shape[1], config.groups, config.nodes, config.devices
        )
        after = _near(placed.phy2log, before, config)
        new[group] = jnp.asarray(after.reshape(held.shape), held.dtype)
        source[group] = jnp.asarray(_sources(before, after).reshape(held.shape))
    params, opt, ema = _move((state.params, state.opt, state.ema), source)
    router = dict(state.router)
    for group, held in new.items():
        router[group] = {**router[group], "ffn": {**router[group]["ffn"], MAP: held}}
    window = jax.tree.map(jnp.zeros_like, state.game["window"])
    return state._replace(
        params=params, opt=opt, ema=ema, router=router, game=state.game | {"window": window}
    )


def _near(new_NxR, before_NxR, config: placement.Config):
    """The new placement, its devices and slots named so that the fewest experts move."""
    out = np.empty_like(new_NxR)
    experts = int(new_NxR.max()) + 1
    for n, (new, before) in enumerate(zip(new_NxR, before_NxR, strict=True)):
        holds = np.zeros((experts, config.devices), np.int64)
        device = np.arange(len(before)) // (len(before) // config.devices)
        np.add.at(holds, (before, device), 1)
        out[n] = placement.settle(new, holds, config.nodes)
    return placement.keep_slots(out, before_NxR, config.devices)


def _sources(before_NxR, after_NxR):
    """The slot whose content each slot takes: itself where it keeps its expert, else the first."""
    out = np.empty(after_NxR.shape, np.int32)
    for row, (old, new) in enumerate(zip(before_NxR, after_NxR, strict=True)):
        first = {int(e): r for r, e in reversed(list(enumerate(old)))}
        out[row] = [r if old[r] == e else first[int(e)] for r, e in enumerate(new)]
    return out


def _place(path) -> tuple[str, str]:
    """(layer group, parameter name) of a leaf, also of one inside an optimizer's state."""
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    return (names[-3], names[-1]) if len(names) >= 3 and names[-2] == "ffn" else ("", "")


@jax.jit
def _move(trees, source):
    def one(path, leaf):
        group, name = _place(path)
        if group not in source or name not in EXPERTS:
            return leaf
        index = source[group]
        if index.ndim == 1:
            return leaf[index]
        return jax.vmap(lambda a, i: a[i])(leaf, index)

    return jax.tree_util.tree_map_with_path(one, trees)
