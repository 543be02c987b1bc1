"""Attention variants: one file each, one row here."""

from sparse_pretrain.attention.csa import HCA
from sparse_pretrain.attention.full import Full
from sparse_pretrain.attention.mla import MLA

TABLE = {
    "full": Full,
    "mla": MLA,
    "hca": HCA,
}
