"""Products of 64 rows, a warpgroup's own: in registers on Hopper, in tensor memory on Blackwell.

For kernels whose two multiplying warpgroups have 64 rows each. A body asks for the sums that it
needs by their place in a list of shapes, issues products into them and reads them in the layout
that Hopper's products have, which Blackwell's of 64 rows can be read in too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import generation, hopper

_F32, _BF16 = jnp.float32, jnp.bfloat16


def products(*shapes: tuple[int, int]) -> InRegisters | InTensorMemory:
    """Return how sums [64, columns] of these shapes are made on the device."""
    return (InTensorMemory if generation.is_blackwell() else InRegisters)(shapes)


@dataclasses.dataclass(frozen=True)
class InRegisters:
    """Hopper's: a sum is registers of the warpgroup while a body runs."""

    shapes: Sequence[tuple[int, int]]
    row_bytes = 128  # of what is multiplied, in shared memory

    def scratch(self) -> Any:
        """Return the memory of both warpgroups."""
        return None

    def of(self, scratch: Any, warpgroup: Any) -> InRegisters:
        """Return a warpgroup's products."""
        del scratch, warpgroup
        return self

    def spare(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the shared memory that `weigh` needs, of each warpgroup."""
        return [shape] if hopper.interpreted() else []

    def scoped(self, body: Any, *which: int) -> Any:
        """Return body(*sums)."""
        return pl.run_scoped(body, *(plgpu.ACC(self.shapes[i], _F32) for i in which))

    def multiply(self, acc: Any, a: Any, b: Any, more: Any = False) -> None:
        """Issue acc = a b, or with `more` acc += a b; a sum is zeros before its first product."""
        del more
        plgpu.wgmma(acc, a, b)

    def weigh(self, acc: Any, weights: Any, b: Any, spare: Sequence[Any]) -> None:
        """Issue acc = weights b, weights in registers."""
        hopper.weigh(acc, weights.astype(_BF16), b, *spare)

    def read(self, acc: Any, pending: int = 0, known: bool = False) -> Any:
        """Return a sum when all products but the last `pending` are done; `known` that it is."""
        del known
        return plgpu.wgmma_accumulator_load(acc, wait_n=pending) if pending else acc[...]


@dataclasses.dataclass(frozen=True)
class InTensorMemory:
    """Blackwell's: a sum has a place of tensor memory, and a barrier tells when products are done.

    Half as many columns in all 128 lanes: products of 64 rows run at half the rate of 128.
    """

    shapes: Sequence[tuple[int, int]]
    sums: Sequence[Any] = ()
    done: Any = None
    # A product of 64 rows goes to two halves of the lanes by columns: 64 of them in rows of memory
    # no longer than 32 columns.
    row_bytes = 64

    def scratch(self) -> Any:
        """As above."""
        return ([plgpu.TMEM((2, *shape), _F32) for shape in self.shapes],
                plgpu.Barrier(num_arrivals=1, num_barriers=2, orders_tensor_core=True))

    def of(self, scratch: Any, warpgroup: Any) -> InTensorMemory:
        """As above."""
        sums, done = scratch
        return InTensorMemory(self.shapes, [x.at[warpgroup] for x in sums], done.at[warpgroup])

    def spare(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """As above."""
        return [shape]

    def scoped(self, body: Any, *which: int) -> Any:
        """As above."""
        return body(*(self.sums[i] for i in which))

    def multiply(self, acc: Any, a: Any, b: Any, more: Any = False) -> None:
        """As above."""
        plgpu.tcgen05_mma(acc, a, b, accumulate=more)

    def weigh(self, acc: Any, weights: Any, b: Any, spare: Sequence[Any]) -> None:
        """As above, by way of shared memory."""
        (memory,) = spare
        memory[...] = weights.astype(_BF16)
        plgpu.commit_smem()
        self.multiply(acc, memory, b)

    def wait(self) -> None:
        """Wait until all products that the warpgroup has issued are done."""
        plgpu.tcgen05_commit_arrive(self.done)
        plgpu.barrier_wait(self.done)

    def read(self, acc: Any, pending: int = 0, known: bool = False) -> Any:
        """As above; waits for all products."""
        del pending
        if not known:
            self.wait()
        return taken(acc)


def taken(place: Any) -> Any:
    """Return a sum of 64 rows out of tensor memory, which may be written then."""
    values = plgpu.async_load_tmem(place, layout=plgpu.Layout.WGMMA)
    plgpu.wait_load_tmem()
    return values
