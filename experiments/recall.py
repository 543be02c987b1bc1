"""Recall over 2,048 tokens: pairs of symbols in noise, asked for at the end, under each attention.

Question: which sparse attention finds what lies further back than its window, within a budget of at
          most a quarter of the context?
Command:  sparse-pretrain train --config=experiments/recall.py:recall,moba
All arms: sparse-pretrain sweep --sweep=experiments/sweeps/recall.py
          python3 experiments/results/collect_recall.py
Tasks:    recall: 32 pairs of symbols, then 512 tokens of noise, then every key once; needle: 24
          marked pairs anywhere, then every key. A guess among the values is right in 2.4 %.
Measured: share of right answers on held-out examples, seeds 0 and 1 of recall, seed 0 of needle;
          one core with AMX each, jax 0.12; rows in experiments/results/recall.json
          arm       recall         needle  last query reads at most
          full      0.989  0.965   0.997   all 2,176 (needle, seed 1: 0.999)
          dsa       0.985  0.990   0.984   128 tokens
          csa       0.967  0.978   0.997   64 entries of 4 tokens, 16 tokens
          nsa       0.981  0.956   0.996   544 entries of 4 tokens, 272 tokens
          moba      0.976  0.937   0.966   512 tokens
          sliding   0.024  0.021   0.129   256 tokens
Why:      from trials of one seed each, on recall.
          dsa: an indexer that begins to learn on long rows finds a quarter of the answers (0.26
          after 13 steps beside dense attention; 0.99 where it learned on the short rows too).
          nsa: choosing has no gradient, so blocks are found by what the compressed entries learn
          for their own sake. Where all of a short row's blocks are chosen the entries learn
          nothing: 1.00 on short rows and 0.11 on long ones. With one free choice 0.65 with entries
          of 8 tokens and 0.98 with entries of 4.
          csa: the same with its window: 0.03 with one of 128, as long as a short example, 0.95 and
          more with 16.
          moba: a block is found by its mean key. A key that scores m among noise that scores with
          a deviation of s lifts the mean of B keys by m / (s sqrt(B)) deviations: here 31 / 5.8,
          so 1.3 at blocks of 16 (0.61 to 0.66 right), 1.9 at 8 (0.82; 0.90 at twice the width), 2.7
          at 4. Nothing in training raises it, as the gate has no gradient: small blocks do.
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
            name=f"recall_{task}_{kind}" if arg else "recall",
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
