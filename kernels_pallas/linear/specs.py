"""Named workloads of rows times a matrix, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes and dtypes."""

    T: int = 66
    D: int = 24
    F: int = 40
    dtype: str = "float32"
    w_dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        x = numerics.normal((self.T, self.D), jnp.dtype(dtype or self.dtype), seed=seed)
        w = numerics.normal((self.D, self.F), jnp.dtype(dtype or self.w_dtype), seed=seed + 1,
                            std=self.D**-0.5)
        return (x, w), {}


PARITY = {"plain": Spec(), "one_row": Spec(T=1), "prime": Spec(T=4099, D=8, F=8)}

SPEED = {
    "quickstart": Spec(T=8192, D=256, F=1536, dtype="bfloat16"),
    "wide": Spec(T=16384, D=4096, F=4096, dtype="bfloat16"),
    "deepseek_v3": Spec(T=8192, D=7168, F=4096, dtype="bfloat16", w_dtype="bfloat16"),
}
