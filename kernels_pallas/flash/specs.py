"""Named workloads of attention, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, mask and dtype."""

    B: int = 2
    L: int = 64
    S: int | None = None  # L when None
    H: int = 4
    K: int = 4
    Dk: int = 32
    Dv: int = 32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    segments: str | None = None  # packed, padded (rows end in padding) or mixed (out of order)
    stride: int = 1
    span: int = 1
    ends: bool = False  # keys laid out within the documents of `segments`
    lse: bool = False
    block_q: int | None = None
    block_k: int | None = None
    dtype: str = "float32"

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        dtype = jnp.dtype(dtype or self.dtype)
        S = self.S or self.L
        q = numerics.normal((self.B, self.L, self.H, self.Dk), dtype, seed=seed)
        k = numerics.normal((self.B, S, self.K, self.Dk), dtype, seed=seed + 1)
        v = numerics.normal((self.B, S, self.K, self.Dv), dtype, seed=seed + 2)
        keywords = {"scale": self.Dk**-0.5, "causal": self.causal, "window": self.window,
                    "softcap": self.softcap, "block_q": self.block_q, "block_k": self.block_k}
        if self.sinks:
            keywords["sinks_H"] = numerics.normal((self.H,), dtype, seed=seed + 3)
        if (self.stride, self.span) != (1, 1):
            keywords |= {"stride": self.stride, "span": self.span}
        if self.lse:
            keywords["return_lse"] = True
        if self.ends:
            own = self._segments(self.L, seed)
            ends, others = self._laid_out(own, S)
            keywords |= {"ends_BxS": jnp.asarray(ends, jnp.int32)}
            keywords |= {"segments_q": jnp.asarray(own, jnp.int32),
                         "segments_k": jnp.asarray(others, jnp.int32)}
        elif self.segments is not None:
            segments = jnp.asarray(self._segments(S, seed), jnp.int32)
            keywords |= {"segments_q": segments[:, S - self.L:], "segments_k": segments}
        return (q, k, v), keywords

    def _segments(self, S, seed):
        rng = np.random.default_rng(seed + 4)
        if self.segments == "mixed":
            return rng.integers(0, 4, (self.B, S))
        segments = np.sort(rng.integers(1, 4, (self.B, S)), 1)
        if self.segments == "padded":
            segments[:, S - S // 4:] = 0
            segments[0] = 0  # a whole row of padding
        return segments

    def _laid_out(self, segments_BxL, S):
        """Return ends and segments [B, S] of keys that start every `stride` rows of a document."""
        ends = np.full((self.B, S), self.L + S * self.stride + self.span)
        others = np.zeros((self.B, S), int)
        for row, own in enumerate(segments_BxL):
            at = 0
            for document in np.unique(own[own > 0]):
                first, *_, last = np.flatnonzero(own == document)
                for end in range(first + self.span - 1, last + 1, self.stride):
                    ends[row, at], others[row, at] = end, document
                    at += 1
        return ends, others


# Small, one feature or a crossing of features each: every backend must agree with the reference.
PARITY = {
    "plain": Spec(),
    "one_token": Spec(L=1),
    "gqa": Spec(H=8, K=2, L=40),
    "mla": Spec(Dk=48, Dv=32, L=70),
    "full": Spec(causal=False, L=40, S=72),
    "decode": Spec(L=5, S=37, H=4, K=2),
    "window": Spec(window=17, L=70, block_q=32, block_k=32),
    "window_full": Spec(window=20, L=60, causal=False, block_q=32, block_k=32),
    "sinks": Spec(sinks=True, H=4, K=2, L=50, block_q=32, block_k=32),
    "softcap": Spec(softcap=2.0, L=40),
    "packed": Spec(segments="packed", L=131, H=6, K=3, Dk=24, Dv=40),
    "padded": Spec(segments="padded", L=60, block_q=32, block_k=32),
    "unseen_rows": Spec(L=40, S=24, block_q=16, block_k=16),
    "all": Spec(L=71, H=4, K=2, Dk=40, window=30, softcap=2.0, sinks=True, segments="mixed",
                block_q=40, block_k=36),
    "loop": Spec(L=203, block_q=32, block_k=16),
    "loop_window": Spec(L=211, window=40, block_q=16, block_k=16),
    "loop_one": Spec(L=99, window=1, block_q=16, block_k=16),
    "loop_full": Spec(L=100, S=75, causal=False, block_q=16, block_k=16),
    "loop_unseen": Spec(L=120, S=50, block_q=16, block_k=16),
    "loop_padded": Spec(L=170, segments="padded", block_q=16, block_k=32),
    "loop_all": Spec(L=150, H=4, K=2, Dk=40, window=50, softcap=2.0, sinks=True,
                     segments="mixed", block_q=16, block_k=32),
    "lse": Spec(L=50, H=4, K=2, S=40, sinks=True, lse=True),
    "strided": Spec(L=70, S=16, H=4, K=1, stride=4, span=8, lse=True),
    "strided_window": Spec(L=90, S=22, stride=4, span=4, window=23, block_q=32, block_k=4),
    "strided_packed": Spec(L=131, S=32, H=4, K=2, stride=4, span=8, segments="packed",
                           ends=True, lse=True),
    "ends_window": Spec(L=90, S=22, stride=4, span=4, window=30, segments="padded", ends=True,
                        block_q=48, block_k=8),
    "loop_lse": Spec(L=120, S=50, lse=True, block_q=16, block_k=16),
    "loop_strided": Spec(L=203, S=50, stride=4, span=4, block_q=16, block_k=16),
    "loop_strided_window": Spec(L=203, S=50, stride=4, span=8, window=40, block_q=16, block_k=8,
                                lse=True),
    "loop_packed": Spec(L=203, S=50, H=4, K=1, stride=4, span=8, segments="packed", ends=True,
                        lse=True, block_q=16, block_k=16),
    "loop_ends_window": Spec(L=203, S=50, H=4, K=2, stride=4, span=4, window=60, softcap=2.0,
                             sinks=True, segments="padded", ends=True, block_q=16, block_k=8),
}

# What training runs, for the tuner and the bench.
SPEED = {
    "quickstart": Spec(B=16, L=256, Dk=64, Dv=64, segments="packed", dtype="bfloat16"),
    "mla_256": Spec(B=16, L=256, H=8, K=8, Dk=48, Dv=32, segments="packed", dtype="bfloat16"),
    "char": Spec(B=12, L=64, dtype="bfloat16"),
    "long_4k": Spec(B=1, L=4096, H=8, K=2, Dk=64, Dv=64, dtype="bfloat16"),
    "window_4k": Spec(B=1, L=4096, H=8, K=1, Dk=64, Dv=64, window=128, dtype="bfloat16"),
    "compressed_4k": Spec(B=1, L=4096, S=1024, H=8, K=1, Dk=64, Dv=64, stride=4, span=8,
                          lse=True, dtype="bfloat16"),
}

# For tensor cores, in bfloat16. Small ones first, awkward for tiles of 128 rows and steps of 64
# and 128; then what others' kernels do not serve: DeepSeek-V3's heads in packed rows, and
# gpt-oss's sinks with a window.
_TENSOR = Spec(dtype="bfloat16", B=1, lse=True)
HOPPER = {
    "tile_all": dataclasses.replace(_TENSOR, L=150, H=2, K=1, Dk=40, window=70, softcap=2.0,
                                    sinks=True, segments="packed"),
    "tile_mla": dataclasses.replace(_TENSOR, L=140, S=200, H=3, K=3, Dk=192, Dv=128),
    "tile_group": dataclasses.replace(_TENSOR, L=260, H=6, K=2, Dk=128, Dv=72),
    "tile_wide": dataclasses.replace(_TENSOR, L=290, H=2, K=1, Dk=128, Dv=128, window=150,
                                     softcap=2.0, segments="packed"),
    "tile_values": dataclasses.replace(_TENSOR, L=70, Dk=24, Dv=100, causal=False, S=130),
    "mla_v3_4k": dataclasses.replace(_TENSOR, L=4096, H=128, K=128, Dk=192, Dv=128,
                                     segments="packed"),
    "window_gpt_oss_8k": dataclasses.replace(_TENSOR, L=8192, H=64, K=8, Dk=64, Dv=64, window=128,
                                             sinks=True, segments="packed"),
    "gqa_8k": dataclasses.replace(_TENSOR, L=8192, H=32, K=8, Dk=128, Dv=128, segments="packed"),
    # what all peers serve, and dense attention over the lengths and heads of block_sparse's
    "heads_128_16k": Spec(dtype="bfloat16", B=1, L=16384, H=16, K=16, Dk=128, Dv=128),
    "moba_dense_8k": Spec(dtype="bfloat16", B=1, L=8192, H=16, K=4, Dk=128, Dv=128),
    "moba_dense_64k": Spec(dtype="bfloat16", B=1, L=65536, H=16, K=4, Dk=128, Dv=128),
    "nsa_dense_8k": Spec(dtype="bfloat16", B=1, L=8192, H=64, K=4, Dk=128, Dv=128),
    "nsa_dense_64k": Spec(dtype="bfloat16", B=1, L=65536, H=64, K=4, Dk=128, Dv=128),
}
