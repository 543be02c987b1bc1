"""A dense Llama of any size: the ladder that `plan --budget` climbs.

Question: what do the same tokens and hours buy without experts, at every size?
Command:  sparse-pretrain plan --budget=100usd --chips=h100:8
          sparse-pretrain train --config=llama:256x4
Source:   2302.13971: SwiGLU of 8/3 the width, RMSNorm before each layer, rotary positions.
"""

import re

from ml_collections import ConfigDict


def get_config(arg: str = "256x4") -> ConfigDict:
    """`WIDTHxLAYERS`, the width a multiple of 64. Errors: ValueError for anything else."""
    found = re.fullmatch(r"([1-9]\d{1,4})x([1-9]\d{0,2})", arg)
    if found is None or int(found[1]) % 64:
        raise ValueError(f"llama: the argument is WIDTHxLAYERS, the width in 64s, got {arg!r}")
    width, layers = int(found[1]), int(found[2])
    dim = 128 if width % 128 == 0 and width >= 1024 else 64
    hidden = -(-8 * width // (3 * 64)) * 64
    attention = dict(kind="full", heads=width // dim, head_dim=dim, qk_norm=True)
    block = dict(attention=attention, ffn=dict(kind="dense", hidden=hidden))
    return ConfigDict(
        dict(
            name="llama" if arg == "256x4" else f"llama_{arg}",
            tokens=1_500_000 if width <= 256 else 20 * (12 * layers * width**2),
            data=dict(tokenizer="bpe:4096" if width <= 256 else "bpe:32768", seq=256, batch=32,
                      repeat=width > 256),
            model=dict(width=width, blocks=dict(block=block), pattern=("block",), repeats=layers),
            optim=dict(kind="adamw", lr=2e-3 if width <= 512 else 6e-4),
            schedule=dict(kind="wsd", warmup=0.02, decay=0.2),
        )
    )  # fmt: skip
