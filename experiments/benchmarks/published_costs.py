"""The cost model against published training runs, each predicted by a fit to all the others.

Question: how far off is `sparse-pretrain plan`, on runs whose cost was published?
Command:  python3 experiments/benchmarks/published_costs.py
Cost:     seconds.
Bars:     median error at most 20 % over at least eight runs, and DeepSeek-V3's 2.664M H800 hours
          within 15 %, each run held out.
Fitted:   two constants of planning/cost.py: the share of the peak that products reach, and how
          often a number between products crosses the memory's bus. Communication is taken as
          hidden and products as done once: what these runs' authors report of their software.
Measured: run               published   predicted  error
          LLaMA-7B             82,432      97,834  +18.7%
          LLaMA-13B           135,168     181,682  +34.4%
          LLaMA-33B           530,432     607,914  +14.6%
          LLaMA-65B         1,022,362   1,187,219  +16.1%
          Llama-2-7B          184,320     201,416   +9.3%
          Llama-2-13B         368,640     364,521   -1.1%
          Llama-2-70B       1,720,320   1,791,561   +4.1%
          Llama-3-8B        1,300,000     645,655  -50.3%
          Llama-3-70B       6,400,000   4,799,324  -25.0%
          Llama-3.1-405B   30,840,000  24,992,775  -19.0%
          DeepSeek-67B        300,600     311,674   +3.7%
          Phi-4               967,680     705,376  -27.1%
          SmolLM3-3B          221,184     243,926  +10.3%
          OLMoE-1B-7B          61,440      64,274   +4.6%
          JetMoE-8B            30,000      22,825  -23.9%
          Phi-3.5-MoE         282,624     198,780  -29.7%
          DeepSeek-V2         172,800     167,556   -3.0%
          Granite-3.0-2B      192,030     233,385  +21.5%
          Granite-3.0-8B      832,102     553,755  -33.5%
          Granite-1B-A400M     71,171      77,548   +9.0%
          Granite-3B-A800M    133,308     143,586   +7.7%
          OLMo-2-1B            26,752      35,801  +33.8%
          dots.llm1         1,456,000   1,164,604  -20.0%
          DeepSeek-V3       2,664,000   2,485,272   -6.7%  80 %: 1.85M to 3.33M
          median 17.4 %: both bars met
Learned:  one pair of constants holds from 0.4B active on H100 to 671B in fp8, dense and sparse;
          most of a mixture's low use of its chip is memory traffic. Ten of twenty-four are off by
          more than 20 %, Llama-3-8B by half: hours that were paid for and not trained in are not
          modelled, nor that one team's software is better than another's. That fp8 products read
          half the bytes was decided with V3's error in sight: without it V3 is +8.2 % off.
          Moonlight, Mixtral and Qwen publish no hours; Llama 4 does, and not its precision.
Sources:  hours are those of the paper or model card named beside each run, compared with its text
          (Phi-4's and OLMoE's in a copy). The last six before V3 were added after the other
          eighteen: all runs with hours of their authors' own that an hour's search found, chosen
          before any of them was predicted. With eighteen V3 was +0.9 % off, and +17.2 % without
          OLMoE, whose hours were second-hand then; now it lies between -7.8 and -5.4 % whichever
          run is left out beside it.
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


def sparse(
    layers, width, heads, kv, experts, seats, hidden, vocab, dim=128, *, shared=0, first=0,
    tied=False,
):  # fmt: skip
    """A Mixtral of these sizes; `first` is the hidden width of a dense first layer, if it has one.
    """
    attention = full.Config(heads=heads, kv_heads=kv, head_dim=dim, qk_norm=False)
    mixture = moe.Config(
        experts=experts, top_k=seats, hidden=hidden, shared=shared, router=topk.Config()
    )
    blocks = {"moe": block.Config(attention=attention, ffn=mixture)}
    prefix = ()
    if first:
        blocks["dense"] = block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=first))
        prefix = ("dense",)
    return _model(blocks, prefix, ("moe",), layers - len(prefix), width, vocab, tied)


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
_GRANITE = _GITHUB + "ibm-granite/granite-3.0-language-models/blob/main/paper.pdf: tables 1 and 7"
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
        "2409.02060, appendix B: 256 H100, approximately 10 days"),
    # attention's own mixture of 8 x 16 heads, 2 of 8 used, has the FLOPs of 32 heads
    Run("JetMoE-8B", "h100", 30_000, 1.25e12, 4096,
        sparse(24, 2048, 32, 16, 8, 2, 5632, 32000), "2404.07413, abstract"),
    Run("Phi-3.5-MoE", "h100", 512 * 23 * 24, 4.9e12, 4096,
        sparse(32, 4096, 32, 8, 16, 2, 6400, 32064),
        _HUB + "microsoft/Phi-3.5-MoE-instruct: 512 H100, 23 days"),
    Run("DeepSeek-V2", "h800", 172_800, 1e12, 4096,
        latent(1, 60, 5120, 12288, 160, 6, 1536, 2, 102400), _V2),
    Run("Granite-3.0-2B", "h100", 192_030, 12e12, 4096,
        dense(40, 2048, 32, 8, 8192, 49155, tied=True, dim=64), _GRANITE),
    Run("Granite-3.0-8B", "h100", 832_102, 12e12, 4096,
        dense(40, 4096, 32, 8, 12800, 49155, tied=True), _GRANITE),
    Run("Granite-1B-A400M", "h100", 71_171, 10e12, 4096,
        sparse(24, 1024, 16, 8, 32, 8, 512, 49155, 64, tied=True), _GRANITE),
    Run("Granite-3B-A800M", "h100", 133_308, 10e12, 4096,
        sparse(32, 1536, 24, 8, 40, 8, 512, 49155, 64, tied=True), _GRANITE),
    Run("OLMo-2-1B", "h100", 128 * (8 * 24 + 17), 4e12, 4096,
        dense(16, 2048, 16, 16, 8192, 100352),
        _GITHUB + "allenai/OLMo/issues/861: 128 H100, 8 days and 17 hours"),
    Run("dots.llm1", "h800", 1_456_000, 11.2e12, 8192,
        sparse(62, 4096, 32, 32, 128, 6, 1408, 152064, shared=2, first=10944),
        "2506.05767, tables 4 and 6; the chip is that of its table 1"),
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
    print(f"{'run':16s} {'chip':5s} {'published':>11s} {'predicted':>11s}  error  80 % interval")
    for r in rows:
        print(
            f"{r['name']:16s} {r['chip']:5s} {r['published']:11,.0f} {r['ours']:11,.0f} "
            f"{r['error']:+6.1%}  {r['low']:,.0f} to {r['high']:,.0f}  ({r['source']})"
        )
    middle = float(np.median([abs(r["error"]) for r in rows]))
    last = next(r for r in rows if r["name"] == "DeepSeek-V3")
    print(f"median error {middle:.1%}; DeepSeek-V3 {last['error']:+.1%}")
    print(f"fit to all: products {constants.products:.3f}, traffic {constants.traffic:.2f}")
    return int(middle > BAR or abs(last["error"]) > BAR_V3)


if __name__ == "__main__":
    sys.exit(main())
