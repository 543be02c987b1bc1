"""Checkpoints: written in the background, committed by one rename, the newest and best kept."""

from sparse_pretrain.checkpoint.checkpointer import Checkpointer, Config
from sparse_pretrain.checkpoint.compatible import check_compatible, differing
from sparse_pretrain.checkpoint.files import (
    CheckpointError,
    folder,
    parse,
    read_json,
    read_record,
    steps,
    warm,
)
from sparse_pretrain.checkpoint.state import init_from, read_meta

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Config",
    "check_compatible",
    "differing",
    "folder",
    "init_from",
    "parse",
    "read_json",
    "read_meta",
    "read_record",
    "steps",
    "warm",
]
