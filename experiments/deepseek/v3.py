"""DeepSeek-V3: 671B parameters, 37B active, in its published configuration.

Question: what does a frontier model of this design cost, and does its step fit its chips?
Command:  sparse-pretrain plan --config=deepseek/v3 --chips=h800:2048 --tokens=14.8e12
          sparse-pretrain train --config=deepseek/v3:tiny
Source:   2412.19437 sections 2 and 4.2; the released config.json.
Cost:     published: 2.664M H800 hours for 14.8T tokens; forecast: 2.89M (2.15M to 3.87M for four of
          five runs), $5.8M, with causal attention taken to be even where a row is cut and its keys
          gathered, which it is not. `tiny`: a minute on two cores.
Compiled: `plan --compile` for 2,048 H800s (fsdp=64,expert=16,context=2 in three micro-batches) 57.3
          GB a chip of 80, in 97 s on two cores; for v5p:8x16x16 (fsdp=64,expert=16,context=2 in
          fifteen) 81.7 of 95 GB, in 214 s. jax 0.12.0.1; nothing has run on either.
Differs:  batches are 15,360 rows from the start (published: 3,072, growing over 469B tokens); the
          rate decays once, by a cosine, over the last 4.8T tokens (published: to a tenth over
          4.3T, then constant in two steps); initial weights are scaled by fan-in (published: 0.006
          everywhere); documents of a row do not see each other; Adam's moments are float32.
          Products are in bfloat16 (published: 8 bits; `plan` takes the published ones).
          The published text is not public: give your own by --data and
          --config.data.tokenizer=file:PATH.
"""

from ml_collections import ConfigDict

TINY, MTP = "tiny", "mtp"
PRECISION = "fp8"  # of the published run's products, for `plan`; `train` computes in bfloat16


def get_config(arg: str = "") -> ConfigDict:
    """The published model; `mtp` with the module that predicts one token further ahead, which the
    published counts of parameters and FLOPs leave out; `tiny` the former at the size of a laptop.

    Errors: ValueError for another argument.
    """
    if arg not in ("", TINY, MTP):
        raise ValueError(f"deepseek/v3: the argument is {TINY!r}, {MTP!r} or none, got {arg!r}")
    attention = dict(
        kind="mla", heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    router = dict(kind="sigmoid_bias", rate=0.001, balance=1e-4, scale=2.5, groups=8, groups_kept=4)
    moe = dict(kind="moe", experts=256, top_k=8, hidden=2048, shared=1, router=router)
    config = ConfigDict(
        dict(
            name="deepseek_v3",
            tokens=14_800_000_000_000,
            data=dict(tokenizer="bpe:129280", seq=4096, batch=15360, repeat=True),
            model=dict(
                width=7168,
                vocab=129280,
                blocks=dict(
                    dense=dict(attention=attention, ffn=dict(kind="dense", hidden=18432)),
                    moe=dict(attention=attention, ffn=moe),
                ),
                prefix=("dense",) * 3,
                pattern=("moe",),
                repeats=58,
                remat="full",
            ),
            optim=dict(kind="adamw", lr=2.2e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
            schedule=dict(
                kind="wsd", warmup=2000 * 15360 * 4096.0, decay=4.8e12, shape="cosine", final=0.1
            ),
        )
    )
    if arg == MTP:
        config.name = "deepseek_v3_mtp"
        config.model.mtp = ConfigDict(dict(depth=1, weight=0.3))
        config.phases = ConfigDict(dict(late=dict(start=1e13, mtp_weight=0.1)))
    return _tiny(config) if arg == TINY else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name = "deepseek_v3_tiny"
    config.tokens = 500_000
    config.data = ConfigDict(dict(tokenizer="bpe:4096", seq=256, batch=16))
    model = config.model
    model.width, model.vocab, model.prefix, model.repeats = 128, 0, ("dense",), 2
    model.remat = "none"
    for block in (model.blocks.dense, model.blocks.moe):
        block.attention.update(heads=4, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=16)
    model.blocks.dense.ffn.hidden = 384
    model.blocks.moe.ffn.update(experts=32, top_k=4, hidden=64)
    model.blocks.moe.ffn.router.update(groups=4, groups_kept=2, rate=0.01)
    config.optim.lr = 3e-3
    config.schedule = ConfigDict(dict(kind="wsd", warmup=0.05, decay=0.3, shape="cosine"))
    return config
