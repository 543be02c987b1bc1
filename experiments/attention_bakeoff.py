"""Attention bake-off: one small model at length 2,048, under every attention.

Question: of what full attention gains over a sliding window beyond position 1,024, how much does a
sparse attention recover when it reads a quarter of the context?
Command:  sparse-pretrain train --config=experiments/attention_bakeoff.py:full
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/attention_bakeoff_lr.py
          python3 experiments/results/collect_attention.py runs/attention_bakeoff_lr
          sparse-pretrain sweep --sweep=experiments/sweeps/attention_bakeoff.py
          python3 experiments/results/collect_attention.py
Rule:     where full attention beats the window of the same budget beyond position 1,024 by more
          than three standard errors, an arm should recover at least 80 % of that gap; where it does
          not, this text has no long range for this model, and the recall tasks decide.
Budget:   at the last position an arm reads at most 512 keys of 2,048 (`touched`), counted as the
          entries, chosen tokens and window tokens that enter its softmaxes; a token in two branches
          counts twice. `full` and `mla` read all and are the references: grouped heads for the
          arms with full attention's projections, latents for dsa. What only chooses (the mean keys
          of moba, the indexers of dsa and csa) is no key; it is in the FLOPs per token.
Data:     38 % of the held-out targets (70,839 of 187,282) stand beyond position 1,024 in their
          document's piece of a row, 40 % in training; no token is seen twice.
Cost:     a run is 0.8M tokens (196 steps): 40 s on one core for sliding, 80 to 100 s for most, and
          180 to 300 s for dsa, whose indexer sorts 2,048 scores for every token on a CPU.
Pilot:    one seed, on two AMX cores, at ba5d779; two layers, rate 0.02, 1.2M tokens
          tokens        full bits/byte  sliding  past 1,024, nats/token: full  sliding
          bpe:4096      2.0001          1.9714   5.030                         4.968
          at rate 0.01  2.0020          1.9791   5.042                         4.987
          bytes         2.9164          2.7237   1.981                         1.846
          bpe:1024, one row a step: 2.2263 and 2.1794. Four layers, 0.6M tokens: 2.1795 and 2.1627.
          Full attention is behind the window everywhere: the loss hardly falls with the position,
          and a softmax over more keys learns later. Expect the rule to find no long range here.
Tuning:   three learning rates for each arm on half the tokens and a seed of its own; nothing else.
"""

from ml_collections import ConfigDict

SEQ, BUDGET = 2048, 512

# Heads of the arms with grouped projections, and of those with latents.
GROUPED = dict(heads=2, head_dim=64)
LATENT = dict(heads=2, q_rank=64, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64)
SHARED = dict(heads=2, q_rank=64, dim=64, rope_dim=32, groups=2, group_rank=64)

ARMS = {
    "full": dict(kind="full", **GROUPED),
    # no sinks: it differs from `full` in what it sees and in nothing else
    "sliding": dict(kind="sliding", window=512, sinks=False, **GROUPED),
    "moba": dict(kind="moba", block=64, top_k=8, **GROUPED),
    "nsa": dict(kind="nsa", span=32, stride=16, block=32, top_k=6, local=1, window=192, **GROUPED),
    "mla": dict(kind="mla", **LATENT),
    "dsa": dict(kind="dsa", top=512, index_heads=2, index_dim=32, **LATENT),
    "csa": dict(
        kind="csa",
        window=256,
        ratio=4,
        top=256,
        index_heads=2,
        index_dim=32,
        index_rope_dim=16,
        **SHARED,
    ),
    "hca": dict(kind="hca", window=384, ratio=16, **SHARED),
}

# Each arm's best peak rate (experiments/sweeps/attention_bakeoff_lr.py); 0.02 where untuned.
RATES = {}


def touched(kind: str, settings: dict, length: int) -> int:
    """Keys that the last of `length` tokens reads at most: entries, chosen and window tokens."""
    s = settings
    window = min(s.get("window", 0), length)
    match kind:
        case "full" | "mla":
            return length
        case "sliding":
            return window
        case "moba":
            return min(s["block"] * s["top_k"], length)
        case "nsa":
            entries = max((length - s["span"]) // s["stride"] + 1, 0)
            return entries + min(s["block"] * s["top_k"], length) + window
        case "dsa":
            return min(s["top"], length)
        case "csa":
            return window + min(s["top"], length // s["ratio"])
        case "hca":
            return window + length // s["ratio"]
    raise ValueError(f"attention_bakeoff: how many keys {kind!r} reads is not known")


def get_config(arg: str = "") -> ConfigDict:
    """The model under the attention of this name, full without one.

    Errors: ValueError naming the arms.
    """
    name = f"attention_bakeoff_{arg}" if arg else "attention_bakeoff"
    arg = arg or "full"
    if arg not in ARMS:
        raise ValueError(f"attention_bakeoff: {arg!r} is not one of {', '.join(ARMS)}")
    section = ARMS[arg]
    reads = touched(section["kind"], section, SEQ)
    assert reads <= BUDGET or arg in ("full", "mla"), f"{arg}: reads {reads} keys of {BUDGET}"
    return ConfigDict(
        dict(
            name=name,
            tokens=800_000,
            data=dict(source="python_stdlib", tokenizer="bpe:4096", seq=SEQ, batch=2),
            model=dict(
                width=128,
                blocks=dict(dense=dict(attention=section, ffn=dict(kind="dense", hidden=384))),
                pattern=("dense",),
                repeats=2,  # at equal seconds twice the tokens beat twice the layers
                scan=False,
            ),
            optim=dict(kind="muon", lr=RATES.get(arg, 0.02)),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=0, keep=1),
            sample=dict(tokens=0),
        )
    )
