"""Every kernel op as the model calls it: by logical dims, the identity wrapper on one device.

The model never sees a mesh; when a plan shards a kernel's operands, the shard_map goes here.
"""

import jax.numpy as jnp

from kernels_pallas.block_sparse import block_sparse
from kernels_pallas.block_sparse.xla import keys_per_query as block_sparse_keys_per_query
from kernels_pallas.cross_entropy import cross_entropy
from kernels_pallas.flash import flash
from kernels_pallas.flash.xla import keys_per_query as flash_keys_per_query
from kernels_pallas.grouped_matmul import Layout as GroupLayout
from kernels_pallas.grouped_matmul import aligned as group_layout
from kernels_pallas.grouped_matmul import grouped_matmul as grouped_linear
from kernels_pallas.grouped_matmul import rows_needed as group_rows
from kernels_pallas.indexer import index_kl_dense, index_kl_listed, index_select
from kernels_pallas.indexer.xla import keys_per_query as index_keys_per_query
from kernels_pallas.linear import linear as _linear
from kernels_pallas.token_sparse import token_mass, token_sparse

__all__ = [
    "GroupLayout",
    "block_sparse",
    "block_sparse_keys_per_query",
    "cross_entropy",
    "flash",
    "flash_keys_per_query",
    "group_layout",
    "group_rows",
    "grouped_linear",
    "index_keys_per_query",
    "index_kl_dense",
    "index_kl_listed",
    "index_select",
    "linear",
    "token_mass",
    "token_sparse",
]


def linear(x, w, contract: int = 1):
    """The last `contract` dims of x against the first of w; remaining dims of w are appended.

    Shapes: x [..., *C], w [*C, *O] -> [..., *O], in x's dtype.
    """
    inner, outer = w.shape[:contract], w.shape[contract:]
    lead = x.shape[: x.ndim - contract]
    size_in, size_out = _product(inner), _product(outer)
    y = _linear(jnp.reshape(x, (*lead, size_in)), jnp.reshape(w, (size_in, size_out)))
    return jnp.reshape(y, (*lead, *outer))


def _product(dims) -> int:
    total = 1
    for d in dims:
        total *= d
    return total
