"""Quickstart: a small mixture of experts with latent attention, on the Python library's text.

Question: does a sparse model beat a dense one of the same active FLOPs within minutes on a CPU?
Command:  sparse-pretrain train
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart; it takes no argument."""
    if arg:
        raise ValueError(f"quickstart: takes no argument, got {arg!r}")
    attention = dict(kind="mla", heads=4, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64)
    router = dict(kind="sigmoid_bias", rate=0.01, balance=1e-4)
    moe = dict(kind="moe", experts=16, top_k=3, hidden=192, shared=1, router=router)
    dense = dict(kind="dense", hidden=768)
    return ConfigDict(
        dict(
            name="quickstart",
            tokens=1_500_000,
            data=dict(source="python_stdlib", tokenizer="bpe:4096", seq=256, batch=32),
            model=dict(
                width=256,
                blocks=dict(
                    first=dict(attention=attention, ffn=dense),
                    moe=dict(attention=attention, ffn=moe),
                ),
                prefix=("first",),
                pattern=("moe",),
                repeats=3,
                scan=False,  # unrolled, four layers run a fifth faster on CPU
            ),
            optim=dict(kind="muon", lr=0.007, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=50),
        )
    )
