"""The language model: embedding, a prefix of blocks, a repeated pattern of blocks, a head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_pretrain import attention, nn, routing, shapes, spec
from sparse_pretrain.attention import base
from sparse_pretrain.model import block, ffn, layers, mtp, precision, residual, transfer
from sparse_pretrain.model.mtp import Config as MTPConfig
from sparse_pretrain.model.precision import Config as PrecisionConfig
from sparse_pretrain.model.residual import PlainConfig
from sparse_pretrain.model.transfer import Config as TransferConfig
from sparse_pretrain.shapes import AnyArray, Position
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
    def mtp_block(self) -> str:
        """The name of the type of the layers that predict further ahead."""
        return self.mtp.block or (self.pattern if self.repeats else self.prefix)[-1]

    @property
    def mtp_list(self) -> list[block.Config]:
        """The section of each layer that only training runs, to predict further ahead."""
        return [self.blocks[self.mtp_block]] * self.mtp.depth


@jax.custom_vjp
def embed(
    table_VxD: Float[Array, "V D"], tokens_BxL: Int[AnyArray, "B L"]
) -> Float[Array, "B L D"]:
    """Rows of the table; the gradient is added up in float32."""
    return table_VxD[tokens_BxL]


def _embed_forward(table, tokens):
    return embed(table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _embed_backward(residuals, dy):
    tokens, shape = residuals
    rows = dy.reshape(-1, dy.shape[-1]).astype(shape.dtype)
    zeros = jnp.zeros((shape.shape[0], dy.shape[-1]), shape.dtype)
    return zeros.at[tokens.reshape(-1)].add(rows), None


embed.defvjp(_embed_forward, _embed_backward)


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

    @precision.kept
    def __call__(
        self, batch: shapes.Batch, *, train: bool = False
    ) -> tuple[Float[Array, "B L D"], shapes.Aux]:
        c, dtype = self.config, DTYPES[self.config.dtype]
        context = base.Context(batch.segments, batch.positions, batch.tokens, train)
        x = embedding = ops.embed(embed, nn.stored(self.embedding), batch.tokens).astype(dtype)
        x = residual.spread(c.residual, x)
        reports, zero = {}, jnp.zeros((), jnp.float32)
        losses = (zero, zero)  # balance of the routers, own losses of the attentions
        for i in range(len(c.prefix)):
            layer = getattr(self, f"prefix_{i}")
            x, report, own = ops.kept_apart(lambda x, layer=layer: layer(x, context))(x)
            reports[f"prefix_{i}"] = report
            losses = (losses[0] + report.balance, losses[1] + own)

        def repeat(modules, carry, n, rows):
            del n
            x, losses = carry
            context = base.Context(*rows, train)
            told = []
            for module in modules:
                x, report, own = module(x, context)
                told.append(report)
                losses = (losses[0] + report.balance, losses[1] + own)
            return (x, losses), told

        if c.repeats:
            stacks = [getattr(self, f"stack_{i}") for i in range(len(c.pattern))]
            (x, more), told = nn.scan_layers(
                stacks, repeat, (x, (zero, zero)), scan=c.scan, rows=context[:3],
                wrap=_remat(c.remat),
            )
            parts = ops.microbatches()  # what are means over one are summed over all
            losses = (losses[0] + more[0] / parts, losses[1] + more[1] / parts)
            for i in range(len(c.pattern)):
                market = jax.tree.map(lambda v: v / parts, told[i].market)
                reports[f"stack_{i}"] = told[i]._replace(market=market)
        hidden, ahead = self.norm(x if self.end is None else self.end(x)), []
        x = hidden
        for k in range(c.mtp.depth if train else 0):
            module = getattr(self, f"mtp_{k}")
            here = context._replace(valid=mtp.known(batch.segments, k + 1))
            run = _remat(c.remat)(lambda *pair, m=module, here=here: m.ahead(*pair, here))
            x, report, own = run(x, mtp.later(embedding, k + 1))
            reports[f"mtp_{k}"] = report
            losses = (losses[0] + report.balance, losses[1] + own)
            ahead.append(module.norm(x))
        load = {k: r.load for k, r in reports.items() if r.load.size}
        market = {k: r.market for k, r in reports.items() if r.market}
        return hidden, shapes.Aux(load, losses[0], market, losses[1], tuple(ahead))

    def head_weight(self, dtype: Any = None) -> tuple[jax.Array, str]:
        """(the output matrix, its layout 'DV' or 'VD'); `dtype` is what its reader rounds it to."""
        if self.config.tied:
            gain = transfer_rules(self.config).head_gain
            if gain != 1.0:  # rounded after it is multiplied
                return nn.read(self.embedding) * gain, "VD"
            return nn.read(self.embedding, dtype), "VD"
        return nn.read(self.head, dtype), "DV"


def init_cache(model: LM, batch: int, length: int) -> dict[str, Any]:
    """Room for `length` tokens in every layer's own cache; stacked layers lead with dim N."""
    c, dtype = model.config, DTYPES[model.config.dtype]
    cache = {}
    for group, name in main_names(c).items():
        sizes = block.cache_shapes(c.blocks[name], c.width, batch, length)
        lead = (c.repeats,) if group.startswith("stack_") else ()
        cache[group] = {k: jnp.zeros((*lead, *size), dtype) for k, size in sizes.items()}
    return cache


@precision.kept
def decode(
    model: LM, token_B: Int[AnyArray, " B"], cache: dict[str, Any], position: Position
) -> tuple[Float[Array, "B V"], dict]:
    """Logits [B, V] float32 after `token_B` at `position` [], and the cache that holds it."""
    c, dtype = model.config, DTYPES[model.config.dtype]
    x = nn.read(model.embedding)[token_B[:, None]].astype(dtype)
    x, new = residual.spread(c.residual, x), dict(cache)
    for i in range(len(c.prefix)):
        name = f"prefix_{i}"
        x, new[name] = getattr(model, name).decode(x, cache[name], position, token_B[:, None])
    if c.repeats:
        names = [f"stack_{i}" for i in range(len(c.pattern))]

        def repeat(modules, x, n, layer_cache):
            del n
            out = []
            for module, part in zip(modules, layer_cache, strict=True):
                x, part = module.decode(x, part, position, token_B[:, None])
                out.append(part)
            return x, out

        stacks = [getattr(model, name) for name in names]
        x, out = nn.scan_layers(
            stacks, repeat, x, scan=c.scan, extra=[cache[name] for name in names]
        )
        new |= dict(zip(names, out, strict=True))
    x = model.norm(x if model.end is None else model.end(x))[:, 0].astype(jnp.float32)
    head, layout = model.head_weight()
    logits = jnp.einsum("bd,dv->bv" if layout == "DV" else "bd,vd->bv", x, head)
    if c.softcap:
        logits = c.softcap * jnp.tanh(logits / c.softcap)
    return logits, new


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
    """Every router's prices after one optimizer step with these reports; the rest unchanged."""
    out = dict(prices)
    for group, name in layer_names(config).items():
        section = config.blocks[name].ffn
        if group not in load or group not in prices:  # no experts, or a router without prices
            continue
        if "router" not in prices[group]["ffn"]:
            continue
        router = routing.TABLE[section.router.KIND]
        state = prices[group]["ffn"]["router"]
        proposal = market.get(group, {}).get("proposal", jnp.zeros_like(load[group]))
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
    total = base.Work(*(sum(values) for values in zip(*works, strict=True)))
    return total._replace(linear=total.linear + linear)
