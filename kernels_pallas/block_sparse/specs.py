"""Named workloads of block-sparse attention, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, how blocks lie and are chosen, and dtype."""

    B: int = 2
    L: int = 48
    S: int | None = None  # L when None
    H: int = 4
    K: int = 2
    G: int = 2
    N: int = 3
    Dk: int = 16
    Dv: int = 16
    block: int = 8
    documents: int = 1  # per row; blocks start at their document's, so that starts are uneven
    choice: str = "past"  # past, any (future and repeated too), one (the same for all) or none
    spare: int = 0  # slots without a block
    dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        dtype = jnp.dtype(dtype or self.dtype)
        S = self.S or self.L
        q = numerics.normal((self.B, self.L, self.H, self.Dk), dtype, seed=seed)
        k = numerics.normal((self.B, S, self.K, self.Dk), dtype, seed=seed + 1)
        v = numerics.normal((self.B, S, self.K, self.Dv), dtype, seed=seed + 2)
        starts, used = self._starts(S, np.random.default_rng(seed + 3))
        blocks = numerics.integers(
            lambda: self._blocks(S, starts, used, np.random.default_rng(seed + 4)),
            (self.B, self.L, self.G, self.N))
        return ((q, k, v, blocks, jnp.asarray(starts, jnp.int32)),
                {"block": self.block, "scale": self.Dk**-0.5})

    def _starts(self, S, rng):
        """Where blocks start, [B, M], and how many of them are blocks, [B]."""
        starts = np.zeros((self.B, S // self.block + self.spare), np.int64)
        used = np.zeros(self.B, np.int64)
        for b in range(self.B):
            edges = [0, *np.sort(rng.integers(1, S, self.documents - 1)).tolist(), S]
            rows = [r for first, stop in itertools.pairwise(edges)
                    for r in range(first, stop - self.block + 1, self.block)]
            starts[b, :len(rows)], used[b] = rows, len(rows)
        return starts, used

    def _blocks(self, S, starts, used, rng):
        shape = (self.B, self.L, self.G, self.N)
        if self.choice == "none":
            return np.full(shape, -1)
        if self.choice == "one":
            return np.minimum(1, used - 1)[:, None, None, None] * np.ones(shape, np.int64)
        if self.choice == "any":
            some = rng.integers(-2, used.max() + 1, shape)
            return np.where(some < used[:, None, None, None], some, -1)
        # Different blocks that end before the query, -1 where there are fewer than N of them.
        M = starts.shape[1]
        past = starts[:, None, :] + self.block <= np.arange(S - self.L, S)[None, :, None]
        past &= (np.arange(M) < used[:, None])[:, None, :]
        order = rng.random((*shape[:3], M)) + 2 * ~past[:, :, None, :]
        best = np.argsort(order, -1)[..., :self.N]
        best = np.where(np.take_along_axis(order, best, -1) < 1, best, -1)
        return np.pad(best, [(0, 0)] * 3 + [(0, self.N - best.shape[-1])], constant_values=-1)


# Small, one feature or a crossing of features each: every backend must agree with the reference.
PARITY = {
    "plain": Spec(),
    "heads_share": Spec(H=8, G=2, K=1),
    "heads_choose": Spec(H=4, G=4, K=1, L=53),
    "widths": Spec(Dk=24, Dv=8, L=40, S=72),
    "one_token": Spec(L=1, S=40),
    "any": Spec(choice="any", N=5, L=61),
    "one": Spec(choice="one", N=2),
    "none": Spec(choice="none"),
    "documents": Spec(documents=4, L=90, spare=3, choice="any"),
    "more_than_exist": Spec(L=20, N=6),
    "no_block": Spec(L=6),
    "odd": Spec(block=7, L=90, H=6, G=6, K=3, Dk=20, Dv=12, documents=3),
}

# What training runs, for the tuner and the bench.
SPEED = {
    "moba_4k": Spec(B=1, L=4096, K=1, G=4, Dk=64, Dv=64, block=512, dtype="bfloat16"),
    "moba_32k": Spec(B=1, L=32768, K=1, G=4, Dk=64, Dv=64, block=512, dtype="bfloat16"),
    "nsa_4k": Spec(B=1, L=4096, K=1, G=1, N=16, Dk=64, Dv=64, block=64, dtype="bfloat16"),
    "nsa_32k": Spec(B=1, L=32768, K=1, G=1, N=16, Dk=64, Dv=64, block=64, dtype="bfloat16"),
}

# For tensor cores: bfloat16 and whole tiles. Small ones first, awkward for tiles of 128 rows; then
# heads of 128 and lengths that are too long for a bench on CPU.
_TENSOR = Spec(dtype="bfloat16", B=1, K=1, Dk=64, Dv=64, block=64)
HOPPER = {
    "tile_any": dataclasses.replace(_TENSOR, L=70, S=192, G=1, choice="any"),
    "tile_one_token": dataclasses.replace(_TENSOR, L=1, S=128, G=1, choice="any"),
    "tile_none": dataclasses.replace(_TENSOR, L=9, S=64, choice="none"),
    "tile_shared": dataclasses.replace(_TENSOR, B=2, L=45, S=256, block=128, H=8, K=2, G=4,
                                       Dk=128, choice="any"),
    "tile_documents": dataclasses.replace(_TENSOR, L=300, H=3, K=1, G=3, N=2, documents=3, spare=2),
    "tile_three_heads": dataclasses.replace(_TENSOR, L=86, S=128, H=3, G=1, Dv=128, choice="one"),
    "moba_8k": dataclasses.replace(_TENSOR, L=8192, H=16, K=4, G=16, Dk=128, Dv=128, block=512),
    "nsa_8k": dataclasses.replace(_TENSOR, L=8192, H=64, K=4, G=4, N=16, Dk=128, Dv=128),
    "moba_64k": dataclasses.replace(_TENSOR, L=65536, H=16, K=4, G=16, Dk=128, Dv=128, block=512),
    "nsa_64k": dataclasses.replace(_TENSOR, L=65536, H=64, K=4, G=4, N=16, Dk=128, Dv=128),
}
