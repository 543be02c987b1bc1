"""DSA on the Python library's text: dense attention, a warm-up of the indexer alone, then sparse.

Question: does a short warm-up on a trained dense model teach the indexer where attention looks, and
          what does reading only an eighth of the row then cost?
Command:  sparse-pretrain train --config=experiments/dsa_warmup.py --workdir=runs/dsa_warmup
Then:     python3 experiments/benchmarks/indexer_mass.py --workdir=runs/dsa_warmup
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/dsa_warmup.py
Arms:     `sparse` as above; `dense` goes on with dense attention after the same warm-up, on the
          same tokens in the same order; `warmup` ends with the warm-up.
Measured: not yet.
"""

from ml_collections import ConfigDict

ARMS = ("sparse", "dense", "warmup")


def get_config(arg: str = "") -> ConfigDict:
    """The schedule that ends in this way, sparse without an argument.

    `warmup` stops after the warm-up, for the indexer to be looked at before anything adapts to it.
    Errors: ValueError naming the arms.
    """
    name = f"dsa_warmup_{arg}" if arg else "dsa_warmup"
    arg = arg or "sparse"
    if arg not in ARMS:
        raise ValueError(f"dsa_warmup: {arg!r} is not one of {', '.join(ARMS)}")
    attention = dict(
        kind="dsa", heads=2, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64, top=256,
        index_heads=4, index_dim=32, index_rope_dim=16, mode="dense",
    )
    end = "warmup" if arg == "warmup" else arg
    phases = dict(
        warm=dict(
            start=499_712, train="indexer", attention=dict(block=dict(mode="warmup"))
        ),
    )
    if end != "warmup":
        phases["then"] = dict(start=630_784, attention=dict(block=dict(mode=end)))
    return ConfigDict(
        dict(
            name=name,
            tokens=630_784 if end == "warmup" else 794_624,
            data=dict(source="python_stdlib", tokenizer="bpe:4096", seq=2048, batch=2),
            model=dict(
                width=128,
                blocks=dict(block=dict(attention=attention, ffn=dict(kind="dense", hidden=384))),
                pattern=("block",),
                repeats=2,
                scan=False,
            ),
            optim=dict(kind="muon", lr=0.01),
            # no decay before the sparse part, which is the last fifth
            schedule=dict(kind="wsd", warmup=0.05, decay=0.2),
            phases=phases,
            checkpoint=dict(every=64),
        )
    )
