"""Quickstart: a small mixture of experts with latent attention, on the Python library's text.

Question: does a sparse model beat a dense one of the same active FLOPs within minutes on a CPU?
Command:  sparse-pretrain train
Cost:     1.5M tokens, 4.0e13 FLOPs, about 140 s of training on two cores with AMX.
Expected: fewer held-out bits/byte than experiments/dense_baseline.py at no less than 0.8 of its
          tokens/s.
Measured: jax 0.12.0.1, two shared cores, corpus e352458daf5cc3e0; experiments/results holds commits
          seed  quickstart  dense    difference  tokens/s ratio
          0     1.7795      1.7856   -0.0061   1.63  (dense disturbed by another job)
          1     1.7831      1.7887   -0.0056   0.80
          2     1.7814      1.7896   -0.0082   0.81
          3     1.7764      1.7784   -0.0020   0.83
          4     1.7726      1.7831   -0.0105   0.79
          mean difference -0.0065 bits/byte, 95 % interval [-0.0104, -0.0026], 5 paired seeds;
          tokens/s ratio 0.79 to 0.83, median 0.81, arms run in turn.
Tuning:   rates 0.007, 0.014, 0.028 and then, since the lowest was best, 0.0035 for each arm on a
          seed of its own: 0.007 is best for both (quickstart_lr.json). The quickstart's 0.0035 ran
          with the router at a tenth of the rate, its other three without. It had three trials more
          than the baseline: the router at a tenth (MaxVio 0.4 to 0.2, 1.7831 to 1.7843, kept for
          speed), scale 2 (1.7939) and scale 3 (1.8004, without the tenth); scale 1 is kept. An
          earlier grid of 0.005 to 0.04 was stopped before any of its runs ended.
Timing:   the runs had real-time priority on a machine with other work; read the ratios.
Learned:  the gain is small here, about a third of a percent; growth with tokens is untried.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart; it takes no argument."""
    if arg:
        raise ValueError(f"quickstart: takes no argument, got {arg!r}")
    attention = dict(kind="mla", heads=4, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64)
    router = dict(kind="sigmoid_bias", rate=0.01, balance=1e-4)
    moe = dict(kind="moe", experts=16, top_k=3, hidden=192, shared=1, router=router)
    dense = dict(kind="dense", hidden=768)
    return ConfigDict(
        dict(
            name="quickstart",
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
                scan=False,  # unrolled, four layers run a fifth faster on CPU
            ),
            optim=dict(kind="muon", lr=0.01, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=50),
        )
    )
