"""DeepSeek-V2-Lite: 15.7B parameters, 2.7B active, in its published configuration.

Question: what does the smallest model of the line cost, and on how few chips does it train?
Command:  sparse-pretrain plan --config=deepseek/v2_lite --chips=h100:64
          sparse-pretrain train --config=deepseek/v2_lite:tiny
Source:   2405.04434 appendix B; the released config.json.
Cost:     no hours are published. `tiny`: a minute on two cores.
Differs:  the rate decays by a cosine over the last 20 % of tokens (published: by 0.316 after 80 %
          and after 90 %); initial weights are scaled by fan-in (published: 0.006 everywhere). The
          published text is not public: give your own by --data and
          --config.data.tokenizer=file:PATH.
"""

from ml_collections import ConfigDict

TINY = "tiny"


def get_config(arg: str = "") -> ConfigDict:
    """The published model; `tiny` keeps every part of it at the size of a laptop.

    Errors: ValueError for another argument.
    """
    if arg not in ("", TINY):
        raise ValueError(f"deepseek/v2_lite: the argument is {TINY!r} or none, got {arg!r}")
    attention = dict(kind="mla", heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    router = dict(kind="topk", score="softmax", aux=0.0, z=0.0, balance=0.001)
    moe = dict(kind="moe", experts=64, top_k=6, hidden=1408, shared=2, router=router)
    config = ConfigDict(
        dict(
            name="deepseek_v2_lite",
            tokens=5_700_000_000_000,
            data=dict(tokenizer="bpe:102400", seq=4096, batch=4608, repeat=True),
            model=dict(
                width=2048,
                vocab=102400,
                blocks=dict(
                    dense=dict(attention=attention, ffn=dict(kind="dense", hidden=10944)),
                    moe=dict(attention=attention, ffn=moe),
                ),
                prefix=("dense",),
                pattern=("moe",),
                repeats=26,
                remat="full",
            ),
            optim=dict(kind="adamw", lr=4.2e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
            schedule=dict(
                kind="wsd", warmup=2000 * 4608 * 4096.0, decay=0.2, shape="cosine", final=0.1
            ),
        )
    )
    return _tiny(config) if arg else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name = "deepseek_v2_lite_tiny"
    config.tokens = 500_000
    config.data = ConfigDict(dict(tokenizer="bpe:4096", seq=256, batch=16))
    model = config.model
    model.width, model.vocab, model.repeats, model.remat = 128, 0, 2, "none"
    for block in (model.blocks.dense, model.blocks.moe):
        block.attention.update(heads=4, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=16)
    model.blocks.dense.ffn.hidden = 384
    model.blocks.moe.ffn.update(experts=16, top_k=3, hidden=64)
    config.optim.lr = 3e-3
    config.schedule = ConfigDict(dict(kind="wsd", warmup=0.05, decay=0.3, shape="cosine"))
    return config
