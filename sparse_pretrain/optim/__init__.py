"""Optimizers: each has a `Config` and `build(config, dims, schedule)`; a new one is a line here."""

from sparse_pretrain.optim import ema, groups, schedules
from sparse_pretrain.optim.accumulate import accumulate, divide, split
from sparse_pretrain.optim.adamw import AdamW
from sparse_pretrain.optim.muon import Muon
from sparse_pretrain.optim.transfer import factors

TABLE = {"adamw": AdamW, "muon": Muon}

__all__ = [
    "TABLE",
    "AdamW",
    "Muon",
    "accumulate",
    "divide",
    "ema",
    "factors",
    "groups",
    "schedules",
    "split",
]
