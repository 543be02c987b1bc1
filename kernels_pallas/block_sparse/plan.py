"""What the Mosaic kernels of block_sparse can do, and how they cut a call.

Letters as in tiles.py; X rows of a tile, of which T x R are in use.
"""

from __future__ import annotations

import dataclasses
import math

from kernels_pallas import device, generation
from kernels_pallas.block_sparse import tiles

# Rows of a tile on a GPU: on Hopper 64 for each of the two warpgroups that multiply; on a TPU as
# many as one product of its matrix units has.
X, HALF = 128, 64
TPU_X = 256
_FAST = 48 << 20  # bytes of a TPU's fast memory that tiles may take
# A row that sees nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29
LOG2E = math.log2(math.e)
# Rows of tiles in one chunk of queries: bounds the memory of what is sorted and of its results.
CHUNK = 1 << 19


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing."""

    scale: float
    block: int
    B: int
    L: int
    S: int
    H: int
    K: int
    G: int
    N: int
    M: int
    Dk: int
    Dv: int
    chunk: int  # queries, of all rows of the batch end to end
    X: int

    @property
    def R(self) -> int:
        """Query heads of a pair."""
        return self.H // self.G

    @property
    def T(self) -> int:
        """Pairs of a tile."""
        return self.X // self.R

    @property
    def groups(self) -> int:
        """Groups: blocks of one key head."""
        return self.B * self.K * self.M

    @property
    def tiles(self) -> int:
        """Tiles of a chunk at most."""
        return tiles.bound(self.chunk * self.G * self.N, self.groups, self.T)

    @property
    def keys(self) -> int:
        """Keys multiplied at once by a tile: as many as registers hold beside the results."""
        return 128 if self.block % 128 == 0 and max(self.Dk, self.Dv) <= 64 else 64

    @property
    def wide(self) -> bool:
        """Whether the warpgroups of the keys' gradient share a tile of 128 keys, or 64."""
        return self.block % 128 == 0

    @property
    def owned(self) -> int:
        """Keys whose gradient one program sums at once."""
        return 128 if self.wide else 64

    @property
    def halves(self) -> int:
        """Sums of a group's keys that the warpgroups of one program make, each of its own rows."""
        return 1 if self.wide else 2

    @property
    def parts(self) -> int:
        """Parts that a group's tiles are cut in, so that there are programs enough for the chip."""
        items = self.groups * (self.block // self.owned)
        return min(-(-2 * device.target().cores // items), 8)


def plan_of(q, k, v, blocks, starts, *, block, scale, rows=X) -> Plan:
    """Return the plan of a call."""
    (B, L, H, Dk), (S, K), Dv = q.shape, k.shape[1:3], v.shape[-1]
    (G, N), M = blocks.shape[2:], starts.shape[1]
    chunks = max(-(-B * L * H * N // CHUNK), 1)
    return Plan(float(scale), block, B, L, S, H, K, G, N, M, Dk, Dv, -(-B * L // chunks), rows)


def supports(q, k, v, blocks, starts, *, block, scale, return_lse=False) -> str | None:
    """Return None, or why the kernels for Hopper and Blackwell cannot run this call."""
    del k, starts, return_lse
    if lacks := generation.lacks_both(q=q):
        return lacks
    for name, x in (("Dk", q), ("Dv", v)):
        if x.shape[-1] not in (64, 128):
            return f"needs widths of 64 or 128, {name} is {x.shape[-1]}"
    if block % HALF:
        return f"needs blocks in multiples of {HALF}, block is {block}"
    heads = q.shape[2] // blocks.shape[2]
    if heads > X:
        return f"needs at most {X} heads that choose together, there are {heads}"
    if not scale >= 0:
        return f"needs a scale of 0 or more, scale is {scale}"
    return None


def supports_tpu(q, k, v, blocks, starts, *, block, scale, return_lse=False) -> str | None:
    """Return None, or why the TPU kernels cannot run this call."""
    del starts, scale, return_lse
    if lacks := device.lacks_tpu(q=q):
        return lacks
    for name, x in (("Dk", k), ("Dv", v)):
        if x.shape[-1] % 64:
            return f"needs widths in multiples of 64, {name} is {x.shape[-1]}"
    if block % 16:
        return f"needs blocks in multiples of 16, block is {block}"
    heads = q.shape[2] // blocks.shape[2]
    if heads > TPU_X:
        return f"needs at most {TPU_X} heads that choose together, there are {heads}"
    # keys, values and their gradients twice, a tile's rows twice, and six times the scores
    wide = k.shape[-1] + v.shape[-1]
    fast = 4 * (4 * block * wide + 6 * TPU_X * wide + 6 * block * TPU_X)
    if fast > _FAST:
        return f"needs at most {_FAST} bytes of fast memory, a block of {block} takes {fast}"
    return None
