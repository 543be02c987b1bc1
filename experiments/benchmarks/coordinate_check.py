"""Coordinate check: does the size of what a model computes depend on its width while it trains?

Command:  python3 experiments/benchmarks/coordinate_check.py [--steps=10] [--lr=0.01] [--seeds=3]
          --out=experiments/results/coordinate_check.json; writes a plot beside it.
Method:   experiments/lr_transfer.py's model at widths 64 to 512, AdamW at one rate, on random
          tokens. After every step the root mean square of the residual stream after the embedding
          and each layer, and of the logits, on one batch. A slope is that of log2 size against
          log2 width, means over seeds. The largest of any place after the last step counts: before
          the first, logits shrink as width^-0.5 in both arms, since the head starts at 1 / width.
Expected: below 0.1 with model.transfer on, larger off (2203.03466, figure 5).
Measured: --seeds=2 --steps=8 (experiments/results/coordinate_check.json), slopes after the last
          step of embedding, layer 1, layer 2, logits
          on   +0.003 +0.013 +0.058 -0.086   largest 0.086: met
          off  +0.007 +1.346 +1.313 +0.489   largest 1.346
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cpu_peers import commit

from sparse_pretrain import config, optim, shapes
from sparse_pretrain.attention import base
from sparse_pretrain.model import lm
from sparse_pretrain.training import loss

WIDTHS = (64, 128, 256, 512)
VOCAB, ROWS, LENGTH = 128, 4, 32
EXPERIMENT = Path(__file__).parents[1] / "lr_transfer.py"


def batch(seed: int) -> shapes.Batch:
    """Random tokens: nothing to learn but each token's own next."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    at = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    weights = ones.astype(np.float32)
    return shapes.Batch(tokens[:, :-1], tokens[:, 1:], ones, at, weights, ones, ones * 0)


def sizes(width: int, transfer: str, *, lr: float, steps: int, seeds: int, kind: str = "adamw"):
    """Root mean squares [seeds, steps + 1, places]: embedding, after each layer, logits."""
    experiment = config.resolve(
        f"{EXPERIMENT}:width={width},transfer={transfer}",
        [f"optim.kind={kind}", f"model.vocab={VOCAB}"],
    )
    # every layer by its own name, so that what is between them can be read
    model = experiment.model
    model = dataclasses.replace(model, prefix=("block",) * model.layers, repeats=0)
    definition = lm.define(model)
    rule = dataclasses.replace(experiment.optim, lr=lr)
    factors = optim.factors(rule, model, definition)
    build = optim.TABLE[kind].build
    tx = build(rule, definition.dims, lambda n: jnp.float32(lr), factors)

    def read(params, seen):
        made = definition.merge(params, {})
        context = base.Context(seen.segments, seen.positions, seen.tokens)
        x = params["embedding"][seen.tokens]
        found = [x]
        for i in range(model.layers):
            x = getattr(made, f"prefix_{i}")(x, context)[0]
            found.append(x)
        found.append(jnp.einsum("bld,dv->blv", made.norm(x), made.head_weight()[0]))
        return jnp.stack([jnp.sqrt(jnp.mean(jnp.square(f))) for f in found])

    @jax.jit
    def course(key, seen):
        params, _ = definition.init(key)

        def body(carry, _):
            params, opt = carry
            weight = jnp.float32(ROWS * LENGTH)
            share = lambda p: loss.loss_sums(definition, p, {}, seen, weight, 1)[0]  # noqa: E731
            updates, opt = tx.update(jax.grad(share)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), read(params, seen)

        (params, _), told = jax.lax.scan(body, (params, tx.init(params)), length=steps)
        return jnp.concatenate([told, read(params, seen)[None]])

    return np.stack([course(jax.random.key(s), batch(s)) for s in range(seeds)])


def slopes(found: dict[int, np.ndarray]) -> np.ndarray:
    """d log2 size / d log2 width, [steps + 1, places], of the means over seeds."""
    widths = sorted(found)
    logs = np.stack([np.log2(found[w]).mean(0) for w in widths])
    return np.polyfit(np.log2(widths), logs.reshape(len(widths), -1), 1)[0].reshape(logs.shape[1:])


def plot(arms: dict[str, dict[int, np.ndarray]], path: Path) -> None:
    """Size against width at the last step, a panel per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True)
    for axes, (arm, found) in zip(panels, arms.items(), strict=True):
        widths, places = sorted(found), next(iter(found.values())).shape[-1]
        for i in range(places):
            layers = "embedding" if i == 0 else "logits" if i == places - 1 else f"layer {i}"
            axes.plot(widths, [found[w][:, -1, i].mean() for w in widths], "o-", label=layers)
        axes.set(xscale="log", yscale="log", title=f"transfer {arm}", xlabel="width")
        axes.set_xticks(widths, [str(w) for w in widths], minor=False)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("root mean square after the last step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Both arms, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optim", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--out", type=Path, default=Path("coordinate_check.json"))
    args = parser.parse_args()
    widths = [int(w) for w in args.widths.split(",")]
    kwargs = dict(lr=args.lr, steps=args.steps, seeds=args.seeds, kind=args.optim)
    arms = {arm: {w: sizes(w, arm, **kwargs) for w in widths} for arm in ("on", "off")}
    record: dict = {"commit": commit(), "widths": widths, **kwargs}
    for arm, found in arms.items():
        slope = slopes(found)
        largest = float(np.abs(slope[-1]).max())
        record[arm] = {"largest_slope": largest, "slopes": slope.round(4).tolist()}
        last = ", ".join(f"{s:+.3f}" for s in slope[-1])
        print(f"transfer {arm}: largest slope {largest:.3f} after the last step, of {last}")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(arms, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
