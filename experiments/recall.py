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
INDEX = dict(index_heads=2, index_dim=64, index_rope_dim=0)
ATTENTION = {
    "full": dict(kind="full", **GROUPED),
    "sliding": dict(kind="sliding", window=256, **GROUPED),
    "moba": dict(kind="moba", block=4, top_k=128, **GROUPED),
    "nsa": dict(
        kind="nsa", span=4, stride=4, block=16, top_k=16, local=1, window=16, **GROUPED
    ),
    "dsa": dict(
        kind="dsa", heads=2, kv_rank=64, nope_dim=64, rope_dim=16, v_dim=64, top=128, **INDEX
    ),
    "csa": dict(
        kind="csa", heads=2, q_rank=64, dim=64, rope_dim=16, window=16, ratio=4, groups=1, top=64,
        **INDEX,
    ),
}  # fmt: skip
# What an arm reads while examples are short. There MoBA's budget is the row, so it is dense. NSA
# keeps one free choice: were every block chosen, nothing would teach the entries to be found by.
SHORTLY = {"nsa": dict(top_k=3), "dsa": dict(mode="warmup"), "csa": dict(mode="warmup")}
# rows of 2,048 tokens of context, 64 of questions and padding to a multiple of 128
TASKS = {
    "recall": "synthetic:recall:pairs=32,length=2048,gap=512,short=128,vocab=128,heldout=32",
    "needle": "synthetic:needle:needles=24,asked=24,length=2048,short=128,vocab=128,heldout=32",
}
SEQ, PART, ROWS = 2176, 272, 2
SHORT, LONG = 300, 60  # steps
WARM = 15  # of LONG, where there is an indexer to be taught what attention looks at


def phases(kind: str) -> dict:
    """Short examples first; an indexer sees long rows beside dense attention before it chooses."""
    step = float(SEQ * ROWS)
    short = dict(attention=dict(block=SHORTLY[kind])) if kind in SHORTLY else {}
    found = dict(short=dict(start=0.0, seq=PART, **short))
    warm = WARM if "mode" in SHORTLY.get(kind, {}) else 0
    if warm:
        found["warm"] = dict(start=SHORT * step, **short)
    return found | dict(long=dict(start=(SHORT + warm) * step))


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
            schedule=dict(kind="wsd", warmup=0.05, decay=0.4),
            phases=phases(kind),
            checkpoint=dict(every=0, keep=1),
            eval=dict(every=30, between=8 * SEQ),
        )
    )
