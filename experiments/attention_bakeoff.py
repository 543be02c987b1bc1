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
Tuning:   four rates for each arm (0.005, 0.01, 0.02, 0.04) on half the tokens and a seed of its
          own; 0.01 was the best of every arm. Nothing else was tuned.
Measured: five paired seeds, one core with AMX, other work beside it; jax 0.12, corpus
          e352458daf5cc3e0; intervals 95 %; rows in experiments/results/attention_bakeoff.json
          arm      bits/byte  less full's                past 1,024  MFLOPs  tokens/s
          nsa      2.0625     -0.0649 [-0.0817, -0.0481]     5.1933    8.75      9025
          sliding  2.1007     -0.0267 [-0.0357, -0.0177]     5.2912    7.08     19007
          csa      2.1053     -0.0221 [-0.0416, -0.0026]     5.3064    7.67      5779
          hca      2.1166     -0.0108 [-0.0203, -0.0012]     5.3378    6.97     17749
          moba     2.1175     -0.0099 [-0.0183, -0.0014]     5.3408    7.13     12393
          dsa      2.1216     -0.0058 [-0.0192, +0.0076] tie 5.3511    8.21      2799
          mla      2.1255     -0.0019 [-0.0155, +0.0118] tie 5.3622    8.75     11966
          full     2.1274                                    5.3667    8.85      8409
          Beyond position 1,024 the window is ahead of full attention by 0.0755 nats/token (7.9
          standard errors), and by as much from position 64 on, so there is no gap to recover: this
          text has no long range for this model, and the recall tasks (experiments/recall.py)
          decide. Every arm that reads less is at least level with its dense reference. nsa leads,
          but with keys and values of its own for each branch it has 2.70M parameters where full
          has 1.48M; FLOPs per token are equal.
Pilot:    with 1.2M tokens full attention was behind the window too, at rates 0.01 and 0.02, with
          bytes, with a vocabulary of 1,024 and with four layers: a softmax over more keys learns
          later. How many tokens it takes for full attention to lead is not known.
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

# Each arm's best peak rate of four (experiments/sweeps/attention_bakeoff_lr.py).
RATES = dict.fromkeys(ARMS, 0.01)


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
            optim=dict(kind="muon", lr=RATES[arg]),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            checkpoint=dict(every=0, keep=1),
            sample=dict(tokens=0),
        )
    )
