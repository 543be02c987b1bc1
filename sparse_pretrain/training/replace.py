"""Experts re-placed while training: copies go to the devices where the last steps' load asks.

The weights of a moved expert go with all that belongs to it: moments, momentum, average. Maps and
indices are data, so moving experts compiles nothing, and the model computes what it did before.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from sparse_pretrain import nn
from sparse_pretrain.model import lm
from sparse_pretrain.routing import copies
from sparse_pretrain.sharding import apply, placement
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


def tied(
    grads: dict,
    router: dict,
    config: lm.Config,
    definition: nn.Definition,
    placed: apply.Placed | None = None,
) -> dict:
    """The gradients, in which all copies of an expert have the sum of theirs."""
    held = maps(router)
    if not held:
        return grads
    names = lm.layer_names(config)

    def one(path, leaf, where):
        group, name = _place(path)
        if group not in held or name not in EXPERTS:
            return leaf
        ffn: Any = config.blocks[names[group]].ffn
        run = functools.partial(copies.total, experts=ffn.experts)
        return _each_layer(run, leaf, held[group], where)

    return jax.tree_util.tree_map_with_path(one, grads, _laid(grads, definition, placed))


class Replacer:
    """Places a state's experts for the loads of its window, which then starts again.

    Its program is compiled once; under a plan experts stay cut and travel a slot at a time.
    Source: EPLB. Differs: devices are renamed, and slots in them kept, so that few experts move.
    """

    def __init__(
        self,
        config: placement.Config,
        definition: nn.Definition,
        placed: apply.Placed | None = None,
    ):
        self.config, self.definition, self.placed = config, definition, placed
        self._compiled: Any = None

    def __call__(self, state: TrainState) -> TrainState:
        """The state placed anew; the one it is given is consumed."""
        load = jax.device_get(state.game["window"])
        old = jax.device_get(maps(state.router))
        new, source = {}, {}
        for group, held in old.items():
            before, seen = np.atleast_2d(held), np.atleast_2d(load[group])
            found = placement.rebalance_experts(
                seen, before.shape[1], self.config.groups, self.config.nodes, self.config.devices
            )
            after = _near(found.phy2log, before, self.config)
            new[group] = self._put(after.reshape(held.shape).astype(held.dtype))
            source[group] = self._put(_sources(before, after).reshape(held.shape))
        params, opt, ema = self._move((state.params, state.opt, state.ema), source)
        router = dict(state.router)
        for group, held in new.items():
            router[group] = {**router[group], "ffn": {**router[group]["ffn"], MAP: held}}
        window = jax.tree.map(lambda x: self._put(np.zeros_like(x)), load)
        return state._replace(
            params=params, opt=opt, ema=ema, router=router, game=state.game | {"window": window}
        )

    def _put(self, x: np.ndarray) -> jax.Array:
        """The same on every device of all processes, each of which has it."""
        if self.placed is None:
            return jnp.asarray(x)
        where = self.placed.replicated
        return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

    def _move(self, trees, source):
        if self._compiled is None:
            if self.placed is None:
                self._compiled = jax.jit(self._moved, donate_argnums=0)
            else:
                where = self._where(trees)
                self._compiled = self.placed.jit(
                    self._moved, donate_argnums=0, out_shardings=where
                )
        return self._compiled(trees, source)

    def _moved(self, trees, source):
        def one(path, leaf, where):
            group, name = _place(path)
            if group not in source or name not in EXPERTS:
                return leaf
            return _each_layer(copies.moved, leaf, source[group], where)

        return jax.tree_util.tree_map_with_path(one, trees, self._where(trees))

    def _where(self, trees):
        """Where parameters, the optimizer's state and averages lie."""
        uses = "stored", "optimizer", "optimizer"
        return tuple(
            _laid(tree, self.definition, self.placed, use)
            for tree, use in zip(trees, uses, strict=True)
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


def _laid(tree, definition, placed, use="stored"):
    """The NamedSharding of each leaf; None on one device."""
    if placed is None:
        return jax.tree.map(lambda _: None, tree)
    return placed.lay(tree, definition, use)


def _each_layer(function, leaf, number, where):
    """`function(leaf, number, axes=..)` of each layer's slots, which lie there.

    Shapes: leaf [R, D, F] or stacked [N, R, D, F], number [R] or [N, R].
    """
    stacked = leaf.ndim == 4
    spec = PartitionSpec() if where is None else where.spec
    cut = spec[stacked] if len(spec) > stacked else None
    axes = () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)

    def local(leaf, number):
        run = functools.partial(function, axes=axes)
        return jax.vmap(run)(leaf, number) if stacked else run(leaf, number)

    if where is None:
        return local(leaf, number)
    layers = PartitionSpec(*spec[:1]) if stacked else PartitionSpec()
    return jax.shard_map(local, in_specs=(spec, layers), out_specs=spec, check_vma=False)(
        leaf, number
    )
