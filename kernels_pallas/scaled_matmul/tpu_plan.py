"""What the TPU kernels of scaled_matmul cannot do; their tiles are chosen by grouped_matmul's."""

from __future__ import annotations

from kernels_pallas import device

# libtpu 0.0.50.1 compiles E4M3 products from v5e and v5p on; of a v4 it says "Unsupported matmul
# RHS type on target".
_WITHOUT = ("TPU v2", "TPU v3", "TPU v4")


def supports(x, w, layout, *, power_of_two=False) -> str | None:
    """Return None, or why the TPU kernels cannot run this call."""
    del layout, power_of_two
    if lacks := device.lacks_tpu(x=x, w=w):
        return lacks
    kind = device.target().kind
    if kind.startswith(_WITHOUT):
        return f"needs matrix units that take E4M3, those of a TPU v5 or newer, this is a {kind}"
    for name, a in (("x", x), ("w", w)):
        if a.size == 0:
            return f"needs numbers to multiply, {name} has shape {a.shape}"
    return None
