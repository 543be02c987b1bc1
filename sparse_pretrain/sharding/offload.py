"""What waits in the host's memory between uses: the optimizer's state, and activations.

The state lies in pinned host memory, comes to the device when a step updates parameters, and goes
back. Numbers without dims, such as a count of steps, stay on the device.
"""

from typing import Any

import jax

KINDS = ("none", "optimizer")
HOST = "pinned_host"


def check(asked: str, device: Any) -> None:
    """`asked` is the field and its value, as the user gave them.

    Errors: ValueError of one line when the device's host has no such memory.
    """
    there = {m.kind for m in device.addressable_memories()}
    if HOST not in there:
        raise ValueError(
            f"{asked} needs memory of kind {HOST}, and {device.platform} has "
            f"{', '.join(sorted(there))}"
        )


def shardings(tree: Any, laid: Any) -> Any:
    """Those of `laid`, in the host's memory where the tree's leaf is an array with dims."""
    return jax.tree.map(lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, tree, laid)


def fetched(tree: Any) -> Any:
    """The tree on the device, inside a trace."""
    return _moved(tree, jax.memory.Space.Device)


def put_back(tree: Any) -> Any:
    """The tree in the host's memory, inside a trace."""
    return _moved(tree, jax.memory.Space.Host)


def _moved(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)
