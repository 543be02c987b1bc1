"""Tokamax, a library of kernels by JAX's authors: a peer, where it is installed (`[tokamax]`).

Its kernels run where they are asked for by name, and in every benchmark.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from kernels_pallas import device


def lacks_tokamax(**arrays: Any) -> str | None:
    """Return None, or why Tokamax cannot run here; each of the arrays has to be bfloat16."""
    at = device.target()
    if at.platform not in ("gpu", "tpu"):
        return f"needs a GPU or a TPU, the device is {at.kind or at.platform}"
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    if device.assumed():
        return f"Tokamax asks JAX for its device and cannot be compiled for another, {at.kind}"
    if at.platform == "gpu" and (at.capability is None or at.capability < (9, 0)):
        return f"Tokamax is measured on Hopper and newer, the device {at.kind} is {at.capability}"
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16:
            return f"Tokamax is measured in bfloat16, {name} is {x.dtype}"
    return None


def mosaic() -> str:
    """Return the name by which Tokamax knows this platform's kernels."""
    return f"mosaic_{device.platform()}"


def tuned(function: Callable[..., Any],
          arguments: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Search Tokamax's block sizes for a call; what is traced inside the context takes them."""
    import tokamax

    return tokamax.autotune(function, *arguments, progress_bar=False)
