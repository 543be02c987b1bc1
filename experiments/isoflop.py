"""Iso-FLOP family: small byte models, dense and with experts, resized by width.

Question: what law do these models follow, and how much more compute does a dense model need for the
loss of a mixture of 16 experts, three active and one shared, of the same FLOPs per token?
Command:  sparse-pretrain isoflop --budgets=2.5e10,5.95e10,1.41e11,3.36e11,8e11 \\
            --widths=16,24,32,48,64,96 --sizes=4 --ratio=25 --least-steps=240 --fresh --workers=2 \\
            --config=experiments/isoflop.py:dense --config=experiments/isoflop.py:moe
          and again with --beyond=forecast (its forecasts.json is committed before the next), then
          with --beyond=run, which trains and scores them; --tasks=heldout:400 for accuracy;
          experiments/results/collect_isoflop.py makes isoflop.json and isoflop.svg there.
Cost:     40 runs, 1.1e13 FLOPs, 615 CPU s of steps and some 20 CPU s a run to start and compile; 53
          minutes on two cores that 20 other processes shared. The ten beyond: 2.1e13 FLOPs, 23 min.
Data:     bytes of the Python library, at most 6.3M of 9.3M; no run sees one twice.
Rule:     the intervals of at least nine of ten forecast runs, up to four times the largest budget,
          hold the measured loss; the leverage is printed with its interval beside the published
          law's value, which is an extrapolation here by seven decades.
Measured: five budgets over a factor of 32; nats per byte, N = FLOPs a token over 6, 95 % intervals
          dense  L = 1.02 [0.41, 1.20] + 129 / N^0.56 [0.19, 0.82] + 360 / D^0.50 [0.39, 0.71]
          moe    L = 0.93 [0.25, 1.18] + 129 / N^0.56 [0.20, 1.06] + 577 / D^0.52 [0.35, 0.76]
          Leverage 1.05 [0.76, 1.43] at 2.5e10 FLOPs, 1.31 [1.16, 1.54] at 1.4e11 and 1.86 [1.34,
          2.56] at 8e11, where the published law, extrapolated, says 0.77: it grows with compute.
          Forecasts, committed at 0835d56 before the runs: loss 10 of 10 inside (off by 2.8 % at
          most), memory 10 of 10, CPU seconds 9 of 10, seconds 4 of 10.
          The runs' commit is 5d72a7a, whose name was another one before a rebase.
          Accuracy on 400 continuations of held-out text, four choices: 0.28 to 0.35 in the grid,
          0.34 to 0.41 beyond; by curves fitted to the grid after the runs, 8 of 10 inside.
Learned:  below some 240 steps the loss waits at that of single bytes and then falls, which is no
          power law: six runs so short are left out of the laws, a threshold chosen by the held-out
          error of the grid's largest budgets before anything beyond it was run. Scatter about the
          laws is still 1.1 and 1.6 % of the loss. One seed: how much of it is chance is not known.
          Minutes are the machine's, not the run's: the ten ran in emptier minutes than the grid's
          large runs, and all dense ones took less than their intervals. CPU seconds are forecast
          besides for that reason; the one outside was 72 s of [75, 99].
          All ten accuracies lay above the curves: so weak a task says little of the next loss, and
          curves are read no further than a tenth of their span past their runs since.
          A process per run (--fresh): in one that stays, memory at the peak is of all its runs.
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
