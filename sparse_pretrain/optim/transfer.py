"""The rate and the decay of every parameter of a model whose rates were tuned at another size."""

import math
from typing import Any, NamedTuple

from sparse_pretrain import nn, spec
from sparse_pretrain.model import lm
from sparse_pretrain.model.transfer import TOKENS, Rules
from sparse_pretrain.optim import groups, muon


class Factors(NamedTuple):
    """Nested dicts like the parameters: multiples of the scheduled rate and of the decay."""

    rate: Any
    decay: Any


def factors(
    optimizer: spec.Config, model: lm.Config, definition: nn.Definition, tokens: float = 0
) -> Factors | None:
    """What `model.transfer` says of each parameter under this optimizer; None when it is off.

    Units: `tokens` of the run.
    """
    config, rules = model.transfer, lm.transfer_rules(model)
    if not config.on:
        return None
    whole = (tokens / config.base_tokens) ** -TOKENS if config.base_tokens and tokens else 1.0

    def of(dims, sizes, active):
        if isinstance(dims, dict):
            pairs = {k: of(dims[k], sizes[k], active) for k in dims}
            return Factors(*({k: pair[i] for k, pair in pairs.items()} for i in (0, 1)))
        size = _orthogonal(optimizer, rules, dims, sizes.shape)
        size = rules.rate(dims) if size is None else size
        experts = math.sqrt(active) if "E" in dims[:2] and len(dims) > 2 else 1.0
        return Factors(whole * experts * size, 1.0 / size)

    parts = {}
    names = lm.layer_names(model)
    for group, dims in definition.dims.items():
        feed: Any = model.blocks[names[group]].ffn if group in names else None
        active = 1.0
        if config.base_active and feed is not None and feed.KIND == "moe":
            active = feed.top_k / feed.experts / config.base_active
        parts[group] = of(dims, definition.shapes[group], active)
    return Factors(*({g: part[i] for g, part in parts.items()} for i in (0, 1)))


def _orthogonal(optimizer: Any, rules: Rules, dims: tuple[str, ...], shape) -> float | None:
    """Muon's factor: an update's spectral norm goes as sqrt(out / in); None for Adam's.

    Source: 2310.17813, condition 1.
    """
    if optimizer.KIND != "muon" or not optimizer.orthogonal(dims):
        return None
    numbers = groups.dimension_numbers(dims, per_head=optimizer.per_head)
    rows, cols = (
        (a,) if isinstance(a, int) else tuple(a)
        for a in (numbers.reduction_axis, numbers.output_axis)
    )
    fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (rows, cols))
    more_in, more_out = rules.grown(dims, rows), rules.grown(dims, cols)

    def gain(rows: float, cols: float) -> float:
        return math.sqrt(cols / rows) / muon.scale(rows, cols, optimizer.rms)

    now, base = gain(fan_in, fan_out), gain(fan_in / more_in, fan_out / more_out)
    return now / base * rules.along_depth(dims)
