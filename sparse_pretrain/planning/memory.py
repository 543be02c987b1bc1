"""Bytes a training step holds, by kind: an estimate to read before compiling."""

from sparse_pretrain.model import lm
from sparse_pretrain.planning import flops


def training_bytes(config: lm.Config, tokens_per_step: int, *, muon: bool) -> dict[str, int]:
    """Bytes by kind on one device.

    Parameters and gradients are float32; AdamW keeps two moments, Muon one for most matrices.
    Activations are what the chosen remat policy keeps, in the compute dtype.
    """
    counts = flops.parameters(config)
    width = 4 if config.dtype == "float32" else 2
    # kept per token and layer without remat: the block's inputs, q, k, v, o, the hidden pair
    per_layer = 0
    for layer in config.layer_list:
        section = layer.ffn
        seats = 1 if section.KIND == "dense" else section.top_k + section.shared
        rows = 0 if section.KIND == "dense" else 2 * section.top_k * config.width
        per_layer += 8 * config.width + 3 * section.hidden * seats + rows
    if config.remat == "full":
        per_layer = config.width * config.layers
    parts = {
        "parameters": 4 * counts.total,
        "gradients": 4 * counts.total,
        "optimizer": (4 if muon else 8) * counts.total,
        "activations": width * per_layer * tokens_per_step,
    }
    return parts | {"total": sum(parts.values())}
