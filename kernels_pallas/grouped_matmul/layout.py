"""Where each expert's rows lie in one buffer of static size.

A layout has a few `paths`, pairs (home, block): the first `home` rows of every expert stand at
equal distances, for one batched product that copies no matrix, and what an expert has beyond them
lies after all homes, end to end with the others' in whole blocks, for a loop in which each block
has one expert. The loads choose the first path that fits; all use the same buffer, so residuals of
the backward pass have one shape. (seats, 0) is the even layout, (0, block) the one without homes,
which fits any loads. Kernels want each expert's rows in one place, and so does `split=False`: its
paths are these two alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Mean rows of an expert from which even loads do better with empty seats than with homes that are
# full: what a home saves is products, what it costs is a copy of all rows.
_FULL_HOMES = 512


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "starts", "beyond", "home", "path"],
    meta_fields=["rows", "block", "paths"],
)
@dataclasses.dataclass(frozen=True)
class Layout:
    """An expert's first `home` rows are at starts, the others at beyond.

    Shapes: sizes, starts, beyond [E] int32; home, path [] int32, path the index in `paths`.
    Units: rows, and home and block of all paths, in rows; `block` is the last path's.
    """

    sizes: jax.Array
    starts: jax.Array
    beyond: jax.Array
    home: jax.Array
    path: jax.Array
    rows: int
    block: int
    paths: tuple[tuple[int, int], ...]

    @property
    def seats(self) -> int:
        """Rows between two groups' starts in the even layout."""
        return self.rows // self.sizes.shape[0]

    @property
    def split(self) -> bool:
        """Whether an expert's rows may lie in two places."""
        return any(home and block for home, block in self.paths)

    def place(self, expert, number):
        """The row of an expert's so-manieth row."""
        far = self.beyond[expert] + number - self.home
        return jnp.where(number < self.home, self.starts[expert] + number, far)

    def runs(self):
        """(starts, sizes) of the runs of one expert's rows: the homes, then what lies beyond."""
        near = jnp.minimum(self.sizes, self.home)
        starts = jnp.concatenate([self.starts, self.beyond])
        return starts, jnp.concatenate([near, self.sizes - near])


def contiguous(sizes, starts, rows: int, block: int) -> Layout:
    """The layout of groups that somebody else has laid end to end, from multiples of block."""
    none = jnp.full_like(starts, rows)
    zero = jnp.zeros((), jnp.int32)
    return Layout(sizes, starts, none, zero + rows, zero, rows, block, ((0, block),))


def rows_needed(pairs: int, experts: int, block: int = 128, slack: float = 1.25) -> tuple[int, int]:
    """(rows of the buffer, block): enough for any split of `pairs` over `experts`.

    The buffer holds at least slack * pairs rows, so that loads up to `slack` times the mean take
    the even path; the block shrinks until its padding fits in the same buffer.
    """
    while block > 8 and experts * (block - 1) > max(slack - 1, 0.125) * pairs:
        block //= 2
    need = max(int(pairs * slack), pairs + experts * (block - 1))
    # seats in 32s keep the matrix units' tiles whole; of few rows they would be a fifth more
    unit = 32 if need >= 128 * experts else 8
    seats = -(-need // (experts * unit)) * unit
    return experts * seats, block


def power_of_two(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (max(n, 1).bit_length() - 1)


def paths(pairs: int, experts: int, rows: int, block: int, split: bool):
    """The (home, block) that loads may take, in order of preference, the last for any loads."""
    seats, mean = rows // experts, -(-pairs // experts)
    found = [(seats, 0)]
    if split:
        full = -(-mean // 8) * 8
        if mean < _FULL_HOMES and full < seats:
            found = [(full, max(min(power_of_two(mean // 4), 128), 8))]
        if mean >= 32:  # uneven loads: half a home, and long blocks for what heavy experts have
            found.append((mean // 16 * 8, min(power_of_two(mean // 2), 512)))
    return (*found, (0, block))


def aligned(
    sizes, *, pairs: int, block: int = 128, slack: float = 1.25, split: bool = False
) -> Layout:
    """The layout for these group sizes, which sum to at most `pairs`.

    Shapes: sizes [E] int32. Units: block in rows; slack in multiples of the mean load.
    """
    experts = sizes.shape[0]
    rows, block = rows_needed(pairs, experts, block, slack)
    choices = paths(pairs, experts, rows, block, split)
    number = jnp.arange(experts, dtype=jnp.int32)
    fits, starts, beyond, homes = [], [], [], []
    for home, size in choices:
        more = jnp.maximum(sizes - home, 0)
        first = experts * home
        padded = (more + (size - 1)) // size * size if size else more
        fits.append(jnp.sum(padded) <= ((rows - first) // size * size if size else 0))
        at = (first + jnp.cumsum(padded) - padded).astype(jnp.int32)
        starts.append(number * home if home else at)
        beyond.append(at if home else jnp.full_like(at, rows))
        homes.append(home or rows)
    path = jnp.argmax(jnp.stack(fits)).astype(jnp.int32)
    data = (jnp.stack(starts)[path], jnp.stack(beyond)[path], jnp.asarray(homes, jnp.int32)[path])
    return Layout(sizes, *data, path, rows, block, choices)


def row_expert(layout: Layout):
    """(expert of each row [R], whether the row is in use [R])."""
    row = jnp.arange(layout.rows, dtype=jnp.int32)
    starts, sizes = layout.runs()
    run = jnp.searchsorted(starts, row, side="right").astype(jnp.int32) - 1
    # empty runs share a start with their successor; searchsorted names the last of them, which
    # is the one with rows
    return run % layout.sizes.shape[0], row - starts[run] < sizes[run]
