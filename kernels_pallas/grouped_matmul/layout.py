"""Where each expert's rows lie in one buffer of static size.

When the loads are even enough the groups start at equal distances (`uniform`), and the whole
product is one batched matmul; otherwise groups are laid end to end, each from a multiple of
`block`, so that a block of rows has one expert, and the product loops over the blocks in use.
Where blocks of `wide` rows fit too, as they do for any but extreme loads, those are taken
(`broad`): fewer copies of the experts, and contractions long enough for the weights' gradient.
All use the same buffer, so residuals of the backward pass have one shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "starts", "uniform", "broad"],
    meta_fields=["rows", "block", "wide"],
)
@dataclasses.dataclass(frozen=True)
class Layout:
    """Group sizes and starts. Shapes: sizes [E], starts [E] int32, uniform, broad [] bool.

    Units: rows, block, wide in rows; `wide` is 0 where there are no wide blocks.
    """

    sizes: jax.Array
    starts: jax.Array
    uniform: jax.Array
    broad: jax.Array
    rows: int
    block: int
    wide: int

    @property
    def seats(self) -> int:
        """Rows between two groups' starts in the uniform layout."""
        return self.rows // self.sizes.shape[0]


def rows_needed(pairs: int, experts: int, block: int = 128, slack: float = 1.25) -> tuple[int, int]:
    """(rows of the buffer, block): enough for any split of `pairs` over `experts`.

    The buffer holds at least slack * pairs rows, so that loads up to `slack` times the mean take
    the uniform path; the block shrinks until its padding fits in the same buffer.
    """
    while block > 8 and experts * (block - 1) > max(slack - 1, 0.125) * pairs:
        block //= 2
    need = max(int(pairs * slack), pairs + experts * (block - 1))
    # seats in 32s keep the matrix units' tiles whole
    unit = 32 if need >= 64 * experts else 8
    seats = -(-need // (experts * unit)) * unit
    return experts * seats, block


def wide_block(pairs: int, experts: int, block: int) -> int:
    """Rows of a wide block: a power of two up to 512, a third of an even group's rows at most.

    0 where that is not above `block`. Then the last blocks of groups, half empty in the mean, hold
    a sixth of the pairs: what the slack of 1.25 has room for.
    """
    wide = min(512, 1 << (max(pairs // (3 * experts), 1).bit_length() - 1))
    return wide if wide > block else 0


def aligned(sizes, *, pairs: int, block: int = 128, slack: float = 1.25) -> Layout:
    """The layout for these group sizes, which sum to at most `pairs`.

    Shapes: sizes [E] int32. Units: block in rows; slack in multiples of the mean load.
    """
    experts = sizes.shape[0]
    rows, block = rows_needed(pairs, experts, block, slack)
    seats = rows // experts
    uniform = jnp.max(sizes) <= seats
    wide = wide_block(pairs, experts, block)
    padded = (sizes + (block - 1)) // block * block
    broad = jnp.zeros((), bool)
    if wide:
        wider = (sizes + (wide - 1)) // wide * wide
        broad = ~uniform & (jnp.sum(wider) <= rows // wide * wide)
        padded = jnp.where(broad, wider, padded)
    ragged = jnp.cumsum(padded) - padded
    even = jnp.arange(experts, dtype=jnp.int32) * seats
    starts = jnp.where(uniform, even, ragged).astype(jnp.int32)
    return Layout(sizes, starts, uniform, broad, rows, block, wide)


def row_expert(layout: Layout):
    """(expert of each row [R], whether the row is in use [R])."""
    row = jnp.arange(layout.rows, dtype=jnp.int32)
    expert = jnp.searchsorted(layout.starts, row, side="right").astype(jnp.int32) - 1
    # empty groups share a start with their successor; searchsorted names the last of them, which
    # is the one with rows
    return expert, row - layout.starts[expert] < layout.sizes[expert]
