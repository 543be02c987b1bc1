"""Recall over 2,048 tokens: pairs of symbols in noise, asked for at the end, under each attention.

Question: which sparse attention finds what lies further back than its window, within a budget of at
          most a quarter of the context?
Command:  sparse-pretrain train --config=experiments/recall.py:recall,moba
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/recall.py
          python3 experiments/results/collect_recall.py
"""

from ml_collections import ConfigDict

ROPE = dict(theta=1e9)  # most planes hardly turn within a row: what is sought is far away
GROUPED = dict(heads=1, head_dim=128, rope=ROPE)
ATTENTION = {
    "full": dict(kind="full", **GROUPED),
    "sliding": dict(kind="sliding", window=128, **GROUPED),
    "moba": dict(kind="moba", block=16, top_k=16, **GROUPED),
    "nsa": dict(
        kind="nsa", span=16, stride=8, block=32, top_k=8, local=2, window=64, **GROUPED
    ),
    "dsa": dict(
        kind="dsa", heads=2, kv_rank=64, nope_dim=64, rope_dim=16, v_dim=64, top=128,
        index_heads=2, index_dim=32, index_rope_dim=0,
    ),
    "csa": dict(
        kind="csa", heads=2, q_rank=64, dim=64, rope_dim=16, window=128, ratio=4, groups=1,
        top=64, index_heads=2, index_dim=32, index_rope_dim=0,
    ),
}  # fmt: skip
# rows of 2,048 tokens of context, 64 of questions and padding to a multiple of 128
TASKS = {
    "recall": "synthetic:recall:pairs=32,length=2048,gap=512,short=128,vocab=128,heldout=32",
    "needle": "synthetic:needle:needles=24,asked=24,length=2048,short=128,vocab=128,heldout=32",
}
SEQ, PART, ROWS = 2176, 272, 2
SHORT, LONG = 150, 60  # steps
WARM = 20  # of LONG, where there is an indexer to be taught what attention looks at


def phases(kind: str) -> dict:
    """Short examples first; an indexer then learns beside dense attention before it chooses."""
    step = SEQ * ROWS
    dense = dict(attention=dict(block=dict(mode="dense"))) if kind in ("dsa", "csa") else {}
    found = dict(short=dict(start=0.0, seq=PART, **dense))
    if dense:
        warm = dict(attention=dict(block=dict(mode="warmup")))
        found["warm"] = dict(start=float(SHORT * step), **warm)
        found["sparse"] = dict(start=float((SHORT + WARM) * step))
    else:
        found["long"] = dict(start=float(SHORT * step))
    return found


def get_config(arg: str = "") -> ConfigDict:
    """`TASK,ATTENTION`; recall under full attention without an argument.

    Errors: ValueError naming the tasks and the attentions.
    """
    task, _, kind = (arg or "recall,full").partition(",")
    if task not in TASKS or kind not in ATTENTION:
        raise ValueError(
            f"recall: {arg!r} is not TASK,ATTENTION with one of {', '.join(TASKS)} and one of "
            f"{', '.join(ATTENTION)}"
        )
    block = dict(attention=ATTENTION[kind], ffn=dict(kind="dense", hidden=128), conv=3)
    return ConfigDict(
        dict(
            name=f"recall_{task}_{kind}",
            tokens=(SHORT + LONG) * SEQ * ROWS,
            data=dict(source=f"{TASKS[task]},ramp={SHORT * ROWS}", seq=SEQ, batch=ROWS),
            model=dict(
                width=128, blocks=dict(block=block), pattern=("block",), repeats=2, scan=False
            ),
            optim=dict(kind="muon", lr=0.01),
            schedule=dict(kind="wsd", warmup=0.05, decay=0.2),
            phases=phases(kind),
            checkpoint=dict(every=0, keep=1),
            eval=dict(every=15, between=8 * SEQ),
        )
    )
