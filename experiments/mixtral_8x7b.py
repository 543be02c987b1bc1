"""Mixtral-8x7B: 46.7B parameters, 12.9B active, in its published configuration.

Question: few large experts, the design that fine-grained ones replaced: what does it cost?
Command:  sparse-pretrain plan --config=mixtral_8x7b --chips=h100:256 --tokens=1e12
          sparse-pretrain train --config=mixtral_8x7b:tiny
Source:   2401.04088 table 1; the released config.json.
Cost:     neither tokens nor hours are published. `tiny`: a minute on two cores.
Differs:  data, batch, rate and length of the run are not published: those here are ours. Rows are
          4,096 tokens (published: a context of 32,768).
"""

from ml_collections import ConfigDict

TINY = "tiny"


def get_config(arg: str = "") -> ConfigDict:
    """The published model; `tiny` keeps every part of it at the size of a laptop.

    Errors: ValueError for another argument.
    """
    if arg not in ("", TINY):
        raise ValueError(f"mixtral_8x7b: the argument is {TINY!r} or none, got {arg!r}")
    attention = dict(
        kind="full", heads=32, kv_heads=8, head_dim=128, qk_norm=False, rope=dict(theta=1e6)
    )
    router = dict(kind="topk", score="softmax", aux=0.02, z=0.0, normalise=True)
    moe = dict(kind="moe", experts=8, top_k=2, hidden=14336, shared=0, router=router)
    config = ConfigDict(
        dict(
            name="mixtral_8x7b",
            tokens=1_000_000_000_000,
            data=dict(tokenizer="bpe:32000", seq=4096, batch=1024, repeat=True),
            model=dict(
                width=4096,
                vocab=32000,
                blocks=dict(moe=dict(attention=attention, ffn=moe)),
                pattern=("moe",),
                repeats=32,
                norm_eps=1e-5,
                remat="full",
            ),
            optim=dict(kind="adamw", lr=3e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
            schedule=dict(kind="cosine", warmup=2000 * 1024 * 4096.0, final=0.1),
        )
    )
    return _tiny(config) if arg else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name = "mixtral_8x7b_tiny"
    config.tokens = 500_000
    config.data = ConfigDict(dict(tokenizer="bpe:4096", seq=256, batch=16))
    model = config.model
    model.width, model.vocab, model.repeats, model.remat = 128, 0, 3, "none"
    model.blocks.moe.attention.update(heads=4, kv_heads=2, head_dim=32)
    model.blocks.moe.ffn.update(experts=8, top_k=2, hidden=192)
    config.optim.lr = 3e-3
    config.schedule = ConfigDict(dict(kind="cosine", warmup=0.05, final=0.1))
    return config
