"""Named workloads of attention to listed tokens, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, how tokens are listed, and dtype."""

    B: int = 2
    L: int = 24
    S: int | None = None  # L when None
    H: int = 4
    N: int = 5
    Dk: int = 16
    v_dim: int = 16
    choice: str = "past"  # past (distinct), any (repeated and outside too), one (for all) or none
    unique: bool = False
    lse: bool = False
    dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        dtype = jnp.dtype(dtype or self.dtype)
        S = self.L if self.S is None else self.S
        q = numerics.normal((self.B, self.L, self.H, self.Dk), dtype, seed=seed)
        kv = numerics.normal((self.B, S, self.Dk), dtype, seed=seed + 1)
        chosen = numerics.integers(lambda: self._chosen(S, np.random.default_rng(seed + 2)),
                                   (self.B, self.L, self.N))
        return ((q, kv, chosen),
                {"v_dim": self.v_dim, "scale": self.Dk**-0.5, "unique": self.unique,
                 "return_lse": self.lse})

    def _chosen(self, S, rng):
        shape = (self.B, self.L, self.N)
        if self.choice == "none":
            return np.full(shape, -1)
        if self.choice == "one":
            return np.full(shape, S // 2)
        if self.choice == "any":
            return rng.integers(-2, S + 2, shape)
        # Different tokens that end before the query, -1 where there are fewer than N of them.
        chosen = np.full(shape, -1)
        for i in range(self.L):
            seen = (i + 1) * S // self.L
            for b in range(self.B):
                some = rng.choice(seen, min(self.N, seen), replace=False)
                chosen[b, i, :some.size] = some
        return chosen


# Small, one feature or a crossing of features each: every backend must agree with the reference.
PARITY = {
    "plain": Spec(),
    "promised": Spec(unique=True, lse=True, N=7),
    "latent": Spec(Dk=20, v_dim=12, H=3, L=37, lse=True),
    "any": Spec(choice="any", N=9, L=31, S=11, Dk=24, v_dim=8, lse=True),
    "one": Spec(choice="one", N=3, lse=True),
    "none": Spec(choice="none", lse=True),
    "one_query": Spec(L=1, S=40, B=3),
    "one_choice": Spec(N=1, H=1, B=1, L=33),
    "compressed": Spec(L=50, S=12, N=4, H=8, lse=True),
    "more_than_exist": Spec(L=10, S=3, N=6, choice="any"),
    "no_tokens": Spec(L=6, S=0, choice="none", lse=True),
    "chunks": Spec(B=2, L=151, S=40, N=128, H=2, Dk=8, v_dim=4, choice="any", lse=True),
}

# What training runs, for the tuner and the bench.
SPEED = {
    "dsa_4k": Spec(B=1, L=4096, H=8, N=128, Dk=80, v_dim=64, unique=True, dtype="bfloat16"),
    "dsa_4k_256": Spec(B=1, L=4096, H=8, N=256, Dk=80, v_dim=64, unique=True, dtype="bfloat16"),
    "csa_4k": Spec(B=1, L=4096, S=1024, H=8, N=128, Dk=64, v_dim=64, unique=True,
                   dtype="bfloat16"),
    "dsa_32k": Spec(B=1, L=32768, H=8, N=128, Dk=80, v_dim=64, unique=True, dtype="bfloat16"),
    "csa_32k": Spec(B=1, L=32768, S=8192, H=8, N=128, Dk=64, v_dim=64, unique=True,
                    dtype="bfloat16"),
}

# For tensor cores, in bfloat16. Small ones first, awkward for 64 tokens at once and two queries a
# tile; then one that is too large for a bench on CPU.
_TENSOR = Spec(dtype="bfloat16", B=1, lse=True)
HOPPER = {
    "tile_any": dataclasses.replace(_TENSOR, L=3, S=70, N=63, choice="any"),
    "tile_one_query": dataclasses.replace(_TENSOR, B=3, L=1, S=130, N=64, H=1),
    "tile_none": dataclasses.replace(_TENSOR, L=4, N=3, choice="none"),
    "tile_one": dataclasses.replace(_TENSOR, L=6, S=129, N=2, H=64, choice="one"),
    "tile_past": dataclasses.replace(_TENSOR, L=9, S=260, N=130, H=9, Dk=128, v_dim=80),
    "tile_heads": dataclasses.replace(_TENSOR, L=2, S=140, N=65, H=70, Dk=40, v_dim=24,
                                      choice="any"),
    "tile_wide": dataclasses.replace(_TENSOR, L=3, S=150, N=65, H=3, Dk=150, v_dim=70,
                                     choice="any"),
    "tile_latent": dataclasses.replace(_TENSOR, L=3, S=90, N=70, H=20, Dk=576, v_dim=512),
    "csa_64k": dataclasses.replace(_TENSOR, L=65536, S=16384, H=64, N=512, Dk=128, v_dim=128,
                                   unique=True),
    # DeepSeek's: V2-Lite's 16 heads, V3.2's 128, and V4's compressed tokens, keys and values one.
    "dsa_v2_lite_4k": dataclasses.replace(_TENSOR, L=4096, H=16, N=2048, Dk=576, v_dim=512,
                                          unique=True),
    "dsa_v3_64k": dataclasses.replace(_TENSOR, L=65536, H=128, N=2048, Dk=576, v_dim=512,
                                      unique=True),
    "csa_v4_64k": dataclasses.replace(_TENSOR, L=65536, S=16384, H=128, N=1024, Dk=512, v_dim=512,
                                      unique=True),
}
