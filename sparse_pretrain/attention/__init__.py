"""Attention variants: one file each, one row here."""

from sparse_pretrain.attention.csa import HCA
from sparse_pretrain.attention.full import Full
from sparse_pretrain.attention.mla import MLA
from sparse_pretrain.attention.moba import MoBA
from sparse_pretrain.attention.nsa import NSA
from sparse_pretrain.attention.sliding import Sliding

TABLE = {
    "full": Full,
    "mla": MLA,
    "sliding": Sliding,
    "moba": MoBA,
    "nsa": NSA,
    "hca": HCA,
}
