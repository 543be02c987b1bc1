"""Conditional memory: the quickstart with a fifth of its idle parameters in tables of n-grams.

Question: does a memory of n-grams buy more than the experts that pay for it?
Command:  sparse-pretrain train --config=engram --workdir=runs/engram
          sparse-pretrain runs diff runs/quickstart runs/engram
Cost:     the quickstart's, to be measured.
Expected: 2601.07372 finds the least loss with 20 to 25 percent of the idle parameters in tables,
          0.014 nats below none at 10B parameters; at this size an effect below the noise of seeds.
Measured: not run at full length yet.
Setting:  three of 16 experts of each layer, 1.33M parameters, for eight tables of 10,000 rows and
          more, 1.28M, before the second layer. Active parameters grow by the memory's projections,
          0.07M. `engram:ROWS` has tables of as many rows, and as few experts all the same.
"""

from ml_collections import ConfigDict

ROWS = 10_000


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart with a memory of so many rows a table."""
    if arg and not (arg.isdecimal() and int(arg) > 1):
        raise ValueError(f"engram: takes a number of rows above 1, got {arg!r}")
    attention = dict(kind="mla", heads=4, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64)
    router = dict(kind="sigmoid_bias", rate=0.01, balance=1e-4)
    moe = dict(kind="moe", experts=13, top_k=3, hidden=192, shared=1, router=router)
    dense = dict(kind="dense", hidden=768)
    return ConfigDict(
        dict(
            name="engram",
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
                scan=False,
                memory=dict(layers=(1,), heads=4, width=128, rows=int(arg or ROWS)),
                transfer=dict(base_width=256, base_depth=4, base_active=3 / 16),
            ),
            optim=dict(kind="muon", lr=0.01, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=46),
            eval=dict(every=46, between=16384),
        )
    )
