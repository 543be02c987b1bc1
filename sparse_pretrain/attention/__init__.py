"""Attention variants: one file each, one row here."""

from typing import Any

from sparse_pretrain.attention.csa import CSA
from sparse_pretrain.attention.dsa import DSA
from sparse_pretrain.attention.full import Full
from sparse_pretrain.attention.hca import HCA
from sparse_pretrain.attention.mla import MLA
from sparse_pretrain.attention.moba import MoBA
from sparse_pretrain.attention.nsa import NSA
from sparse_pretrain.attention.sliding import Sliding

TABLE: dict[str, Any] = {
    "full": Full,
    "mla": MLA,
    "sliding": Sliding,
    "moba": MoBA,
    "nsa": NSA,
    "dsa": DSA,
    "csa": CSA,
    "hca": HCA,
}
