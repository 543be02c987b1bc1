"""DeepSeek-V2: 236B parameters, 21B active, in its published configuration.

Question: what did the design that V3 grew from cost, and what does `plan` say of it?
Command:  sparse-pretrain plan --config=deepseek/v2 --chips=h800:2048 --tokens=8.1e12
          sparse-pretrain train --config=deepseek/v2:tiny
Source:   2405.04434 sections 2 and 3.1; the released config.json.
Cost:     published: 172.8K H800 hours per trillion tokens. `tiny`: a minute on two cores.
Differs:  of the three balance losses there is that of experts, 0.003 a sequence, and not those of
          devices and of communication; batches are 9,216 rows from the start (published: 2,304,
          growing over 225B tokens); the rate decays by a cosine over the last 40 % of tokens
          (published: by 0.316 after 60 % and after 90 %); initial weights are scaled by fan-in
          (published: 0.006 everywhere). The published text is not public: give your own by --data
          and --config.data.tokenizer=file:PATH.
"""

from ml_collections import ConfigDict

TINY = "tiny"


def get_config(arg: str = "") -> ConfigDict:
    """The published model; `tiny` keeps every part of it at the size of a laptop.

    Errors: ValueError for another argument.
    """
    if arg not in ("", TINY):
        raise ValueError(f"deepseek/v2: the argument is {TINY!r} or none, got {arg!r}")
    attention = dict(
        kind="mla", heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    router = dict(
        kind="topk", score="softmax", aux=0.0, z=0.0, balance=0.003, scale=16.0, groups=8,
        groups_kept=3,
    )  # fmt: skip
    moe = dict(kind="moe", experts=160, top_k=6, hidden=1536, shared=2, router=router)
    config = ConfigDict(
        dict(
            name="deepseek_v2",
            tokens=8_100_000_000_000,
            data=dict(tokenizer="bpe:102400", seq=4096, batch=9216, repeat=True),
            model=dict(
                width=5120,
                vocab=102400,
                blocks=dict(
                    dense=dict(attention=attention, ffn=dict(kind="dense", hidden=12288)),
                    moe=dict(attention=attention, ffn=moe),
                ),
                prefix=("dense",),
                pattern=("moe",),
                repeats=59,
                remat="full",
            ),
            optim=dict(kind="adamw", lr=2.4e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
            schedule=dict(
                kind="wsd", warmup=2000 * 9216 * 4096.0, decay=0.4, shape="cosine", final=0.1
            ),
        )
    )
    return _tiny(config) if arg else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name = "deepseek_v2_tiny"
    config.tokens = 500_000
    config.data = ConfigDict(dict(tokenizer="bpe:4096", seq=256, batch=16))
    model = config.model
    model.width, model.vocab, model.repeats, model.remat = 128, 0, 2, "none"
    for block in (model.blocks.dense, model.blocks.moe):
        block.attention.update(heads=4, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=16)
    model.blocks.dense.ffn.hidden = 384
    model.blocks.moe.ffn.update(experts=32, top_k=4, hidden=64)
    model.blocks.moe.ffn.router.update(groups=4, groups_kept=2, scale=4.0)
    config.optim.lr = 3e-3
    config.schedule = ConfigDict(dict(kind="wsd", warmup=0.05, decay=0.3, shape="cosine"))
    return config
