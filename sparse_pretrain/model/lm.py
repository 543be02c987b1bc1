"""The language model: embedding, a prefix of blocks, a repeated pattern of blocks, a head."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import attention, nn, routing, shapes, spec
from sparse_pretrain.attention import base
from sparse_pretrain.model import block, engram, ffn, layers, mtp, precision, residual, transfer
from sparse_pretrain.model.engram import Config as MemoryConfig
from sparse_pretrain.model.mtp import Config as MTPConfig
from sparse_pretrain.model.precision import Config as PrecisionConfig
from sparse_pretrain.model.residual import PlainConfig
from sparse_pretrain.model.transfer import Config as TransferConfig
from sparse_pretrain.routing.base import market_means
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}
REMAT = ("none", "full", "dots", "offload")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`blocks` names layer types; the model is `prefix`, then `pattern` repeated `repeats` times.

    `vocab=0` takes the tokenizer's. `remat`: none keeps all activations, dots keeps matmul
    results, offload keeps them in the host's memory, full recomputes each pattern repeat.
    `scan=False` unrolls the repeats.
    """

    width: int = 256
    vocab: int = 0
    blocks: Mapping[str, block.Config] = dataclasses.field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ("block",)
    repeats: int = 4
    tied: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0
    norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    remat: str = "none"
    scan: bool = True
    mtp: MTPConfig = MTPConfig()
    transfer: TransferConfig = TransferConfig()
    residual: spec.Config = PlainConfig()
    memory: MemoryConfig = MemoryConfig()
    precision: PrecisionConfig = PrecisionConfig()

    def __post_init__(self):
        spec.positive(self, "width", "norm_eps")
        spec.at_most(self, 2**24, "width", "vocab")
        spec.require(self.vocab >= 0, f"vocab: must not be negative, got {self.vocab}")
        spec.require(self.repeats >= 0, f"repeats: must not be negative, got {self.repeats}")
        for field in ("softcap", "z_loss"):
            value = getattr(self, field)
            spec.require(value >= 0, f"{field}: must not be negative, got {value}")
        spec.require(
            self.dtype in DTYPES, f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}"
        )
        spec.require(
            self.dtype != "float64" or jax.config.jax_enable_x64,
            "dtype: float64 needs the environment variable JAX_ENABLE_X64=1",
        )
        spec.require(
            self.remat in REMAT, f"remat: {self.remat!r} is not one of {', '.join(REMAT)}"
        )
        spec.require(
            self.precision.products == "model" or self.dtype == "bfloat16",
            f"precision.products: {self.precision.products} needs dtype bfloat16, got {self.dtype}",
        )
        for field in ("prefix", "pattern"):
            for name in getattr(self, field):
                known = ", ".join(self.blocks) or "none"
                spec.require(
                    name in self.blocks, f"{field}: block {name!r} is not in blocks ({known})"
                )
        spec.require(self.layers > 0, f"repeats: the model has no layer (pattern {self.pattern})")
        self.memory.check(len(self.prefix), len(self.pattern), self.repeats)
        name = self.mtp.block
        held = ", ".join(self.blocks) or "none"
        ok = name == "" or name in self.blocks
        spec.require(ok, f"mtp.block: block {name!r} is not in blocks ({held})")
        depth = f"repeats: {self.repeats} of {self.pattern} are {self.layers} layers, above 10000"
        spec.require(self.layers <= 10000, depth)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.prefix) + len(self.pattern) * self.repeats

    @property
    def layer_list(self) -> list[block.Config]:
        """Every layer's section, from the bottom up."""
        return [self.blocks[n] for n in (*self.prefix, *(self.pattern * self.repeats))]

    @property
    def memory_cuts(self) -> list[int]:
        """Repeats before which a memory stands, between 0 and their number."""
        at = [(n - len(self.prefix)) // len(self.pattern) for n in self.memory.layers]
        return [0, *(n for n in at if n > 0), self.repeats]

    @property
    def mtp_block(self) -> str:
        """The name of the type of the layers that predict further ahead."""
        return self.mtp.block or (self.pattern if self.repeats else self.prefix)[-1]

    @property
    def mtp_list(self) -> list[block.Config]:
        """The section of each layer that only training runs, to predict further ahead."""
        return [self.blocks[self.mtp_block]] * self.mtp.depth


class Told(NamedTuple):
    """What a part of the model tells: its routers' reports by layer group, and the losses of their
    balance and of the attentions' own training, summed over its layers.
    """

    reports: dict[str, Any]
    balance: Any = 0.0
    own: Any = 0.0

    def add(self, group: str, report: Any, own: Any) -> "Told":
        """With one more layer."""
        reports = {**self.reports, group: report}
        return Told(reports, self.balance + report.balance, self.own + own)


def told(sums: Any, out: Any, parts: int = 1) -> Told:
    """What the repeats tell, from sums over `parts` of a batch: means over one are over all."""
    reports = {f"stack_{i}": report for i, report in enumerate(out)}
    return Told(reports, sums[0] / parts, sums[1] / parts)


def aux(parts: Sequence[Told], ahead: Any = ()) -> shapes.Aux:
    """What a model returns beside its hidden states, from what its parts tell."""
    reports = {group: report for part in parts for group, report in part.reports.items()}
    load = {group: r.load for group, r in reports.items() if r.load.size}
    market = {group: r.market for group, r in reports.items() if r.market}
    balance, own = (sum(getattr(part, f) for part in parts) for f in ("balance", "own"))
    return shapes.Aux(load, balance, market, own, ahead)


def _context(batch: shapes.Batch, train: bool) -> base.Context:
    return base.Context(batch.segments, batch.positions, batch.tokens, train)


class LM(nn.Module):
    """Causal decoder.

    Shapes: batch fields [B, L] -> (hidden [B, L, D] in the compute dtype, Aux).
    """

    def __init__(self, config: Config, keys: nn.Keys):
        self.config = c = config
        spec.require(c.vocab > 1, f"vocab: must be at least 2, got {c.vocab}")
        gain = (2 * c.layers) ** -0.5
        if c.transfer.on:
            keys.gain = transfer_rules(c).start

        given = {"eps": c.norm_eps, "out_gain": gain, "streams": c.residual}

        def make(name):
            section = c.blocks[name]
            return lambda keys: block.Block(section, c.width, keys, **given)

        std = c.width**-0.5 if c.tied else 1.0
        self.embedding = nn.param(keys, (c.vocab, c.width), ("V", "D"), std=0.5 * std)
        for i, name in enumerate(c.prefix):
            setattr(self, f"prefix_{i}", make(name)(keys))
        if c.repeats:
            for i, name in enumerate(c.pattern):
                setattr(self, f"stack_{i}", nn.stack(make(name), c.repeats, keys))
        self.norm = layers.RMSNorm(c.width, keys, eps=c.norm_eps)
        if not c.tied:
            self.head = nn.param(keys, (c.width, c.vocab), ("D", "V"), std=0.5 / c.width)
        for k in range(c.mtp.depth):
            setattr(self, f"mtp_{k}", mtp.Module(c.blocks[c.mtp_block], c.width, keys, **given))
        self.end = residual.end(c.residual, c.width, keys, eps=c.norm_eps)
        more = {"eps": c.norm_eps, "out_gain": gain, "streams": c.residual.streams}
        for k in range(len(c.memory.layers)):  # last, so that all else starts as it does without
            made = engram.Memory(c.memory, c.width, keys, place=k, **more)
            setattr(self, f"memory_{k}", made)

    def __call__(
        self, batch: shapes.Batch, *, train: bool = False
    ) -> tuple[Float[Array, "B L D"], shapes.Aux]:
        x, embedding, first = self.enter(batch, train=train)
        x, middle = self.through(x, batch, train=train)
        hidden, ahead, last = self.leave(x, batch, embedding, train=train)
        return hidden, aux((first, middle, last), ahead)

    @precision.kept
    def enter(
        self, batch: shapes.Batch, *, train: bool
    ) -> tuple[Float[Array, "B L *R D"], Float[Array, "B L D"], Told]:
        """(what the repeated pattern reads, the embedding, what the prefix tells)."""
        c = self.config
        context = _context(batch, train)
        embedding = self._embed(batch.tokens)
        x = residual.spread(c.residual, embedding)
        told = Told({})
        for i in range(len(c.prefix)):
            x = self._remember(i, x, batch)
            layer = getattr(self, f"prefix_{i}")
            x, report, own = ops.kept_apart(lambda x, layer=layer: layer(x, context))(x)
            told = told.add(f"prefix_{i}", report, own)
        return self._remember(len(c.prefix), x, batch), embedding, told

    @precision.kept
    def through(
        self, x: Float[Array, "B L *R D"], batch: shapes.Batch, *, train: bool
    ) -> tuple[Float[Array, "B L *R D"], Told]:
        """The repeated pattern."""
        c = self.config
        if not c.repeats:
            return x, Told({})
        zero = jnp.zeros((), jnp.float32)
        sums, outs, stack = (zero, zero), [], self.layers(train=train)
        for first, last in itertools.pairwise(c.memory_cuts):
            if first:
                x = self._remember(len(c.prefix) + first * len(c.pattern), x, batch)
            (x, sums), out = nn.scan_layers(
                nn.part(stack, first, last), (x, sums), scan=c.scan,
                rows=_context(batch, train)[:3],
            )
            outs.append(out)
        out = outs[0] if len(outs) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *outs)
        return x, told(sums, out, ops.microbatches())

    def _remember(self, layer: int, x, batch: shapes.Batch):
        """x and what the memory before this layer adds to it, if one stands there."""
        c = self.config.memory
        if layer not in c.layers:
            return x
        assert batch.memory is not None, "memory: the batch carries no rows of its tables"
        place = c.layers.index(layer)
        rows = batch.memory[..., place * c.reads : (place + 1) * c.reads]
        run = _remat(self.config.remat)(getattr(self, f"memory_{place}"))
        return run(x, rows, batch.segments)

    def layers(self, *, train: bool) -> nn.Layers:
        """The repeats; each carries (x, (balance of the routers, own losses of the attentions))."""

        def repeat(modules, carry, n, rows):
            del n
            x, (balance, own) = carry
            context = base.Context(*rows, train)
            out = []
            for module in modules:
                x, report, loss = module(x, context)
                out.append(report)
                balance, own = balance + report.balance, own + loss
            return (x, (balance, own)), out

        stacks = [getattr(self, f"stack_{i}") for i in range(len(self.config.pattern))]
        return nn.layers(stacks, repeat, _remat(self.config.remat))

    @precision.kept
    def leave(
        self,
        x: Float[Array, "B L *R D"],
        batch: shapes.Batch,
        embedding: Float[Array, "B L D"] | None = None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L D"], ...], Told]:
        """(hidden states before the head, those that predict further ahead, what their layers
        tell); without the embedding it is looked up again where it is needed.
        """
        c = self.config
        context, told = _context(batch, train), Told({})
        hidden, ahead = self.norm(x if self.end is None else self.end(x)), []
        x = hidden
        depth = c.mtp.depth if train else 0
        if embedding is None:
            embedding = self._embed(batch.tokens) if depth else hidden
        for k in range(depth):
            module = getattr(self, f"mtp_{k}")
            here = context._replace(valid=mtp.known(batch.segments, k + 1))
            run = _remat(c.remat)(lambda *pair, m=module, here=here: m.ahead(*pair, here))
            x, report, own = run(x, mtp.later(embedding, k + 1))
            told = told.add(f"mtp_{k}", report, own)
            ahead.append(module.norm(x))
        return hidden, tuple(ahead), told

    def _embed(self, tokens: Int[AnyArray, "B L"]) -> Float[Array, "B L D"]:
        found = ops.embed(layers.embed, nn.stored(self.embedding), tokens)
        return found.astype(DTYPES[self.config.dtype])

    def head_weight(self, dtype: Any = None) -> tuple[jax.Array, str]:
        """(the output matrix, its layout 'DV' or 'VD'); `dtype` is what its reader rounds it to."""
        if self.config.tied:
            gain = transfer_rules(self.config).head_gain
            if gain != 1.0:  # rounded after it is multiplied
                return nn.read(self.embedding) * gain, "VD"
            return nn.read(self.embedding, dtype), "VD"
        return nn.read(self.head, dtype), "DV"


def _remat(policy: str):
    if policy == "none":
        return ops.kept_apart
    if policy == "full":
        return jax.checkpoint
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved = ops.products_on_host() if policy == "offload" else saved
    return lambda f: jax.checkpoint(f, policy=saved)


def define(config: Config) -> nn.Definition:
    """The model of this configuration, without arrays."""
    return nn.define(lambda keys: LM(config, keys))


def layer_names(config: Config) -> dict[str, str]:
    """As `main_names`, and the layers that predict further ahead ('mtp_0')."""
    return main_names(config) | {f"mtp_{k}": config.mtp_block for k in range(config.mtp.depth)}


def transfer_rules(config: Config) -> transfer.Rules:
    """How this model's parameters start and move against those of the base of its `transfer`."""
    return transfer.rules(
        config.transfer, width=config.width, depth=config.layers, tied=config.tied
    )


def main_names(config: Config) -> dict[str, str]:
    """Parameter group ('prefix_0', 'stack_0') -> name of its block type."""
    names = {f"prefix_{i}": n for i, n in enumerate(config.prefix)}
    if config.repeats:
        names |= {f"stack_{i}": n for i, n in enumerate(config.pattern)}
    return names


def move_prices(
    config: Config, prices: dict, load: dict[str, Any], market: dict[str, Any]
) -> dict:
    """Every router's prices after one optimizer step with these reports; the rest unchanged.

    `load` and `market` are sums over the batch, as in `Aux`.
    """
    out = dict(prices)
    for group, name in layer_names(config).items():
        section = config.blocks[name].ffn
        if group not in load or group not in prices:  # no experts, or a router without prices
            continue
        if "router" not in prices[group]["ffn"]:
            continue
        router = routing.TABLE[section.router.KIND]
        state = prices[group]["ffn"]["router"]
        told = market_means(market.get(group, {}))
        proposal = told.get("proposal", jnp.zeros_like(load[group]))
        moved = router.move(section.router, state, load[group], proposal)
        out[group] = {**prices[group], "ffn": {**prices[group]["ffn"], "router": moved}}
    return out


def trains_own(config: Config) -> bool:
    """Whether any layer's attention trains an indexer by a loss of its own."""
    sections = [layer.attention for layer in (*config.layer_list, *config.mtp_list)]
    return any(attention.TABLE[s.KIND].trains_own(s) for s in sections)


def own_parameters(config: Config) -> list[tuple[str, ...]]:
    """Where the parameters lie that the attentions train by losses of their own."""
    found: list[tuple[str, ...]] = []
    for group, name in layer_names(config).items():
        section = config.blocks[name].attention
        variant = attention.TABLE[section.KIND]
        if variant.trains_own(section):
            found += [(group, "attention", part) for part in variant.own]
    return found


def work_per_token(config: Config, length: int) -> base.Work:
    """Forward FLOPs per token of all that training runs at `length`, the head included."""
    sections = [*config.layer_list, *config.mtp_list]
    works = [
        attention.TABLE[x.attention.KIND].work(x.attention, config.width, length) for x in sections
    ]
    linear = 2.0 * config.width * config.vocab + sum(
        ffn.TABLE[x.ffn.KIND].work(x.ffn, config.width) + 2 * x.conv * config.width
        for x in sections
    )
    linear += config.mtp.depth * mtp.work(config.width, config.vocab)
    carried = residual.TABLE[config.residual.KIND]
    linear += 2 * len(sections) * carried.work(config.residual, config.width)
    linear += (1 + config.mtp.depth) * carried.head_work(config.residual, config.width)
    linear += engram.work(config.memory, config.width, config.residual.streams)
    total = base.Work(*(sum(values) for values in zip(*works, strict=True)))
    return total._replace(linear=total.linear + linear)
