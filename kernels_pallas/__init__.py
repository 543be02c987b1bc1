"""Array operations with several implementations each: array in, array out."""

from kernels_pallas.block_sparse import block_sparse
from kernels_pallas.compress import compress
from kernels_pallas.cross_entropy import cross_entropy
from kernels_pallas.flash import flash
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_swiglu import grouped_swiglu
from kernels_pallas.indexer import index_kl_dense, index_kl_listed, index_select
from kernels_pallas.linear import linear
from kernels_pallas.scaled_matmul import scaled_matmul
from kernels_pallas.sinkhorn import sinkhorn
from kernels_pallas.token_sparse import token_mass, token_sparse

__all__ = ["block_sparse", "compress", "cross_entropy", "flash", "grouped_matmul",
           "grouped_swiglu", "index_kl_dense", "index_kl_listed", "index_select", "linear",
           "scaled_matmul", "sinkhorn", "token_mass", "token_sparse"]
