"""Hyper-parameter transfer: rates and initial sizes tuned on a small model, carried to this one.

Everything is a factor on how a parameter starts and how fast it moves, read from its dimension
names; the forward pass stays as it is but for a tied head. A multiplier in front of a product is
the same to Adam and Muon as that multiplier on the matrix's start and on its rate.
"""

import dataclasses
from collections.abc import Iterable

from sparse_pretrain import shapes, spec

TOKENS = 0.32  # the best rate falls as tokens to this power: 2409.19913


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """The sizes that the rates were tuned at; 0 leaves a dimension out, and all 0 is off.

    `grows` are the dims that grow with the width; heads grow in number, not in width. A mixture's
    `base_active` is top_k over experts.
    Units: `base_width` and `base_depth` of a model, `base_tokens` of a run.
    Source: 2203.03466, table 8 (width); 2505.01618, table 1 with alpha 1 (depth); 2409.19913
        (tokens); 2205.10287, the square root of the batch, here of the tokens that an expert sees.
    Differs: Adam's eps is not scaled; weight decay is divided by the factor of width and depth, so
        that rate x decay stays.
    """

    base_width: int = 0
    base_depth: int = 0
    base_tokens: float = 0.0
    base_active: float = 0.0
    grows: tuple[str, ...] = ("D", "2D", "RD", "F", "H", "K")

    def __post_init__(self):
        spec.at_most(self, 2**24, "base_width", "base_depth")
        for name in ("base_width", "base_depth", "base_tokens"):
            value = getattr(self, name)
            spec.require(value >= 0, f"{name}: must not be negative, got {value}")
        ok = 0 <= self.base_active <= 1
        spec.require(ok, f"base_active: must be 0 to 1, got {self.base_active}")
        spec.require("D" in self.grows, f"grows: must hold 'D', the width; got {self.grows}")

    @property
    def on(self) -> bool:
        """Whether anything is carried over."""
        return any((self.base_width, self.base_depth, self.base_tokens, self.base_active))


@dataclasses.dataclass(frozen=True)
class Rules:
    """The factors of one model: `width` and `depth` are its own over the base's."""

    config: Config
    width: float
    depth: float
    tied: bool

    def start(self, dims: tuple[str, ...]) -> float:
        """What a parameter's initial deviation is multiplied with, against the model's default.

        That default already shrinks with fan-in, and as depth^-0.5 where a layer ends.
        """
        kind = _kind(dims)
        if kind == "embed":  # tied, it is multiplied with like a head but must not shrink
            return self.width**0.5 if self.tied else 1.0
        if kind == "router":
            return self.width**-0.5
        return self.depth**-0.5 if kind == "out" else 1.0

    def rate(self, dims: tuple[str, ...]) -> float:
        """What Adam's rate is multiplied with."""
        kind = _kind(dims)
        if kind in ("embed", "rows", "vector"):
            return 1.0
        lead = len(dims) - len(shapes.copy_dims(dims))
        reads = range(lead, lead + _reads(dims))
        return self.along_depth(dims) / self.grown(dims, reads)

    def along_depth(self, dims: tuple[str, ...]) -> float:
        """The depth's part of any rule's rate: a layer's last product adds 1 / depth."""
        return 1.0 / self.depth if _kind(dims) == "out" else 1.0

    def grown(self, dims: tuple[str, ...], part: Iterable[int]) -> float:
        """By how much the product of the sizes of these dims, given by number, grew.

        A hidden width that no side of the matrix is the model's width of, as in NSA's compression,
        is fixed.
        """
        fixed = set() if "D" in dims else {"F"}
        grows = set(self.config.grows) - fixed
        return self.width if any(dims[i] in grows for i in part) else 1.0

    @property
    def head_gain(self) -> float:
        """What a tied head's logits are multiplied with."""
        return 1.0 / self.width if self.tied else 1.0


def rules(config: Config, *, width: int, depth: int, tied: bool) -> Rules:
    """The factors of a model of this width and depth; all exactly 1 at the base's."""
    wide = width / config.base_width if config.base_width else 1.0
    deep = depth / config.base_depth if config.base_depth else 1.0
    return Rules(config, wide, deep, tied)


def _kind(dims: tuple[str, ...]) -> str:
    one = shapes.copy_dims(dims)
    if len(one) <= 1 or one[0] == "W":
        return "vector"
    if one[0] == "Row":
        return "rows"
    if one[0] == "V":
        return "embed"
    if one[-1] == "E":
        return "router"
    return "out" if one[-1] == "D" and one[0] != "2D" else "matrix"


def _reads(dims: tuple[str, ...]) -> int:
    """How many dims of a copy are summed over: both of (H, Dv) where heads are put together."""
    one = shapes.copy_dims(dims)
    return 2 if len(one) == 3 and one[0] == "H" else 1
