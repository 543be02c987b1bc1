"""What the indexer of a trained DSA model finds of the attention it stands in for.

Question: of the mass that dense attention gives to earlier tokens, how much is on the tokens that
          the indexer chooses, beside the best choice and the most recent tokens? And what does
          reading only those cost in bits/byte?
Command:  python3 experiments/benchmarks/indexer_mass.py --workdir=RUN
Method:   held-out rows go through the model with dense attention. In every layer, at each query
          that has more than k tokens before it, the heads' mean attention is added up over the k
          tokens of each choice. Then the same weights score the held-out text reading all tokens
          and reading the chosen ones; the interval is over batches, which are paired.
Bars:     mass at least 0.90 at k = row / 8; bits/byte at most 0.5 % up (one-sided 95 % bound).
Measured: see experiments/dsa_warmup.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track
from scipy import stats

from sparse_pretrain.attention import base, dsa
from sparse_pretrain.model import layers, lm
from sparse_pretrain.training import evaluate, run, trained

MASS_BAR, COST_BAR = 0.90, 0.005
CHOICES = ("indexer", "oracle", "recent")


def in_mode(config: lm.Config, mode: str, top: int = 0) -> lm.Config:
    """The model with its DSA layers in a mode, and with another number of tokens where given.

    Errors: ValueError when it has no such layer.
    """
    blocks = dict(config.blocks)
    for name, block in blocks.items():
        if isinstance(block.attention, dsa.Config):
            changes = {"mode": mode} | ({"top": top} if top else {})
            section = dataclasses.replace(block.attention, **changes)
            blocks[name] = dataclasses.replace(block, attention=section)
    if blocks == dict(config.blocks) and not any(
        isinstance(b.attention, dsa.Config) for b in blocks.values()
    ):
        raise ValueError("--workdir: the run's model has no block with attention.kind 'dsa'")
    return dataclasses.replace(config, blocks=blocks)


def layer_masses(layer: dsa.DSA, x, context: base.Context, top: int):
    """Mean mass over the queries with more than `top` tokens before them, [choices], and how many.

    Shapes: x [B, L, D], what the layer reads.
    """

    def row(x, segments, positions):
        one = base.Context(segments[None], positions[None])
        q, k, _ = layer.expanded(x[None], one)
        seen = base.causal_mask(one)[0]
        score = jnp.einsum("lhd,shd->hls", q[0], k[0], preferred_element_type=jnp.float32)
        score = jnp.where(seen[None], score * layer._scale, -jnp.inf)
        share = jax.nn.softmax(jnp.where(seen.any(-1)[None, :, None], score, 0.0), axis=-1)
        share = jnp.where(seen, jnp.mean(share, axis=0), 0.0)  # L x L, one row at a time
        index = layer.index(x[None], one.positions)
        chosen = layer.choose(index, one)[0]
        at = jnp.maximum(chosen, 0)
        found = jnp.sum(jnp.where(chosen >= 0, jnp.take_along_axis(share, at, axis=1), 0.0), -1)
        best = jnp.sum(jax.lax.top_k(share, top)[0], axis=-1)
        order = jnp.arange(len(segments))
        near = order[:, None] - order[None, :] < top
        recent = jnp.sum(jnp.where(near, share, 0.0), axis=-1)
        counts = (positions >= top) & (segments != 0)
        masses = jnp.stack([found, best, recent])
        return jnp.sum(jnp.where(counts[None], masses, 0.0), axis=1), jnp.sum(counts)

    masses, counts = jax.lax.map(lambda part: row(*part), (x, context.segments, context.positions))
    return jnp.sum(masses, axis=0), jnp.sum(counts)


def measure(config: lm.Config, params, prices, top: int):
    """A jitted function of a batch: (summed masses [N, choices], queries [N]) of its DSA layers."""
    definition = lm.define(in_mode(config, "sparse", top))
    reader = lm.define(in_mode(config, "dense"))

    @jax.jit
    def call(params, prices, batch):
        model, dense = definition.merge(params, prices), reader.merge(params, prices)
        context = base.Context(batch.segments, batch.positions, batch.tokens)
        x = layers.embed(lm.nn.read(model.embedding), batch.tokens).astype(lm.DTYPES[config.dtype])
        told = []

        def through(block, reading, x):
            if isinstance(block.attention, dsa.DSA):
                told.append(layer_masses(block.attention, block.norm_attention(x), context, top))
            return reading(x, context)[0]

        for i in range(len(config.prefix)):
            x = through(getattr(model, f"prefix_{i}"), getattr(dense, f"prefix_{i}"), x)
        if config.repeats:
            width = len(config.pattern)
            stacks = [getattr(m, f"stack_{i}") for m in (model, dense) for i in range(width)]

            def repeat(modules, x, n):
                del n
                for block, reading in zip(modules[:width], modules[width:], strict=True):
                    x = through(block, reading, x)
                return x, ()

            lm.nn.scan_layers(lm.nn.layers(stacks, repeat), x, scan=False)
        return [jnp.stack(part) for part in zip(*told, strict=True)]

    return lambda batch: jax.device_get(call(params, prices, batch))


def cost(config: lm.Config, params, prices, batches, domains, top: int) -> dict:
    """Bits/byte with all tokens and with the chosen ones, and the bound of the rise in percent."""
    rows = {}
    for mode in ("dense", "sparse"):
        score = evaluate.Evaluator(lm.define(in_mode(config, mode, top)), domains)
        found = [score(params, prices, [batch]) for batch in track(batches, f"scoring {mode}")]
        size = np.asarray([f["nats_per_token"] * f["tokens"] / f["bits_per_byte"] for f in found])
        rows[mode] = np.asarray([f["bits_per_byte"] for f in found]), size
    (dense, size), (sparse, _) = rows["dense"], rows["sparse"]
    before = float((dense * size).sum() / size.sum())
    rises = (sparse - dense) * size / size.mean()
    rise, n = float(rises.mean()), len(rises)
    error = float(rises.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    bound = rise + float(stats.t.ppf(0.95, n - 1)) * error if n > 1 else float("nan")
    return {
        "bits_per_byte_dense": before,
        "bits_per_byte_sparse": before + rise,
        "rise": rise / before,
        "rise_at_most": bound / before,
        "batches": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python3 experiments/benchmarks/indexer_mass.py --workdir=runs/dsa_warmup",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a run with DSA layers")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step")
    parser.add_argument("--top", type=int, default=0, help="tokens chosen; 0: an eighth of a row")
    parser.add_argument("--batches", type=int, default=8, help="of held-out rows, for the mass")
    parser.add_argument("--json", type=Path, help="append the result to this file of JSON lines")
    options = parser.parse_args()
    run.prepare_process()
    try:
        opened = trained.open_run(options.workdir, options.checkpoint)
        config = opened.experiment.model
        top = options.top or opened.experiment.data.seq // 8
        in_mode(config, "dense")
    except ValueError as e:
        sys.exit(f"error: {e}")
    data = trained.dataset(opened)
    batches = list(data.heldout())
    masses = measure(config, opened.params, opened.prices, top)
    total, queries = 0.0, 0
    for batch in track(batches[: options.batches], "attention mass"):
        found = masses(batch)
        total, queries = total + np.asarray(found[0], np.float64), queries + np.asarray(found[1])
    if not np.all(queries):
        sys.exit(f"error: --top: no held-out query has more than {top} tokens before it")
    mean = total / queries[:, None]
    print(f"attention mass on {top} tokens, {int(queries[0])} queries with more before them")
    print(f"{'layer':>5} " + " ".join(f"{name:>8}" for name in CHOICES))
    for n, row in enumerate(mean):
        print(f"{n:>5} " + " ".join(f"{value:8.3f}" for value in row))
    average = mean.mean(axis=0)
    print(f"{'mean':>5} " + " ".join(f"{value:8.3f}" for value in average))
    verdict = "met" if average[0] >= MASS_BAR else "MISSED"
    print(f"indexer at least {MASS_BAR}: {verdict}")
    paid = cost(config, opened.params, opened.prices, batches, data.domains, top)
    print("bits/byte, all tokens {bits_per_byte_dense:.4f}, chosen ones "
          "{bits_per_byte_sparse:.4f}".format(**paid))
    verdict = "met" if paid["rise_at_most"] <= COST_BAR else "MISSED"
    print(f"rise {paid['rise']:+.3%}, at most {paid['rise_at_most']:+.3%} (95 %), bar "
          f"{COST_BAR:.1%}: {verdict}")
    if options.json:
        record = {
            "workdir": options.workdir.name, "step": opened.step, "top": top,
            "mass": dict(zip(CHOICES, average.tolist(), strict=True)), "layers": mean.tolist(),
            "queries": int(queries[0]), "commit": opened.record.get("commit"), **paid,
        }
        with options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
