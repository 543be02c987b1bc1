"""Named workloads of the indexer, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, how keys cover rows, what the main attention is, and dtype."""

    B: int = 2
    L: int = 24
    S: int | None = None  # L // stride when None
    J: int = 3
    D: int = 8
    top: int = 5
    H: int = 4
    K: int = 2
    Dk: int = 8
    stride: int = 1
    span: int = 1
    documents: int = 1  # per row; with several the last tokens are padding
    late: bool = False  # keys end later than their place says
    dtype: str = "float32"

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.L // self.stride if self.S is None else self.S

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return (q, k, w) and what tells which keys are seen."""
        dtype = jnp.dtype(dtype or self.dtype)
        shapes = ((self.B, self.L, self.J, self.D), (self.B, self.keys, self.D),
                  (self.B, self.L, self.J))
        index = tuple(numerics.normal(s, dtype, seed=seed + i) for i, s in enumerate(shapes))
        rng = np.random.default_rng(seed + 3)
        where: dict[str, Any] = {"stride": self.stride, "span": self.span}
        ends = np.arange(self.keys) * self.stride + self.span - 1
        ends = np.broadcast_to(ends, (self.B, self.keys))
        if self.late:
            ends = ends + np.sort(rng.integers(0, 4, ends.shape), axis=-1)
            where["ends_BxS"] = jnp.asarray(ends, jnp.int32)
        if self.documents > 1:
            cuts = np.sort(rng.integers(1, self.L, (self.B, self.documents - 1)), axis=-1)
            segments = (np.arange(self.L)[None, :, None] >= cuts[:, None]).sum(-1) + 1
            segments[:, -3:] = 0
            last = np.minimum(ends, self.L - 1)
            where["segments_q"] = jnp.asarray(segments, jnp.int32)
            where["segments_k"] = jnp.asarray(np.take_along_axis(segments, last, 1), jnp.int32)
        return index, where

    def main(self, *, seed: int = 10, dtype=None):
        """Return the main attention's q and k."""
        dtype = jnp.dtype(dtype or self.dtype)
        shapes = ((self.B, self.L, self.H, self.Dk), (self.B, self.keys, self.K, self.Dk))
        return tuple(numerics.normal(s, dtype, seed=seed + i) for i, s in enumerate(shapes))


# Small, one feature or a crossing of features each: every backend must agree with the reference.
PARITY = {
    "plain": Spec(),
    "one_head": Spec(J=1, B=1, L=17, K=4),
    "more_than_exist": Spec(top=40, L=13),
    "compressed": Spec(stride=4, span=4, L=43, K=1),
    "overlapping": Spec(stride=2, span=5, L=31, S=13),
    "documents": Spec(documents=3, L=37, top=4),
    "late": Spec(stride=3, span=3, late=True, documents=2, L=41),
    "one_token": Spec(L=1, top=2),
    "no_keys": Spec(L=3, S=0, stride=4, span=4),
    "parts": Spec(B=1, L=700, J=2, D=4, H=2, K=1, Dk=4, top=9),
}

# What training runs, for the tuner and the bench.
SPEED = {
    "dsa_4k": Spec(B=1, L=4096, J=4, D=32, top=256, H=8, K=8, Dk=64, dtype="bfloat16"),
    "dsa_32k": Spec(B=1, L=32768, J=4, D=32, top=256, H=8, K=8, Dk=64, dtype="bfloat16"),
    "csa_4k": Spec(B=1, L=4096, stride=4, span=4, J=4, D=32, top=128, H=8, K=1, Dk=64,
                   dtype="bfloat16"),
    "csa_32k": Spec(B=1, L=32768, stride=4, span=4, J=4, D=32, top=128, H=8, K=1, Dk=64,
                    dtype="bfloat16"),
}

# For tensor cores. DeepSeek's own sizes, and small ones that are awkward for tiles of 64 and 128:
# more keys than a program holds, heads and widths that are no whole tiles, lists over an edge.
HOPPER = {
    "tile_keys": Spec(B=1, L=130, S=600, J=5, D=72, top=65, stride=1, span=1, dtype="bfloat16"),
    "tile_heads": Spec(L=40, J=33, D=128, top=64, documents=3, late=True, H=2, K=1, Dk=16,
                       dtype="bfloat16"),
    "dsa_v3_4k": Spec(B=1, L=4096, J=64, D=128, top=2048, H=128, K=1, Dk=576, dtype="bfloat16"),
    "csa_v4_64k": Spec(B=1, L=65536, stride=4, span=4, J=64, D=128, top=512, H=64, K=1, Dk=512,
                       dtype="bfloat16"),
}
