"""Released models as our configurations, from the sizes that their own config files give.

What our modules lack is counted beside the model and named: `EXTRA`.
"""

from collections.abc import Callable

from sparse_pretrain.attention import full, mla
from sparse_pretrain.model import block, ffn, lm
from sparse_pretrain.routing import moe, sigmoid_bias, topk


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


def deepseek(
    layers: int, first: int, width: int, hidden: int, expert: int, vocab: int, heads: int,
    experts: int, shared: int, top: int, q_rank: int, *, bias: bool = False,
) -> lm.Config:  # fmt: skip
    """DeepSeek's: latent attention, `first` dense layers, then experts; head sizes are V2's."""
    attention = mla.Config(
        heads=heads, q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    router = sigmoid_bias.Config() if bias else topk.Config()
    feed = moe.Config(experts=experts, top_k=top, hidden=expert, shared=shared, router=router)
    blocks = {
        "dense": block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=hidden)),
        "moe": block.Config(attention=attention, ffn=feed),
    }
    return lm.Config(
        width=width, vocab=vocab, blocks=blocks, prefix=("dense",) * first, pattern=("moe",),
        repeats=layers - first,
    )  # fmt: skip


MODELS: dict[str, Callable[[], lm.Config]] = {
    "DeepSeek-V2": lambda: deepseek(60, 1, 5120, 12288, 1536, 102400, 128, 160, 2, 6, 1536),
    "DeepSeek-V2-Lite": lambda: deepseek(27, 1, 2048, 10944, 1408, 102400, 16, 64, 2, 6, 0),
    "DeepSeek-V3": lambda: deepseek(
        61, 3, 7168, 18432, 2048, 129280, 128, 256, 1, 8, 1536, bias=True
    ),
    "Llama-3-8B": lambda: dense(32, 4096, 14336, 128256, 32, 8, 128),
    "Llama-3-70B": lambda: dense(80, 8192, 28672, 128256, 64, 8, 128),
    "Llama-3.1-405B": lambda: dense(126, 16384, 53248, 128256, 128, 8, 128),
    "Mistral-7B-v0.1": lambda: dense(32, 4096, 14336, 32000, 32, 8, 128),
    "Mixtral-8x7B": lambda: mixture(32, 4096, 14336, 32000, 32, 8, 128, 8, 2),
    "OLMoE": lambda: mixture(16, 2048, 1024, 50304, 16, 16, 128, 64, 8),
    "Qwen2.5-72B": lambda: dense(80, 8192, 29568, 152064, 64, 8, 128),
    "Qwen3-8B": lambda: dense(36, 4096, 12288, 151936, 32, 8, 128, qk_norm=True),
    "Qwen3-30B-A3B": lambda: mixture(48, 2048, 768, 151936, 32, 4, 128, 128, 8, qk_norm=True),
    "Qwen3-235B-A22B": lambda: mixture(94, 4096, 1536, 151936, 64, 4, 128, 128, 8, qk_norm=True),
}
# Parameters that our modules have no counterpart of, and what they are.
EXTRA = {
    "OLMoE": (16 * 2 * 2048, "norms of queries and keys over all heads together"),
    "Qwen2.5-72B": (80 * (8192 + 2 * 1024), "biases of queries, keys and values"),
}
