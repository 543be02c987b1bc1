"""DSA on the Python library's text: dense attention, a warm-up of the indexer alone, then sparse.

Question: does a short warm-up on a trained dense model teach the indexer where attention looks, and
          what does reading only an eighth of the row then cost?
Command:  sparse-pretrain train --config=experiments/dsa_warmup.py --workdir=runs/dsa_warmup
Then:     python3 experiments/benchmarks/indexer_mass.py --workdir=runs/dsa_warmup
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/dsa_warmup.py
          then experiments/results/collect_dsa_warmup.py, which says how
Arms:     `sparse` as above; `dense` goes on with dense attention after the same warm-up, on the
          same tokens in the same order; `warmup` ends with the warm-up.
Measured: five paired seeds, one core with AMX, jax 0.12, corpus e352458daf5cc3e0; rows in
          experiments/results/dsa_warmup.json
          bits/byte at the end, sparse against dense: 2.1801 2.1763, 2.1805 2.1776, 2.1826 2.1784,
          2.1987 2.1951, 2.1943 2.1908: +0.165 %, at most +0.187 % (one-sided 95 %), bar 0.5 %: met.
          The same weights reading all tokens and only the chosen ones: -0.04 to +0.10 %.
          Mass of the dense attention on 256 of up to 2,048 tokens, mean of two layers, five seeds:
          indexer 0.458 (0.444 to 0.471), the best choice 0.600 (0.585 to 0.612), the most recent
          tokens 0.373 (0.362 to 0.392). Bar 0.90: MISSED. No choice of 256 tokens could meet it:
          after half a million tokens of text attention is still spread over the whole row. Where
          it is sharp, in the recall model of seed 0 (experiments/recall.py:recall,dsa; 272 tokens),
          the indexer finds 0.786 of 0.958, the most recent tokens 0.311.
          By layer, means of five seeds: the first layer's best choice holds 0.502 of its mass, the
          indexer's 0.364, the most recent tokens 0.338; the second's 0.698, 0.551 and 0.408. Mass
          spread evenly over one document would give any choice 0.297 (the mean of 256 / t over t
          from 257 to 2,048):
          the first layer hardly looks anywhere in particular, and an indexer, which learns from
          where attention looks, finds little more there than lies near. So it finds 0.76 of what
          there is to be found, and even the best choice in the sharper layer falls 0.20 short.
          What a longer warm-up finds in the recall model is not known.
          Next: a longer warm-up, at a higher rate, on a model trained for longer.
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
