"""Named workloads of pooling, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: rows, blocks, tokens of a block, streams and channels, and dtype."""

    B: int = 2
    M: int = 5
    R: int = 4
    S: int = 2
    C: int = 128
    alone: float = 0.3  # of the blocks, how many follow none
    std: float = 1.0
    dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        dtype = jnp.dtype(dtype or self.dtype)
        own = numerics.normal((self.B, self.M, self.R, 2, self.S, self.C), dtype, seed=seed,
                              std=self.std)
        wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
        bias = numerics.normal((self.R, self.S, self.C), wide, seed=seed + 1)
        rng = np.random.default_rng(seed + 2)
        follows = jnp.asarray(rng.random((self.B, self.M)) >= self.alone)
        return (own, bias, follows), {}


PARITY = {
    "overlap": Spec(),
    "one_stream": Spec(S=1, R=3),
    "wide": Spec(B=1, C=256, R=2, alone=0.0),
    "one_block": Spec(M=1, R=1),
    "apart": Spec(std=12.0, R=8, B=1, M=3),
}

# What training runs, for the tuner and the bench: DeepSeek-V4's blocks of 4, and its of 128.
SPEED = {
    "csa_8k": Spec(B=1, M=2048, C=512, alone=0.01, dtype="bfloat16"),
    "hca_8k": Spec(B=1, M=64, R=128, S=1, C=512, dtype="bfloat16"),
}
