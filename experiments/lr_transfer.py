"""A model at a width, its rate carried over from width 64 or not: where is the best rate?

Question: does the best peak rate of AdamW stay put from width 64 to 512 with model.transfer on, and
          move without?
Command:  python3 experiments/benchmarks/lr_transfer_grid.py (every width and rate, each width
          compiled once); one point by
          sparse-pretrain train --config=experiments/lr_transfer.py:width=256,transfer=on,lr=0.01
          and all of them, in their own processes, by
          sparse-pretrain sweep --sweep=experiments/sweeps/lr_transfer.py
Expected: the best of a parabola through the grid's lowest points moves by at most 1.5 with it on,
          and by more than 2 with it off; in factors of 2 (2203.03466): at most one, at least two.
Measured: experiments/results/lr_transfer.json, 60 steps of 512 tokens, four seeds (three at width
          512), best rates at widths 64, 128, 256, 512:
          on   0.0120 0.0127 0.0089 0.0099   moves by 1.43: met
          off  0.0120 0.0081 0.0025 0.0022   moves by 5.58: met
          Of each of three seeds alone 1.14 to 1.27 with it and 5.2 to 8.8 without. With half the
          batch and 80 steps the losses of one seed were too ragged to say where the best rate is.
          Half an hour of a shared core. The commit in the file is the one of this change, before
          a rebase.
Differs:  heads grow in number and not in width, so attention's scale stays Dh^-0.5.
"""

from ml_collections import ConfigDict

BASE = 64


def get_config(arg: str = "") -> ConfigDict:
    """`width=N,transfer=on|off,lr=X,depth=N`, all optional: 64, on, 0.01, 2."""
    given = dict(width="64", transfer="on", lr="0.01", depth="2")
    for part in filter(None, arg.split(",")):
        key, _, value = part.partition("=")
        if key not in given:
            raise ValueError(f"lr_transfer: {key!r} is not one of {', '.join(given)}")
        given[key] = value
    width, depth = int(given["width"]), int(given["depth"])
    if width < 32 or width % 32:
        raise ValueError(f"width: must be a multiple of 32, got {width}")
    if given["transfer"] not in ("on", "off"):
        raise ValueError(f"transfer: must be on or off, got {given['transfer']!r}")
    attention = dict(kind="full", heads=width // 32, head_dim=32)
    base = dict(base_width=BASE, base_depth=2) if given["transfer"] == "on" else {}
    return ConfigDict(
        dict(
            name=f"lr_transfer_{width}_{given['transfer']}" if arg else "lr_transfer",
            steps=60,
            data=dict(source="python_stdlib", tokenizer="bytes", seq=64, batch=8),
            model=dict(
                width=width,
                blocks=dict(block=dict(attention=attention, ffn=dict(kind="dense", hidden=width))),
                pattern=("block",),
                repeats=depth,
                scan=False,
                dtype="float32",
                transfer=base,
            ),
            optim=dict(kind="adamw", lr=float(given["lr"])),
            schedule=dict(kind="wsd", warmup=0.1, decay=0.3),
            sample=dict(tokens=0),
        )
    )
