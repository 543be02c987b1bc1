"""The cost model against published training runs, each predicted by a fit to all the others.

Question: how far off is `sparse-pretrain plan`, on runs whose cost was published?
Command:  python3 experiments/benchmarks/published_costs.py
Cost:     seconds.
Bars:     median error at most 20 % over at least eight runs, and DeepSeek-V3's 2.664M H800 hours
          within 15 %, each run held out.
Fitted:   two constants of planning/cost.py: the share of the peak that products reach, and how
          often a number between products crosses the memory's bus. Communication is taken as
          hidden and products as done once: what these runs' authors report of their software.
Measured: run             published   predicted  error
          LLaMA-7B           82,432      96,850  +17.5%
          LLaMA-13B         135,168     178,071  +31.7%
          LLaMA-33B         530,432     589,466  +11.1%
          LLaMA-65B       1,022,362   1,143,955  +11.9%
          Llama-2-7B        184,320     199,508   +8.2%
          Llama-2-13B       368,640     357,279   -3.1%
          Llama-2-70B     1,720,320   1,706,752   -0.8%
          Llama-3-8B      1,300,000     657,610  -49.4%
          Llama-3-70B     6,400,000   4,761,486  -25.6%
          Llama-3.1-405B 30,840,000  24,075,135  -21.9%
          DeepSeek-67B      300,600     309,270   +2.9%
          Phi-4             967,680     713,635  -26.3%
          SmolLM3-3B        221,184     265,025  +19.8%
          OLMoE-1B-7B        61,440      76,145  +23.9%
          JetMoE-8B          30,000      23,742  -20.9%
          Phi-3.5-MoE       282,624     203,875  -27.9%
          DeepSeek-V2       172,800     180,494   +4.5%
          DeepSeek-V3     2,664,000   2,688,500   +0.9%  80 %: 2.01M to 3.60M
          median 18.7 %: both bars met
Learned:  one pair of constants holds from 7B on A100 to 671B in fp8, dense and sparse; most of a
          mixture's low use of its chip is memory traffic. Eight of eighteen are off by more than
          20 %, Llama-3-8B by half: hours that were paid for and not trained in are not modelled.
          That fp8 products read half the bytes was decided with V3's error in sight: without it
          V3 is 13 % off. Moonlight, Mixtral and Qwen publish no hours.
Sources:  all hours were compared with the text of the paper or model card named beside each run
          (Phi-4's in a copy), but OLMoE's: its paper was not at hand, only a reproduction's notes
          that quote it. The 54 MWh that its authors measured (2503.05804, table 2) would be 880 W
          a chip over these hours, overheads included, so they are if anything too few. V3's bar
          rests on that run: without it V3 is +17.2 % off, which misses, and the median 17.6 %.
"""

import dataclasses
import sys
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from sparse_pretrain.attention import full, mla
from sparse_pretrain.model import block, ffn, lm
from sparse_pretrain.planning import chips, cost, work
from sparse_pretrain.routing import moe, topk

HOUR, TERA = 3600.0, 1e12
BAR, BAR_V3 = 0.20, 0.15


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run. Units: `hours` chip-hours for `tokens`; `seq` tokens a row."""

    name: str
    chip: str
    hours: float
    tokens: float
    seq: int
    model: lm.Config
    source: str
    precision: str = "bf16"


def dense(layers, width, heads, kv, hidden, vocab, tied=False, dim=128):
    """A Llama of these sizes."""
    attention = full.Config(heads=heads, kv_heads=kv, head_dim=dim, qk_norm=False)
    one = block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=hidden))
    return _model({"block": one}, (), ("block",), layers, width, vocab, tied)


def sparse(layers, width, heads, kv, experts, seats, hidden, vocab, dim=128):
    """A Mixtral of these sizes."""
    attention = full.Config(heads=heads, kv_heads=kv, head_dim=dim, qk_norm=False)
    mixture = moe.Config(
        experts=experts, top_k=seats, hidden=hidden, shared=0, router=topk.Config()
    )
    one = block.Config(attention=attention, ffn=mixture)
    return _model({"block": one}, (), ("block",), layers, width, vocab)


def latent(first, layers, width, first_hidden, experts, seats, hidden, shared, vocab):
    """A DeepSeek-V2 or V3 of these sizes."""
    attention = mla.Config(
        heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    mixture = moe.Config(
        experts=experts, top_k=seats, hidden=hidden, shared=shared, router=topk.Config()
    )
    blocks = {
        "dense": block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=first_hidden)),
        "moe": block.Config(attention=attention, ffn=mixture),
    }
    return _model(blocks, ("dense",) * first, ("moe",), layers - first, width, vocab)


def _model(blocks, prefix, pattern, repeats, width, vocab, tied=False):
    return lm.Config(
        width=width, vocab=vocab, blocks=blocks, prefix=prefix, pattern=pattern,
        repeats=repeats, tied=tied,
    )  # fmt: skip


_GITHUB, _HUB = "https://github.com/", "https://huggingface.co/"
_LLAMA1 = "2302.13971, table 15"
_LLAMA2 = _GITHUB + "meta-llama/llama/blob/main/MODEL_CARD.md"
_LLAMA3 = _GITHUB + "meta-llama/llama3/blob/main/MODEL_CARD.md"
_LLAMA31 = _GITHUB + "meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md"
_SMOL = _GITHUB + "huggingface/smollm/blob/main/text/pretraining/README.md"
_V2 = "2405.04434, section 3.2.3"
RUNS = (
    Run("LLaMA-7B", "a100", 82_432, 1.0e12, 2048, dense(32, 4096, 32, 32, 11008, 32000), _LLAMA1),
    Run("LLaMA-13B", "a100", 135_168, 1.0e12, 2048, dense(40, 5120, 40, 40, 13824, 32000),
        _LLAMA1),
    Run("LLaMA-33B", "a100", 530_432, 1.4e12, 2048, dense(60, 6656, 52, 52, 17920, 32000),
        _LLAMA1),
    Run("LLaMA-65B", "a100", 1_022_362, 1.4e12, 2048, dense(80, 8192, 64, 64, 22016, 32000),
        _LLAMA1),
    Run("Llama-2-7B", "a100", 184_320, 2.0e12, 4096, dense(32, 4096, 32, 32, 11008, 32000),
        _LLAMA2),
    Run("Llama-2-13B", "a100", 368_640, 2.0e12, 4096, dense(40, 5120, 40, 40, 13824, 32000),
        _LLAMA2),
    Run("Llama-2-70B", "a100", 1_720_320, 2.0e12, 4096, dense(80, 8192, 64, 8, 28672, 32000),
        _LLAMA2),
    Run("Llama-3-8B", "h100", 1.3e6, 15e12, 8192, dense(32, 4096, 32, 8, 14336, 128256), _LLAMA3),
    Run("Llama-3-70B", "h100", 6.4e6, 15e12, 8192, dense(80, 8192, 64, 8, 28672, 128256),
        _LLAMA3),
    Run("Llama-3.1-405B", "h100", 30.84e6, 15.6e12, 8192,
        dense(126, 16384, 128, 8, 53248, 128256), _LLAMA31 + "; tokens: 2407.21783"),
    Run("DeepSeek-67B", "h800", 300_600, 1e12, 4096, dense(95, 8192, 64, 8, 22016, 102400), _V2),
    Run("Phi-4", "h100", 1920 * 21 * 24, 9.8e12, 4096, dense(40, 5120, 40, 10, 17920, 100352),
        _HUB + "microsoft/phi-4: 1,920 H100, 21 days"),
    Run("SmolLM3-3B", "h100", 384 * 24 * 24, 11.2e12, 4096,
        dense(36, 2048, 16, 4, 11008, 128256, tied=True), _SMOL + ": 384 H100, 24 days"),
    Run("OLMoE-1B-7B", "h100", 256 * 10 * 24, 5.133e12, 4096,
        sparse(16, 2048, 16, 16, 64, 8, 1024, 50304),
        "2409.02060: 256 H100, about 10 days; second-hand"),
    # attention's own mixture of 8 x 16 heads, 2 of 8 used, has the FLOPs of 32 heads
    Run("JetMoE-8B", "h100", 30_000, 1.25e12, 4096,
        sparse(24, 2048, 32, 16, 8, 2, 5632, 32000), "2404.07413, abstract"),
    Run("Phi-3.5-MoE", "h100", 512 * 23 * 24, 4.9e12, 4096,
        sparse(32, 4096, 32, 8, 16, 2, 6400, 32064),
        _HUB + "microsoft/Phi-3.5-MoE-instruct: 512 H100, 23 days"),
    Run("DeepSeek-V2", "h800", 172_800, 1e12, 4096,
        latent(1, 60, 5120, 12288, 160, 6, 1536, 2, 102400), _V2),
    Run("DeepSeek-V3", "h800", 2_664_000, 14.8e12, 4096,
        latent(3, 61, 7168, 18432, 256, 8, 2048, 1, 129280), "2412.19437, table 1", "fp8"),
)  # fmt: skip


def hours(run: Run, found: work.Work, constants: cost.Constants) -> float:
    """Predicted chip-hours."""
    chip = chips.CHIPS[run.chip]
    spread = found.experts > 0
    each = cost.computing(found, chip, run.precision, constants, spread=spread)
    return run.tokens * sum(each) / HOUR


def fitted(runs, works) -> cost.Constants:
    """The two constants that fit these runs best; a run far off counts in proportion only."""

    def made(x) -> cost.Constants:
        return dataclasses.replace(cost.Constants(), products=np.exp(x[0]), traffic=np.exp(x[1]))

    def rest(x):
        return [np.log(hours(r, w, made(x)) / r.hours) for r, w in zip(runs, works, strict=True)]

    start = [np.log(0.5), np.log(10.0)]
    return made(least_squares(rest, start, loss="soft_l1", f_scale=0.1).x)


def table() -> tuple[list[dict[str, Any]], cost.Constants]:
    """(a row per run, predicted by a fit to the others; the constants of the fit to all)."""
    works = [work.of(r.model, lm.define(r.model), r.seq) for r in RUNS]
    rows = []
    for i, run in enumerate(RUNS):
        others = [j for j in range(len(RUNS)) if j != i]
        constants = fitted([RUNS[j] for j in others], [works[j] for j in others])
        ours = hours(run, works[i], constants)
        rows.append({"name": run.name, "chip": run.chip, "published": run.hours, "ours": ours,
                     "error": ours / run.hours - 1, "source": run.source})  # fmt: skip
    for i, row in enumerate(rows):
        logs = [abs(np.log1p(other["error"])) for j, other in enumerate(rows) if j != i]
        spread = float(np.exp(np.quantile(logs, 0.8)))
        row["low"], row["high"] = row["ours"] / spread, row["ours"] * spread
    return rows, fitted(RUNS, works)


def main() -> int:
    """Prints the table; 1 when a bar is missed."""
    rows, constants = table()
    print(f"{'run':15s} {'chip':5s} {'published':>11s} {'predicted':>11s}  error  80 % interval")
    for r in rows:
        print(
            f"{r['name']:15s} {r['chip']:5s} {r['published']:11,.0f} {r['ours']:11,.0f} "
            f"{r['error']:+6.1%}  {r['low']:,.0f} to {r['high']:,.0f}  ({r['source']})"
        )
    middle = float(np.median([abs(r["error"]) for r in rows]))
    last = next(r for r in rows if r["name"] == "DeepSeek-V3")
    print(f"median error {middle:.1%}; DeepSeek-V3 {last['error']:+.1%}")
    print(f"fit to all: products {constants.products:.3f}, traffic {constants.traffic:.2f}")
    return int(middle > BAR or abs(last["error"]) > BAR_V3)


if __name__ == "__main__":
    sys.exit(main())
