"""Named workloads of products in 8-bit floats, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics
from kernels_pallas.grouped_matmul.layout import aligned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, how rows fall on experts if there are any, how numbers vary, dtypes."""

    T: int = 40
    D: int = 200
    F: int = 150
    sizes: tuple[int, ...] = ()  # rows of each expert; dense when empty
    E: int = 0  # experts with T rows in all, evenly
    outliers: bool = False  # some channels and rows a thousand times the rest
    power_of_two: bool = False
    dtype: str = "float32"
    w_dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Return how many rows there are in all."""
        return sum(self.sizes) if self.sizes else self.T

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        dtype, w_dtype = jnp.dtype(dtype or self.dtype), jnp.dtype(dtype or self.w_dtype)
        loads = self.sizes or ((self.T // self.E,) * self.E if self.E else ())
        layout, rows = None, self.T
        shape: tuple[int, ...] = (self.D, self.F)
        if loads:
            layout = aligned(jnp.asarray(np.asarray(loads, np.int32)), pairs=sum(loads))
            rows, shape = layout.rows, (len(loads), self.D, self.F)
        x = numerics.normal((rows, self.D), jnp.float32, seed=seed)
        w = numerics.normal(shape, jnp.float32, seed=seed + 1, std=self.D**-0.5)
        if self.outliers:
            x = x.at[:, ::37].multiply(1000).at[::7].multiply(1e-3).at[3].set(0)
            w = w.at[..., ::53, :].multiply(1000)
        return (x.astype(dtype), w.astype(w_dtype), layout), {"power_of_two": self.power_of_two}


# Small, over tiles of 128: every backend must agree with the reference.
PARITY = {
    "plain": Spec(),
    "one_row": Spec(T=1, D=128, F=128),
    "one_column": Spec(T=129, D=127, F=1),
    "edges": Spec(T=128, D=256, F=129, power_of_two=True),
    "outliers": Spec(T=150, outliers=True),
    "power_of_two": Spec(T=150, outliers=True, power_of_two=True),
    "experts": Spec(sizes=(40, 0, 129, 1), D=130, F=140),
    "one_expert": Spec(sizes=(0, 0, 200), D=128, F=64, outliers=True),
    "ones": Spec(sizes=(1, 1, 0, 1, 0, 1, 1), D=128, F=256),
    "tile_edges": Spec(sizes=(127, 0, 128, 129, 0, 1), D=256, F=130, power_of_two=True),
    "no_rows": Spec(sizes=(0, 0), D=64, F=64),
}

# What training runs, for the tuner and the bench.
SPEED = {
    "quickstart": Spec(T=8192, D=256, F=1536, dtype="bfloat16"),
    "deepseek_v3": Spec(T=8192, D=7168, F=4096, dtype="bfloat16", w_dtype="bfloat16"),
    "deepseek_v3_experts": Spec(T=32768, E=8, D=7168, F=2048, dtype="bfloat16",
                                w_dtype="bfloat16"),
}
