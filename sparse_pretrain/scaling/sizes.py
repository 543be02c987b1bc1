"""One model in other widths: the overrides that resize a configuration, and what they cost."""

import dataclasses
from typing import Any

from sparse_pretrain import config as configs
from sparse_pretrain.model import lm
from sparse_pretrain.planning import flops

# Widths in a block that grow with the model; others stay (head_dim, experts, top_k).
WITH_WIDTH = {"hidden", "kv_rank", "q_rank", "group_rank"}
MULTIPLE = 8  # whole tiles


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the family. Units: `params` training FLOPs per token over 6, so that C = 6 N D."""

    width: int
    overrides: dict[str, Any]
    params: float
    total_params: int
    active_params: int
    tokens_per_step: int


def resize(experiment: configs.Experiment, width: int) -> dict[str, Any]:
    """The overrides that make the experiment's model `width` wide.

    Heads, feed-forward widths and latent ranks keep their proportion to the width, the width of a
    head and the depth stay.
    Errors: ValueError with both numbers when the heads of a block do not come out whole.
    """
    base = experiment.model.width
    out: dict[str, Any] = {"model.width": width}
    for name, block in experiment.model.blocks.items():
        for part in ("attention", "ffn"):
            section = getattr(block, part)
            for field in dataclasses.fields(section):
                key, value = field.name, getattr(section, field.name)
                at = f"model.blocks.{name}.{part}.{key}"
                if key in ("heads", "kv_heads") and value:
                    if value * width % base:
                        raise ValueError(
                            f"width: {width} of {base} makes {value} {key} of block {name} "
                            f"{value * width / base:g}, which is not whole"
                        )
                    out[at] = value * width // base
                elif key in WITH_WIDTH and isinstance(value, int) and value:
                    out[at] = max(MULTIPLE, round(value * width / base / MULTIPLE) * MULTIPLE)
    return out


def widths(base: configs.Experiment) -> list[int]:
    """The experiment's own width and a quarter to four times it, where its heads are whole."""
    found = []
    for factor in (1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4):
        width = round(base.model.width * factor)
        try:
            resize(base, width)
        except ValueError:
            continue
        found.append(width)
    return found


def family(where: str, widths: list[int], overrides: dict[str, Any], vocab: int) -> list[Size]:
    """The experiment `where` at each width, with `overrides` besides.

    Errors: ValueError as `resize` and `config.resolve`.
    """
    given = [f"{k}={v}" for k, v in overrides.items()]
    base = configs.resolve(where, given)
    found = []
    for width in widths:
        own = resize(base, width)
        experiment = configs.resolve(where, [*given, *(f"{k}={v}" for k, v in own.items())])
        model = dataclasses.replace(experiment.model, vocab=vocab)
        found.append(_size(experiment, model, width, own))
    return found


def _size(experiment: configs.Experiment, model: lm.Config, width: int, own: dict) -> Size:
    per_step = experiment.tokens_per_step
    work = flops.train_flops_per_token(model, experiment.data.seq, per_step)
    counts = flops.parameters(model)
    return Size(width, own, work.model / 6, counts.total, counts.active, per_step)
