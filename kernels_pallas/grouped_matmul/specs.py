"""Named workloads of the experts' products, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics
from kernels_pallas.grouped_matmul.layout import aligned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, how rows fall on the experts, and dtypes."""

    sizes: tuple[int, ...] = ()  # rows of each expert; drawn from E and pairs when empty
    E: int = 0
    pairs: int = 0
    D: int = 64
    F: int = 128
    block: int = 128
    slack: float = 1.25
    skew: float = 0.0  # of drawn sizes: 0 is even, 1 gives experts about 0.3 to 3 times the mean
    dtype: str = "bfloat16"
    w_dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """Return how many rows experts have in all."""
        return sum(self.sizes) if self.sizes else self.pairs

    def loads(self, seed: int = 0):
        """Return the rows of each expert [E], in numpy."""
        if self.sizes:
            return np.asarray(self.sizes, np.int32)
        share = np.exp(self.skew * np.random.default_rng(seed).standard_normal(self.E) / 2)
        sizes = np.floor(share / share.sum() * self.pairs).astype(np.int32)
        sizes[:self.pairs - sizes.sum()] += 1
        return sizes

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        sizes = self.loads(seed)
        layout = aligned(jnp.asarray(sizes), pairs=self.rows, block=self.block, slack=self.slack)
        x = numerics.normal((layout.rows, self.D), jnp.dtype(dtype or self.dtype), seed=seed)
        w = numerics.normal((len(sizes), self.D, self.F), jnp.dtype(dtype or self.w_dtype),
                            seed=seed + 1, std=self.D**-0.5)
        return (x, w, layout), {}


# Small, and awkward for tiles of 128 rows: every backend must agree with a loop in numpy.
PARITY = {
    "one_takes_all": Spec(sizes=(300, 0, 0), block=16),
    "last_takes_all": Spec(sizes=(0, 0, 0, 1024), D=128, F=64),
    "tile_edges": Spec(sizes=(127, 0, 1, 128, 129, 0, 15), D=128, F=64, w_dtype="float32"),
    "ones": Spec(sizes=(1, 1, 1, 0, 1, 1), F=64, block=8),
    "nothing": Spec(sizes=(0, 0, 0), F=64),
    "even": Spec(sizes=(64, 64), D=192, F=64),
    "deep": Spec(sizes=(200, 0, 300, 12), D=512, F=320),
    "wide": Spec(sizes=(1, 63, 64, 65), D=128, F=512, block=64, w_dtype="float32"),
}

# What training runs, for the tuner and the bench. Pairs are tokens x experts per token.
SPEED = {
    "quickstart": Spec(E=16, pairs=16384, D=256, F=512, w_dtype="float32", skew=0.5),
    "olmoe": Spec(E=64, pairs=65536, D=2048, F=1024, skew=0.5),
    "olmoe_down": Spec(E=64, pairs=65536, D=1024, F=2048, skew=0.5),
    "deepseek_v2_lite": Spec(E=64, pairs=49152, D=2048, F=1408, skew=0.5),
    "deepseek_v3": Spec(E=8, pairs=32768, D=7168, F=2048, skew=0.5),  # one of 32 devices' experts
    "deepseek_v3_down": Spec(E=8, pairs=32768, D=2048, F=7168, skew=0.5),
}
