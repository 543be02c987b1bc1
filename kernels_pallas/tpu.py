"""What the Mosaic TPU kernels share: fast memory, products, and how a kernel is called."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import device

# Bytes of fast memory for tiles, and with what the compiler adds; the smallest of these chips
# (TPU7x) has 64 MiB.
VMEM, LIMIT = 40 << 20, 56 << 20
LANES = 128


def whole(n: int, unit: int) -> int:
    """Return n rounded up to a whole number of units."""
    return -(-n // unit) * unit


def sublanes(itemsize: int) -> int:
    """Return the rows of a tile of memory: narrow numbers are stored in pairs of rows."""
    return 32 // itemsize


def dot(a: Any, b: Any, contract: tuple[int, int]) -> jax.Array:
    """Contract a dim of each in float32; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())),
                           precision=precision, preferred_element_type=jnp.float32)


def call(body: Any, name: str, out: Any, semantics: Any, **keywords: Any) -> Any:
    """Return the kernel as a function of its arrays; `semantics` of the grid's dims."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=LIMIT)
    return pl.pallas_call(body, name=name, out_shape=out, compiler_params=params,
                          interpret=device.target().interpret or False, **keywords)
