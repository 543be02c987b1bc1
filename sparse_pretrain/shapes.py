"""The letters that array names use, and the two records that cross module borders.

Array names are `noun_DIMS`: B sequences, L query and S key length, D width, H query and K key
heads, Dh head width, Dv value width, Dc latent width, Dr rotary width, F hidden width, V
vocabulary, N layers, T tokens (B x L), E experts, C seats, P (token, expert) pairs, M key blocks,
W window, J indexer heads, G groups, 2D two widths side by side, R residual streams, RD their
widths side by side, Mix and Part the numbers that mix them, Row the rows of a memory's tables, Dm
their width, A how many of them a token reads and U all of those of a memory side by side. An `axis`
belongs to a mesh, a `dim` to an array.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray
COPIES = ("N", "E", "G")  # leading dims that only count copies: stacked layers, experts, groups
Position = Int[AnyArray, ""] | int


def copy_dims(dims: tuple[str, ...]) -> tuple[str, ...]:
    """The dims of one copy: without the leading stack and expert or group dims."""
    dims = dims[1:] if dims[:1] == ("N",) else dims
    return dims[1:] if dims[:1] in (("E",), ("G",)) else dims


class Batch(NamedTuple):
    """Packed rows of documents with next-token targets.

    `memory` are the rows that each token reads of the model's tables (model/engram.py).
    Shapes: every field [B, L], `memory` [B, L, A] or None; numpy on the host, jax arrays inside the
        step.
    Units: `bytes` UTF-8 bytes the target token stands for; `weights` 1 where the target counts.
    """

    tokens: Int[AnyArray, "B L"]
    targets: Int[AnyArray, "B L"]
    segments: Int[AnyArray, "B L"]  # 0 is padding; documents count from 1 within a row
    positions: Int[AnyArray, "B L"]  # position inside the document piece, 0 at its start
    weights: Float[AnyArray, "B L"]
    bytes: Int[AnyArray, "B L"]
    domains: Int[AnyArray, "B L"]
    memory: Int[AnyArray, "B L A"] | None = None

    @property
    def fields(self) -> tuple[Any, ...]:
        """Those that every batch has, all [B, L]."""
        return self[:-1]


FIELDS = Batch._fields[:-1]


class Aux(NamedTuple):
    """What a model returns besides its hidden states; all sums over the batch it saw.

    Shapes: `load` layer group -> [E] or [N, E] pairs per expert; `balance` [] (already weighted,
    mean per sequence); `own` [] what the attentions' indexers are trained by, summed over layers,
    mean over tokens; `market` layer group -> what its routers' markets report times their tokens,
    and `tokens`, how many (`routing.base.market_means` divides); `ahead` the hidden states
    [B, L, D] that predict 2, 3 .. tokens on, in training with MTP.
    """

    load: Any  # Float[Array, "N E"] or None when the model has no experts
    balance: Float[Array, ""]
    market: Any
    own: Float[Array, ""]
    ahead: tuple = ()
