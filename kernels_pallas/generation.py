"""Which generation of NVIDIA GPU the device is: for kernels that serve more than Hopper.

What only Hopper's tensor cores can run asks `device.lacks_hopper`.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax

from kernels_pallas import device

BLACKWELL = (10, 0)  # of data centres, with tensor memory: B200


def is_blackwell() -> bool:
    """Return whether the device is such a Blackwell GPU."""
    at = device.target()
    return at.platform == "gpu" and at.capability == BLACKWELL


def kernels(package: str, name: str = "mosaic_gpu") -> Any:
    """Return the package's module of kernels for the device: Pallas takes 0.4 s to import, which
    only who runs one pays."""
    return importlib.import_module(f"{package}.{name}{'_blackwell' if is_blackwell() else ''}")


def lacks_both(*dtypes: str, **arrays: Any) -> str | None:
    """Return None, or why kernels for Hopper and for Blackwell cannot run on the device.

    Each of the arrays has to be of one of these dtypes, bfloat16 when none is named.
    """
    at = device.target()
    if is_blackwell():
        if device.jax_version() < (0, 12):  # the oldest that they were compiled with
            return f"needs jax 0.12 on Blackwell, this is {jax.__version__}"
        return device._other_dtype(dtypes or ("bfloat16",), arrays)
    if at.platform == "gpu" and (at.capability is None or at.capability[0] != 9):
        return f"needs Hopper (9.0) or Blackwell (10.0), the device {at.kind} is {at.capability}"
    return device.lacks_hopper(*dtypes, **arrays)
