"""Router bake-off: one small model with 64 experts a layer, under every router.

Question: at equal compute, which router predicts held-out text best, and which spreads its load?
Command:  sparse-pretrain train --config=experiments/router_bakeoff.py:quantile
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/router_bakeoff.py
"""

from ml_collections import ConfigDict

# Every arm at its best of three settings, chosen on a seed of its own
# (experiments/sweeps/router_bakeoff_tuning.py).
ARMS = {
    "aux_loss": dict(kind="topk", aux=0.01, z=0.001),
    "unbalanced": dict(kind="market", solver="sign", rate=0.0),
    "sign": dict(kind="market", solver="sign", rate=0.003),
    "proportional": dict(kind="market", solver="proportional", rate=0.01),
    "quantile": dict(kind="market", solver="quantile", memory=0.9),
    "threshold": dict(kind="market", solver="threshold", memory=0.9),
    "bip": dict(kind="market", solver="bip", iterations=2),
    "sinkhorn": dict(kind="market", solver="sinkhorn", temperature=0.15),
    "selective": dict(kind="market", solver="sinkhorn", share=0.5),
    "auction": dict(kind="market", solver="auction", epsilon=0.005, rounds=64),
    "expert_choice": dict(kind="expert_choice", memory=0.9),
    "hash": dict(kind="hash"),
}


def get_config(arg: str = "") -> ConfigDict:
    """The model under the router of this name, quantile without one.

    Errors: ValueError naming the arms.
    """
    name = f"router_bakeoff_{arg}" if arg else "router_bakeoff"
    arg = arg or "quantile"
    if arg not in ARMS:
        raise ValueError(f"router_bakeoff: {arg!r} is not one of {', '.join(ARMS)}")
    attention = dict(kind="mla", heads=4, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=32)
    moe = dict(kind="moe", experts=64, top_k=4, hidden=64, shared=1, router=ARMS[arg])
    return ConfigDict(
        dict(
            name=name,
            tokens=1_000_000,
            data=dict(source="python_stdlib", tokenizer="bpe:4096", seq=256, batch=16),
            model=dict(
                width=128,
                blocks=dict(
                    first=dict(attention=attention, ffn=dict(kind="dense", hidden=384)),
                    moe=dict(attention=attention, ffn=moe),
                ),
                prefix=("first",),
                pattern=("moe",),
                repeats=2,
                scan=False,
            ),
            optim=dict(kind="muon", lr=0.02, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=0, keep=1),
            sample=dict(tokens=0),
        )
    )
