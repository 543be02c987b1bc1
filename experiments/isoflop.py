"""Iso-FLOP family: small byte models, dense and with experts, resized by width.

Question: what law do these models follow, and how much more compute does a dense model need for the
loss of a mixture of 16 experts, three active and one shared, of the same FLOPs per token?
Command:  sparse-pretrain isoflop --budgets=4e9,9.5e9,2.26e10,5.38e10,1.28e11 \\
            --widths=8,16,24,32,48,64 --sizes=3 --ratio=12 \\
            --config=experiments/isoflop.py:dense --config=experiments/isoflop.py:moe
          and again with --beyond=forecast (its forecasts.json is committed before the next), then
          with --beyond=run, which trains and scores them.
Cost:     30 runs of 14,400 steps in all, 1.3e12 FLOPs, five budgets over a factor of 32; on an idle
          core most of a run of this size is its start and its compilation.
Data:     bytes of the Python library, at most 0.8M of 9.3M; no run sees one twice.
Rule:     the intervals of at least nine of ten forecast runs, up to four times the largest budget,
          hold the measured loss; the leverage is printed with its interval beside the published
          law's value, which is an extrapolation here by seven decades.
Measured: NOT YET. Begun at f829a81 on two cores that a dozen jobs shared (load 12 to 30): four
          runs of thirty finished in an hour, 40 s of CPU time each, most for start and compilation,
          and it was stopped there. The command above goes on from any such state.
Tuning:   none: the rate is that of the other small experiments here (Muon, 0.01) at all widths.
"""

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
            name=f"isoflop_{arg}" if arg else "isoflop",
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
