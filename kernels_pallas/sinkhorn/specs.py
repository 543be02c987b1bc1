"""Named workloads of sinkhorn, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: T matrices of R x R, how far their logits lie apart, and dtype."""

    T: int = 40
    R: int = 4
    iterations: int = 20
    eps: float = 1e-6
    std: float = 1.0
    dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call; sums are never taken in bfloat16."""
        dtype = jnp.dtype(dtype or self.dtype)
        dtype = jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 else dtype
        logits = numerics.normal((self.T, self.R, self.R), dtype, seed=seed, std=self.std)
        return (logits,), {"iterations": self.iterations, "eps": self.eps}


PARITY = {
    "plain": Spec(),
    "once": Spec(iterations=1),
    "two": Spec(R=2, iterations=3, T=129),
    "eight": Spec(R=8, iterations=10),
    "apart": Spec(std=6.0, T=128),
    "one": Spec(T=1, R=3, eps=1e-3),
}

# What training runs, for the tuner and the bench: matrices of one site.
SPEED = {"mhc_8k": Spec(T=8192), "mhc_32k": Spec(T=32768)}
