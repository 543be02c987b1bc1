"""Claim B6: Muon, SOAP, Shampoo and Adam on one GPT-2, by their published curves."""

import itertools
from typing import Any

import numpy as np

from sparse_pretrain.scaling.published import files

PUBLISHED = {"soap": 3.275, "muon": 3.276, "shampoo": 3.286, "adam": 3.341}


def race() -> dict[str, Any]:
    """`final` validation loss by optimizer, their `order`, and how much sooner each reaches Adam's.

    `sooner` is Adam's steps over the steps at which the curve, straight between evaluations, first
    meets Adam's final loss. One run each: a difference of 0.001 says nothing.
    Errors: files.Absent. Source: modded-nanogpt, record of 2024-10-29.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in files.rows("published/optimizer_race/curves.csv"):
        point = (float(row["step"]), float(row["val_loss"]))
        curves.setdefault(row["optimizer"], []).append(point)
    final = {name: curve[-1][1] for name, curve in curves.items()}
    steps, target = curves["adam"][-1]
    reached = {name: crossing(curve, target) for name, curve in curves.items()}
    return {
        "final": final,
        "order": sorted(final, key=lambda name: final[name]),
        "sooner": {name: steps / at for name, at in reached.items() if at is not None},
    }


def crossing(curve: list[tuple[float, float]], target: float) -> float | None:
    """The first step at which a curve, straight between its points, is down to `target`."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= target < y0:
            return float(np.interp(target, [y1, y0], [x1, x0]))
    return None
