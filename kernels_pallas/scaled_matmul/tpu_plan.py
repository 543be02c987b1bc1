"""What the TPU kernels of scaled_matmul cannot do; their tiles are chosen by grouped_matmul's."""

from __future__ import annotations

from kernels_pallas import device


def supports(x, w, layout, *, power_of_two=False) -> str | None:
    """Return None, or why the TPU kernels cannot run this call."""
    del layout, power_of_two
    if lacks := device.lacks_tpu(x=x, w=w):
        return lacks
    for name, a in (("x", x), ("w", w)):
        if a.size == 0:
            return f"needs numbers to multiply, {name} has shape {a.shape}"
    return None
