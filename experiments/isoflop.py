"""Iso-FLOP family: small byte models, dense and with experts, resized by width."""

from ml_collections import ConfigDict

HEAD_DIM, WIDTH, SEQ = 8, 64, 128


def get_config(arg: str = "") -> ConfigDict:
    """The `dense` model or the `moe` of equal FLOPs per token, at width 64.

    Errors: ValueError naming the arms.
    """
    arm = arg or "dense"
    if arm not in ("dense", "moe"):
        raise ValueError(f"isoflop: {arg!r} is not one of dense, moe")
    attention = dict(kind="full", heads=WIDTH // HEAD_DIM, head_dim=HEAD_DIM)
    router = dict(kind="sigmoid_bias", rate=0.01, balance=1e-4)
    moe = dict(kind="moe", experts=16, top_k=3, hidden=48, shared=1, router=router)
    dense = dict(kind="dense", hidden=192)
    return ConfigDict(
        dict(
            name=f"isoflop_{arm}",
            tokens=1_000_000,
            data=dict(source="python_stdlib", tokenizer="bytes", seq=SEQ, batch=4),
            model=dict(
                width=WIDTH,
                blocks=dict(layer=dict(attention=attention, ffn=moe if arm == "moe" else dense)),
                pattern=("layer",),
                repeats=2,
                scan=False,
            ),
            optim=dict(kind="muon", lr=0.01, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            eval=dict(tokens=65_536),
            checkpoint=dict(every=0, keep=1),
            sample=dict(tokens=0),
        )
    )
