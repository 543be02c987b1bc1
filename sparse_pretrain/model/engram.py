"""Conditional memory: rows of large tables, found by hashes of the last tokens, added to a stream.

A token's rows depend on the tokens alone and not on what the model makes of them, so that they are
known before the step: data/ngrams.py finds them on the host, and a batch carries their numbers.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from sparse_pretrain import nn, spec
from sparse_pretrain.model import layers
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops

MULTIPLE = 256  # rows are filled up to it, since a plan cuts a table only where its devices divide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`layers` are those before whose attention a memory stands, the first being 0; none is off.

    A memory has a table for each of `heads` and each n-gram of `orders` tokens, the token's own
    among them. `taps` of the convolution over what was read, as far apart as the longest n-gram.
    Units: `rows` of a table at least, each table's number being another prime; `width` numbers that
    a token reads from all tables of a memory.
    Source: 2601.07372, section 2; the released engram_demo_v1.py where the two differ.
    """

    layers: tuple[int, ...] = ()
    orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    width: int = 256
    rows: int = 4096
    taps: int = 4

    def __post_init__(self):
        ok = list(self.layers) == sorted(set(self.layers)) and all(n >= 0 for n in self.layers)
        spec.require(ok, f"layers: must grow from 0 or more, got {self.layers}")
        ok = list(self.orders) == sorted(set(self.orders))
        ok = ok and all(2 <= n <= 8 for n in self.orders) and len(self.orders) > 0
        spec.require(ok, f"orders: must grow within 2 to 8, got {self.orders}")
        spec.positive(self, "heads", "width", "rows")
        spec.at_most(self, 1024, "heads")
        spec.at_most(self, 2**24, "width")
        spec.require(1 <= self.taps <= 64, f"taps: must be 1 to 64, got {self.taps}")
        spec.require(
            self.width % self.reads == 0,
            f"width: {self.width} does not divide over {self.heads} heads x {len(self.orders)} "
            f"orders, which are {self.reads} tables",
        )
        ok = self.rows * self.reads < 2**31 - 2**24
        spec.require(
            ok, f"rows: {self.rows} in each of {self.reads} tables are beyond a 32-bit number"
        )

    @property
    def reads(self) -> int:
        """Rows that a token reads of one memory: one of each table."""
        return self.heads * len(self.orders)

    @property
    def carried(self) -> int:
        """Numbers of rows that a batch carries per token, for all memories."""
        return self.reads * len(self.layers)

    @property
    def row_width(self) -> int:
        """Numbers in a row."""
        return self.width // self.reads

    def filled(self, place: int) -> int:
        """Rows of all tables of a memory that a hash can point to."""
        return sum(tables(self)[place])

    def held(self, place: int) -> int:
        """Rows of the array that holds them, its unused last ones among them."""
        return -(-self.filled(place) // MULTIPLE) * MULTIPLE

    def check(self, prefix: int, pattern: int, repeats: int) -> None:
        """Errors: ValueError where a memory does not stand before a whole repeat of the pattern."""
        last = prefix + pattern * repeats
        whole = range(prefix, last, max(pattern, 1))  # of which there may be billions
        first = [*itertools.islice(itertools.chain(range(prefix), whole), 12)]
        for layer in self.layers:
            spec.require(layer < last, f"memory.layers: {layer} is not below {last} layers")
            spec.require(
                layer < prefix or layer in whole,
                f"memory.layers: {layer} lies within a repeat of {pattern} layers; a memory stands "
                f"before one, at {', '.join(map(str, first))}",
            )


@functools.cache
def tables(config: Config) -> tuple[tuple[int, ...], ...]:
    """The rows of every table: a tuple for each memory, orders in turn and heads within them.

    Each is the smallest prime from `rows` on that no table before it has.
    Source: engram_demo_v1.py, calculate_vocab_size_across_layers.
    """
    found, used = [], set()
    for _ in config.layers:
        sizes = []
        for _ in config.orders:
            number = config.rows
            for _ in range(config.heads):
                while number in used or not _prime(number):
                    number += 1
                used.add(number)
                sizes.append(number)
        found.append(tuple(sizes))
    return tuple(found)


@functools.cache
def _prime(number: int) -> bool:
    if number < 4:
        return number > 1
    return number % 2 == 1 and all(number % d for d in range(3, int(number**0.5) + 1, 2))


class Memory(nn.Module):
    """Rows as a value for all streams, each stream by a gate of its own; then a convolution.

    Shapes: x [B, L, D] or [B, L, R, D], rows [B, L, A], segments [B, L] -> like x, which it is
        added to.
    Source: 2601.07372, equations 3 to 5: the gate is the sigmoid of the signed square root of how
        alike normed keys and streams are; the convolution is of normed gated values and starts at
        zero.
    Differs: projections have no bias; the tables start at the embedding's deviation.
    """

    def __init__(
        self, config: Config, width: int, keys: nn.Keys, *, place: int, eps: float, out_gain: float,
        streams: int,
    ):  # fmt: skip
        self.config, self.eps, self.streams = config, eps, streams
        R, D, U = streams, width, config.width
        self.table = nn.param(
            keys, (config.held(place), config.row_width), ("Row", "Dm"), std=0.5
        )
        self.w_value = nn.param(keys, (U, D), ("U", "D"), std=out_gain * U**-0.5)
        self.w_key = nn.param(keys, (R, U, D), ("G", "U", "D"), std=U**-0.5)
        self.norm_key = nn.param(keys, (R, D), ("G", "D"), value=1.0)
        self.norm_stream = nn.param(keys, (R, D), ("G", "D"), value=1.0)
        self.norm_value = nn.param(keys, (R, D), ("G", "D"), value=1.0)
        self.taps = nn.param(keys, (config.taps, R, D), ("W", "G", "D"), value=0.0)

    def _norm(self, x_BxLxRxD, scale):
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_BxLxRxD), axis=-1, keepdims=True) + self.eps)
        return x_BxLxRxD * inverse * nn.read(scale).astype(x_BxLxRxD.dtype)[None, None]

    def _gated(self, x_BxLxRxD, rows_BxLxA):
        """Values by their gates [B, L, R, D], and the same normed for the convolution."""
        dtype = x_BxLxRxD.dtype
        wide = layers.wide(dtype)
        read = ops.lookup(nn.stored(self.table), rows_BxLxA, ("Row", "Dm"), dtype)
        read = read.reshape(*read.shape[:2], -1)
        value = ops.linear(read, nn.read(self.w_value, dtype)).astype(wide)
        weight = nn.read(self.w_key, dtype)
        key = jnp.stack([ops.linear(read, weight[r]) for r in range(self.streams)], axis=2)
        key = self._norm(key.astype(wide), self.norm_key)
        stream = self._norm(x_BxLxRxD.astype(wide), self.norm_stream)
        gated = gate(jnp.sum(key * stream, axis=-1) * x_BxLxRxD.shape[-1] ** -0.5)
        gated = gated[..., None] * value[:, :, None]
        return gated, self._norm(gated, self.norm_value)

    def __call__(
        self,
        x: Float[Array, "B L *R D"],
        rows: Int[AnyArray, "B L A"],
        segments: Int[AnyArray, "B L"],
    ) -> Float[Array, "B L *R D"]:
        streams = x if x.ndim == 4 else x[:, :, None]
        gated, normed = self._gated(streams, rows)
        taps, L = nn.read(self.taps).astype(normed.dtype), x.shape[1]
        total = jnp.zeros_like(normed)
        for at in range(len(taps)):
            back = at * self.config.orders[-1]
            if back >= L:
                break
            same = jnp.pad(segments, ((0, 0), (back, 0)))[:, :L] == segments
            earlier = jnp.pad(normed, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :L]
            total += taps[at][None, None] * jnp.where(same[..., None, None], earlier, 0.0)
        y = streams.astype(gated.dtype) + gated + jax.nn.silu(total)
        return ops.laid(y.astype(x.dtype).reshape(x.shape), "BL" + "." * (x.ndim - 3) + "D")

    def decode(
        self,
        x: Float[Array, "B 1 *R D"],
        rows: Int[AnyArray, "B 1 A"],
        past: Float[Array, "B W RD"],
    ) -> tuple[Float[Array, "B 1 *R D"], Float[Array, "B W RD"]]:
        """One token after what the convolution read, zero before the first; and the next."""
        streams = x if x.ndim == 4 else x[:, :, None]
        gated, normed = self._gated(streams, rows)
        flat = normed.reshape(normed.shape[0], 1, -1)
        window = jnp.concatenate([past.astype(flat.dtype), flat], axis=1)
        taps = nn.read(self.taps).astype(flat.dtype)
        seen = window[:, :: -self.config.orders[-1]]  # the newest first
        total = jnp.einsum("bwd,wd->bd", seen, taps.reshape(len(taps), -1))
        y = streams.astype(gated.dtype) + gated + jax.nn.silu(total).reshape(gated.shape)
        return y.astype(x.dtype).reshape(x.shape), window[:, 1:].astype(past.dtype)


class Hash(NamedTuple):
    """What finds rows inside a traced function, where text is written and no host is asked.

    64-bit multipliers are two 32-bit halves.
    Shapes: `ids` [V] of tokens; `high`, `low` [memories, longest n-gram]; `sizes` of tables and
        where each `begins` [A]; `pad` [] is what lies before a document.
    """

    ids: Int[AnyArray, " V"]
    high: UInt[AnyArray, "places n"]
    low: UInt[AnyArray, "places n"]
    sizes: UInt[AnyArray, " A"]
    begins: Int[AnyArray, " A"]
    pad: Int[AnyArray, ""]


def hashed(config: Config, found: Hash, ids: Int[AnyArray, "B n"]) -> Int[Array, "B A"]:
    """The rows of tokens whose last compressed ids these are, the token's own first.

    Equal to data/ngrams.py's, which has 64-bit numbers to do it with.
    """
    mixed_high, mixed_low = [], []
    for high, low in zip(found.high, found.low, strict=True):
        top = bottom = jnp.zeros(ids.shape[0], jnp.uint32)
        at = 0
        for order in config.orders:
            while at < order:
                more_top, more_bottom = _product(ids[:, at].astype(jnp.uint32), high[at], low[at])
                top, bottom, at = top ^ more_top, bottom ^ more_bottom, at + 1
            mixed_high += [top] * config.heads
            mixed_low += [bottom] * config.heads
    top, bottom = jnp.stack(mixed_high, axis=-1), jnp.stack(mixed_low, axis=-1)
    sizes = jnp.asarray(found.sizes)[None]

    def digit(n, rest):  # long division in base 2: the rest stays below a size, which is below 2^31
        half, place = jnp.where(n < 32, top, bottom), jnp.uint32(31) - n.astype(jnp.uint32) % 32
        rest = (rest << 1) | ((half >> place) & 1)
        return jnp.where(rest >= sizes, rest - sizes, rest)

    rest = jax.lax.fori_loop(0, 64, digit, jnp.zeros(top.shape, jnp.uint32))
    return rest.astype(jnp.int32) + found.begins[None]


def _product(x_B, high, low):
    """(high, low) half of x times a 64-bit number, modulo 2^64."""
    a, b = [x_B & 0xFFFF, x_B >> 16], [low & 0xFFFF, low >> 16]
    first, cross, other, last = a[0] * b[0], a[0] * b[1], a[1] * b[0], a[1] * b[1]
    middle = (first >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    bottom = (first & 0xFFFF) | (middle << 16)
    return last + (cross >> 16) + (other >> 16) + (middle >> 16) + x_B * high, bottom


def gate(alike: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """sigmoid(sign(a) sqrt(max(|a|, 1e-6))), the gate of a key that is `alike` its stream."""
    return jax.nn.sigmoid(jnp.sign(alike) * jnp.sqrt(jnp.maximum(jnp.abs(alike), 1e-6)))


def cache_shapes(config: Config, width: int, streams: int, batch: int) -> dict[str, tuple]:
    """What decoding keeps of a memory: what its convolution has yet to read."""
    kept = (config.taps - 1) * config.orders[-1]
    return {"past": (batch, kept, streams * width)}


def work(config: Config, width: int, streams: int) -> float:
    """Forward FLOPs per token of all memories: projections, gates and the convolution."""
    one = 2.0 * config.width * width * (1 + streams) + streams * width * (2.0 + 2.0 * config.taps)
    return len(config.layers) * one


def looked_up(config: Config) -> tuple[int, int]:
    """(parameters in all tables, numbers of theirs that no hash points to)."""
    places = range(len(config.layers))
    held = sum(config.held(p) for p in places) * config.row_width
    return held, held - sum(config.filled(p) for p in places) * config.row_width


def kept(config: Config, width: int, streams: int) -> int:
    """Numbers per token that the backward pass reads again: rows, value, keys, gated values."""
    return len(config.layers) * (config.width + width + 4 * streams * width)


