"""Quickstart: a small mixture of experts with latent attention, on the Python library's text.

Question: does a sparse model beat a dense one of the same active FLOPs within minutes on a CPU?
Command:  sparse-pretrain train
Cost:     1.5M tokens, 4.0e13 FLOPs, about 140 s of training on two cores, 540 on two slow ones
          (Xeon without AMX, 1.7754 bits/byte, at 58663a7).
Expected: fewer held-out bits/byte than experiments/dense_baseline.py at no less than 0.8 of its
          tokens/s.
Measured: jax 0.12.0.1, two Zen 5 cores (AVX-512, no AMX), corpus e352458daf5cc3e0, at c4a8edc
          seed  quickstart  dense    difference  tokens/s ratio
          0     1.7775      1.7857   -0.0082     0.74
          1     1.7818      1.7889   -0.0071     0.71
          2     1.7825      1.7892   -0.0067     0.77
          3     1.7726      1.7787   -0.0061     0.74
          4     1.7725      1.7827   -0.0102     0.80
          mean difference -0.0077 bits/byte, 95 % interval [-0.0097, -0.0057], 5 paired seeds: met.
          tokens/s ratio 0.71 to 0.80, median 0.74: MISSED. On an idle machine, steps of both arms
          in turn: 0.73. A first comparison on two cores with AMX, both arms at 0.007, had -0.0065
          [-0.0104, -0.0026] at 0.79 to 0.83 (quickstart_vs_dense_first.json).
Tuning:   eight trials for each arm on a seed of their own (quickstart_lr.json): rates 0.0035,
          0.005, 0.007, 0.01 and 0.014 for both. 0.01 is best for the quickstart and 0.007 for the
          baseline, both inside the grid. The baseline had 0.006, 0.0085 and 0.012 besides, the
          quickstart the router at a tenth of the rate (kept) and scales 2 and 3 (not kept), which
          were run before (quickstart_tuning_first.json).
Speed:    since then uneven loads are multiplied in wide blocks: 0.79 [0.77, 0.80] at this size; at
          32,768 tokens a step 0.87 on two Zen cores and 0.70 on two Xeon cores without AMX
          (experiments/benchmarks/moe_speed.py).
          Above the baseline's step are Muon on the experts, padding, passes over 30,720 rows.
Learned:  the gain is small here, 0.4 percent; growth with tokens is untried.
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
                # tuned at this size, where it changes nothing; other sizes get rates of their own
                transfer=dict(base_width=256, base_depth=4, base_active=3 / 16),
            ),
            optim=dict(kind="muon", lr=0.01, router_lr=0.1),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=46),
            eval=dict(every=46, between=16384),  # four points, for two seconds
        )
    )
