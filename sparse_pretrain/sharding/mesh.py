"""Meshes from a line of text, `data=2,expert=4`, and the errors of those that do not fit."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sparse_pretrain.sharding.plans import AXES, Plan


def parse(text: str) -> dict[str, int]:
    """Axis -> size of `data=2,expert=4`, in any order.

    Errors: ValueError naming what is no axis or no size.
    """
    found: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise ValueError(f"mesh: {axis!r} is no axis; axes are {', '.join(AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh: {part!r} gives no size, as in {axis}=2")
        if axis in found:
            raise ValueError(f"mesh: axis {axis} is there twice in {text!r}")
        found[axis] = int(size)
    return found


def sizes(plan: Plan, text: str, devices: int) -> dict[str, int]:
    """The size of each of the plan's axes; one that the text leaves out takes what is left.

    That is the last of the axes that only deal out rows; other axes left out have size 1.
    Errors: ValueError when the plan does not use an axis, or the sizes do not make `devices`.
    """
    given = parse(text)
    for axis in given:
        if axis not in plan.axes:
            uses = f"uses {', '.join(plan.axes)}" if plan.axes else "is for one device"
            raise ValueError(f"mesh: plan {plan.name} has no axis {axis}, it {uses}")
    if not plan.axes:
        return {}
    named = math.prod(given.values())
    out = {axis: given.get(axis, 1) for axis in plan.axes}
    if plan.rest not in given and devices % named == 0:
        out[plan.rest] = devices // named
    made = math.prod(out.values())
    if made != devices:
        shown = ",".join(f"{a}={n}" for a, n in out.items() if n > 1) or "one device"
        fits = [n for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(
            f"mesh: {shown} is {made} devices and there are {devices}; sizes must multiply to "
            f"{devices}, so each is one of {', '.join(map(str, fits))}"
        )
    return out


def make(plan: Plan, text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the plan's axes over all devices, or over those given.

    Errors: ValueError as in `sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    found = sizes(plan, text, len(devices))
    axes, shape = tuple(found), tuple(found.values())
    types = (AxisType.Auto,) * len(axes)
    if devices[0].platform == "tpu":  # its links form a grid, which may be finer than the mesh
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, axes, axis_types=types)
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=types)
