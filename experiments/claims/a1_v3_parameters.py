"""A1: The tensors of DeepSeek-V3's released weights, by dtype.

Source: 2412.19437; metadata of the released safetensors.
Published: BF16 3,918,786,560; F8_E4M3 680,571,043,840; F32 41,555,600; total 684,531,386,000.
Kind: EXACT.
Tested: our abstract model of V3, its matrices taken to FP8 with a float32 scale for each block of
    128 x 128, and one MTP layer: a mixture layer with an embedding, a head, a projection of two
    widths and three norms of its own.
Criterion: all four equal.
Cost: a second.
Result: PASS at d4dca4e: BF16 3,918,786,560; F8_E4M3 680,571,043,840; F32 41,555,600; total
    684,531,386,000.
"""

import math

import jax

from sparse_pretrain.claims import base, models
from sparse_pretrain.model import lm
from sparse_pretrain.planning import flops

PUBLISHED = {
    "BF16": 3_918_786_560,
    "F8_E4M3": 680_571_043_840,
    "F32": 41_555_600,
    "total": 684_531_386_000,
}
BLOCK = 128
WIDTH, VOCAB = 7168, 129_280
# how many dims of ours are a product's input: ("D", "H", "Dh") is [in, out], ("H", "Dv", "D") not
OUT = ("D",)


def tally(layer, dims, repeats):
    """(numbers in bfloat16, in FP8, scales) of a layer whose arrays lead with `repeats` layers."""
    plain = low = scales = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
        names = dims
        for key in path:
            names = names[key.key]
        shape = leaf.shape[1:] if names[0] == "N" else leaf.shape
        names = tuple(n for n in names if n != "N")
        size = repeats * math.prod(shape)
        if len(shape) == 1 or names[-1] == "E":  # norms, the gate
            plain += size
            continue
        many = shape[0] if names[0] == "E" else 1
        shape, names = (shape[1:], names[1:]) if names[0] == "E" else (shape, names)
        cut = len(shape) - 1 if names[-1:] == OUT else 1
        sides = math.prod(shape[:cut]), math.prod(shape[cut:])
        low += size
        scales += repeats * many * math.prod(-(-side // BLOCK) for side in sides)
    return plain, low, scales


def measure(bench):
    """Numbers by dtype."""
    del bench
    config = models.MODELS["DeepSeek-V3"]()
    definition = lm.define(config)
    shapes, dims = definition.shapes, definition.dims
    mixtures = config.repeats + 1  # the MTP layer is one more
    parts = [tally(shapes[f"prefix_{i}"], dims[f"prefix_{i}"], 1) for i in range(3)]
    parts.append(tally(shapes["stack_0"], dims["stack_0"], mixtures))
    plain, low, scales = (sum(column) for column in zip(*parts, strict=True))
    # two embeddings, two heads, the last norm; of MTP two norms, its head's norm, its projection
    plain += 4 * VOCAB * WIDTH + WIDTH + 3 * WIDTH + 2 * WIDTH * WIDTH
    biases = mixtures * 256
    found = {"BF16": plain, "F8_E4M3": low, "F32": scales + biases}
    found["total"] = sum(found.values())
    counts = flops.parameters(config)
    routers = config.repeats * 256  # biases are prices here and no parameters
    return base.Outcome(
        passed=found == PUBLISHED,
        measured=f"BF16 {plain:,}; F8_E4M3 {low:,}; F32 {scales + biases:,}; "
        f"total {found['total']:,}",
        numbers={
            "block scales": scales,
            "router biases": biases,
            "main model": counts.total + routers,
            "active, both embeddings": counts.active_with_embedding + routers,
            "active, one embedding": counts.active + routers,
        },
        analysis="The repository's 36.7B active 'including embedding and head' is reached with one "
        "of the two only.",
    )
