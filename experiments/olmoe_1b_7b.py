"""OLMoE-1B-7B: 6.9B parameters, 1.3B active, in its published configuration.

Question: the best-documented open mixture of experts: does `plan` reproduce its cost?
Command:  sparse-pretrain plan --config=olmoe_1b_7b --chips=h100:256 --tokens=5.133e12
          sparse-pretrain train --config=olmoe_1b_7b:tiny
Source:   2409.02060 section 2, tables 10 to 12; the released config.json.
Cost:     published: about 10 days of 256 H100s. `tiny`: a minute on two cores.
Differs:  one cosine to a tenth of the rate (published: to a tenth, then linearly to 0 over the last
          100B tokens); initial weights are scaled by fan-in (published: truncated normal, 0.02).
"""

from ml_collections import ConfigDict

TINY = "tiny"


def get_config(arg: str = "") -> ConfigDict:
    """The published model; `tiny` keeps every part of it at the size of a laptop.

    Errors: ValueError for another argument.
    """
    if arg not in ("", TINY):
        raise ValueError(f"olmoe_1b_7b: the argument is {TINY!r} or none, got {arg!r}")
    attention = dict(kind="full", heads=16, head_dim=128, qk_norm=True, qk_norm_joint=True)
    router = dict(kind="topk", score="softmax", aux=0.01, z=0.001, normalise=False)
    moe = dict(kind="moe", experts=64, top_k=8, hidden=1024, shared=0, router=router)
    config = ConfigDict(
        dict(
            name="olmoe_1b_7b",
            tokens=5_133_000_000_000,
            data=dict(tokenizer="bpe:50304", seq=4096, batch=1024, repeat=True),
            model=dict(
                width=2048,
                vocab=50304,
                blocks=dict(moe=dict(attention=attention, ffn=moe)),
                pattern=("moe",),
                repeats=16,
                norm_eps=1e-5,
                remat="full",
            ),
            optim=dict(
                kind="adamw", lr=4e-4, b1=0.9, b2=0.95, weight_decay=0.1, decay_embed=True,
                clip=1.0,
            ),
            schedule=dict(kind="cosine", warmup=2500 * 1024 * 4096.0, final=0.1),
        )
    )  # fmt: skip
    return _tiny(config) if arg else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name = "olmoe_1b_7b_tiny"
    config.tokens = 500_000
    config.data = ConfigDict(dict(tokenizer="bpe:4096", seq=256, batch=16))
    model = config.model
    model.width, model.vocab, model.repeats, model.remat = 128, 0, 3, "none"
    model.blocks.moe.attention.update(heads=4, head_dim=32)
    model.blocks.moe.ffn.update(experts=16, top_k=4, hidden=64)
    config.optim.lr = 3e-3
    config.schedule = ConfigDict(dict(kind="cosine", warmup=0.05, final=0.1))
    return config
