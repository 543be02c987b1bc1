"""Released models as our configurations: those that ship as experiments, others from their sizes.

What our modules lack is counted beside the model and named: `EXTRA`.
"""

from collections.abc import Callable

from sparse_pretrain import config
from sparse_pretrain.attention import full
from sparse_pretrain.model import block, ffn, lm
from sparse_pretrain.routing import moe, topk


def dense(
    layers: int, width: int, hidden: int, vocab: int, heads: int, kv: int, head_dim: int,
    *, qk_norm: bool = False, tied: bool = False,
) -> lm.Config:  # fmt: skip
    """A decoder with grouped-query attention and SwiGLU."""
    attention = full.Config(heads=heads, kv_heads=kv, head_dim=head_dim, qk_norm=qk_norm)
    part = block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=hidden))
    return lm.Config(
        width=width, vocab=vocab, blocks={"block": part}, pattern=("block",), repeats=layers,
        tied=tied,
    )  # fmt: skip


def mixture(
    layers: int, width: int, expert: int, vocab: int, heads: int, kv: int, head_dim: int,
    experts: int, top: int, *, qk_norm: bool = False,
) -> lm.Config:  # fmt: skip
    """The same with a mixture of experts in every layer."""
    attention = full.Config(heads=heads, kv_heads=kv, head_dim=head_dim, qk_norm=qk_norm)
    feed = moe.Config(experts=experts, top_k=top, hidden=expert, shared=0, router=topk.Config())
    part = block.Config(attention=attention, ffn=feed)
    return lm.Config(
        width=width, vocab=vocab, blocks={"block": part}, pattern=("block",), repeats=layers
    )


def shipped(name: str) -> lm.Config:
    """The model of an experiment that ships."""
    return config.resolve(name).model


MODELS: dict[str, Callable[[], lm.Config]] = {
    "DeepSeek-V2": lambda: shipped("deepseek/v2"),
    "DeepSeek-V2-Lite": lambda: shipped("deepseek/v2_lite"),
    "DeepSeek-V3": lambda: shipped("deepseek/v3"),
    "Llama-3-8B": lambda: dense(32, 4096, 14336, 128256, 32, 8, 128),
    "Llama-3-70B": lambda: dense(80, 8192, 28672, 128256, 64, 8, 128),
    "Llama-3.1-405B": lambda: dense(126, 16384, 53248, 128256, 128, 8, 128),
    "Mistral-7B-v0.1": lambda: dense(32, 4096, 14336, 32000, 32, 8, 128),
    "Mixtral-8x7B": lambda: shipped("mixtral_8x7b"),
    "OLMoE": lambda: shipped("olmoe_1b_7b"),
    "Qwen2.5-72B": lambda: dense(80, 8192, 29568, 152064, 64, 8, 128),
    "Qwen3-8B": lambda: dense(36, 4096, 12288, 151936, 32, 8, 128, qk_norm=True),
    "Qwen3-30B-A3B": lambda: mixture(48, 2048, 768, 151936, 32, 4, 128, 128, 8, qk_norm=True),
    "Qwen3-235B-A22B": lambda: mixture(94, 4096, 1536, 151936, 64, 4, 128, 128, 8, qk_norm=True),
}
# Parameters that our modules have no counterpart of, and what they are.
EXTRA = {
    "Qwen2.5-72B": (80 * (8192 + 2 * 1024), "biases of queries, keys and values"),
}
