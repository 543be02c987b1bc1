"""Named workloads of the experts' first half: grouped_matmul's, with two matrices."""

from __future__ import annotations

import dataclasses

from kernels_pallas import numerics
from kernels_pallas.grouped_matmul import specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(specs.Spec):
    """One workload: sizes, how rows fall on the experts, and dtypes."""

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        (x, gate, layout), _ = super().arguments(seed=seed, dtype=dtype)
        up = numerics.normal(gate.shape, gate.dtype, seed=seed + 2, std=self.D**-0.5)
        return (x, gate, up, layout), {}


def _all(chosen):
    return {name: Spec(**dataclasses.asdict(spec)) for name, spec in chosen.items()}


PARITY = _all(specs.PARITY)
SPEED = _all({name: spec for name, spec in specs.SPEED.items() if not name.endswith("_down")})
