"""Dense baseline: the quickstart with every mixture of experts replaced by one dense network.

Question: what does the same compute buy without experts? Width, attention, data, order of data,
optimizer and tokens are the quickstart's; the feed-forward width is set so that a token costs the
same FLOPs (the router's share included, rounded up in the baseline's favour).
Command:  sparse-pretrain train --config=experiments/dense_baseline.py
Measured: see experiments/quickstart.py.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def _quickstart() -> ConfigDict:
    path = Path(__file__).with_name("quickstart.py")
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config(arg: str = "") -> ConfigDict:
    """The baseline; it takes no argument."""
    if arg:
        raise ValueError(f"dense_baseline: takes no argument, got {arg!r}")
    config = _quickstart()
    moe = config.model.blocks.moe.ffn
    seats = (moe.top_k + moe.shared) * moe.hidden
    router = -(-moe.experts // 3)  # 2 D E FLOPs of the gate are 6 D h of a SwiGLU
    hidden = -(-(seats + router) // 8) * 8  # whole tiles
    with config.unlocked():
        config.name = "dense_baseline"
        config.optim.lr = 0.007  # its own best of eight rates
        config.model.blocks.moe.ffn = ConfigDict(dict(kind="dense", hidden=hidden))
        # the same layer names keep the initial attention weights of a seed equal in both arms
    return config
