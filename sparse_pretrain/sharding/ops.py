"""Every kernel op as the model calls it: by logical dims, the identity wrapper on one device.

The model never sees a mesh. Under a plan, each kernel runs in a shard_map over the rows, tokens
and heads of its device: Mosaic kernels cannot be partitioned automatically, and XLA's loops would
be badly. Queries are cut along a row where the plan has a context axis, and keys gathered to it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas import device
from kernels_pallas import joined as _joined
from kernels_pallas.block_sparse import block_sparse as _block_sparse
from kernels_pallas.block_sparse.xla import keys_per_query as block_sparse_keys_per_query
from kernels_pallas.compress import op as _compress
from kernels_pallas.compress.xla import pool
from kernels_pallas.cross_entropy import cross_entropy as _cross_entropy
from kernels_pallas.flash import flash as _flash
from kernels_pallas.flash.own import keys_per_query as own_block_keys_per_query
from kernels_pallas.flash.xla import keys_per_query as flash_keys_per_query
from kernels_pallas.grouped_matmul import Layout as GroupLayout
from kernels_pallas.grouped_matmul import rows_needed as group_rows
from kernels_pallas.indexer import index_kl_dense as _index_kl_dense
from kernels_pallas.indexer import index_kl_listed as _index_kl_listed
from kernels_pallas.indexer import index_select as _index_select
from kernels_pallas.indexer.xla import choice_per_query as index_choice_per_query
from kernels_pallas.indexer.xla import keys_per_query as index_keys_per_query
from kernels_pallas.sinkhorn import op as _sinkhorn
from kernels_pallas.token_sparse import token_mass as _token_mass
from kernels_pallas.token_sparse import token_sparse as _token_sparse
from sparse_pretrain.sharding import apply, joined, offload, ring, zigzag
from sparse_pretrain.sharding.each import each_device, first_row
from sparse_pretrain.sharding.gather import gathered, kept_apart
from sparse_pretrain.sharding.joined import Part
from sparse_pretrain.sharding.products import (
    eight_bits,
    group_layout,
    grouped_linear,
    grouped_swiglu,
    linear,
)
from sparse_pretrain.sharding.rows import lookup

__all__ = [
    "GroupLayout",
    "Part",
    "block_sparse",
    "block_sparse_keys_per_query",
    "compress",
    "cross_entropy",
    "each_device",
    "eight_bits",
    "embed",
    "exchange",
    "flash",
    "flash_keys_per_query",
    "gathered",
    "group_layout",
    "group_rows",
    "grouped_linear",
    "grouped_swiglu",
    "index_choice_per_query",
    "index_keys_per_query",
    "index_kl_dense",
    "index_kl_listed",
    "index_select",
    "kept_apart",
    "laid",
    "linear",
    "lookup",
    "microbatches",
    "one_softmax",
    "own_block_keys_per_query",
    "pool",
    "products_on_host",
    "queries_at_once",
    "recall",
    "rows_are_cut",
    "sinkhorn",
    "token_mass",
    "token_sparse",
]


# Rows longer than this go by parts, so many of them. At 4,096 tokens, where sparse attention is
# just even with full, parts cost more than a tenth of the time (attention_length.py).
LONG_ROW, QUARTERS = 4096, 4


# --- layouts ---


def laid(x, dims: str):
    """x where the plan puts activations of these dims, '.' for a dim that is never cut."""
    placed = apply.current()
    if placed is None:
        return x
    return jax.lax.with_sharding_constraint(x, placed.spec(dims, x.shape))


def products_on_host() -> Callable:
    """The policy that keeps the results of products without batch dims in the host's memory."""
    return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", offload.HOST)


def microbatches() -> int:
    """Into how many parts a pipeline cuts a batch; 1 without one."""
    placed = apply.current()
    return placed.microbatches if placed is not None and placed.piped else 1


def exchange() -> str:
    """How tokens travel to experts: `padded` or `ragged`."""
    placed = apply.current()
    return apply.exchange("auto" if placed is None else placed.exchange, device.platform())


def rows_are_cut() -> bool:
    """Whether the tokens of one row lie on several devices."""
    placed = apply.current()
    return placed is not None and bool(placed.axes("L"))


def queries_at_once(length: int) -> int | None:
    """Of how many queries a layer's backward pass holds what belongs to them; None for all.

    A quarter of a row, on one device and where XLA runs attention: kernels hold less by themselves.
    """
    if apply.current() is not None or device.platform() != "cpu" or length <= LONG_ROW:
        return None
    return -(-length // QUARTERS)


# --- products ---


def embed(lookup: Callable, table_VxD, tokens_BxL):
    """`lookup(table, tokens)`; each device looks up its part of the width for all tokens of others.

    So a table that is cut along its width need not be gathered, nor its gradient summed: what
    travels are the rows found, each to the device that has its token.
    """
    placed = apply.current()
    if placed is None:
        return lookup(table_VxD, tokens_BxL)
    (B, L), D = tokens_BxL.shape, table_VxD.shape[1]
    held = (*placed.parameter(("V", "D"), table_VxD.shape), None, None)[1]
    width = held if isinstance(held, tuple) else (held,) if held else ()
    rows, length = placed.cut("B", B), placed.cut("L", L)
    more = [tuple(a for a in axes if a not in width) for axes in (rows, length)]

    def local(table, tokens):
        x = lookup(table, tokens)
        cuts = [a for a in (*rows, *length) if a in width]
        sizes = [placed.sizes[a] for a in cuts]
        k = sum(a in rows for a in cuts)  # the rows' axes lead, those of the length come after
        b, n = tokens.shape[0], tokens.shape[1]
        b, n = b // math.prod(sizes[:k]), n // math.prod(sizes[k:])
        x = x.reshape(*sizes[:k], b, *sizes[k:], n, x.shape[-1])
        for axis in reversed(width):  # the innermost first, so that the width comes in order
            if axis in cuts:
                at = cuts.index(axis)
                at += at >= k
                x = jax.lax.all_to_all(x, axis, at, x.ndim - 1, tiled=True)
            else:
                x = jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
        return x.reshape(b, n, D)

    # in the order in which the parts above end up
    out = (*more[0], *(a for a in rows if a in width)), (
        *more[1], *(a for a in length if a in width)
    )
    x = jax.shard_map(
        local,
        in_specs=(PartitionSpec(None, held), PartitionSpec(*map(apply.entry, more))),
        out_specs=PartitionSpec(*map(apply.entry, out)),
        axis_names=set(placed.mesh.axis_names) - placed.manual,
        check_vma=False,
    )(table_VxD, tokens_BxL)
    return laid(x, "BL.")


def cross_entropy(x_BxLxD, head, targets_BxL, weights_BxL, **options):
    """(the sum over all tokens [], nats per token [B, L]) of `kernels_pallas.cross_entropy`.

    Shapes: x [B, L, D]; head and options as there. Along a tensor axis tokens are dealt out too.
    """

    def local(x, head, targets, weights, axes):
        del axes
        total, nats = _cross_entropy(
            x.reshape(-1, x.shape[-1]), head, targets.reshape(-1), weights.reshape(-1), **options
        )
        return total.reshape(1, 1), nats.reshape(targets.shape)

    args = (x_BxLxD, head, targets_BxL, weights_BxL)
    # a sum per device, which are then added: their number is that of the tokens' parts
    totals, nats = each_device(local, args, ("BT.", "..", "BT", "BT"), ("BT", "BT"))
    return jnp.sum(totals), nats


def _by_row(op, args, dims, out, options):
    """A kernel of each device's rows where one is preferred; else XLA cuts the op as it is."""
    backend = op.choose(*args, **options)
    if not backend.name.startswith("mosaic"):
        return backend.fn(*args, **options)

    def local(*parts, axes):
        del axes
        return backend.fn(*parts, **options)

    return each_device(local, args, dims, out)


def sinkhorn(logits_BxLxRxR, **options):
    """`kernels_pallas.sinkhorn` of every token's matrix. Shapes: [B, L, R, R] -> the same."""
    return _by_row(_sinkhorn, (logits_BxLxRxR,), ("BL..",), "BL..", options)


def compress(own_BxMxRx2xSxC, bias_RxSxC, follows_BxM):
    """`kernels_pallas.compress` of every block of tokens, those of a row on one device."""
    args = own_BxMxRx2xSxC, bias_RxSxC, follows_BxM
    return _by_row(_compress, args, ("B.....", "...", "B."), "B..", {})


# --- attention ---


def flash(q, k, v, *, segments_q=None, segments_k=None, sinks_H=None, ends_BxS=None, **options):
    """As `kernels_pallas.flash`; keys are gathered to a row's parts, or go round them (`ring`)."""
    strided = ends_BxS is not None or {"stride", "span"} & set(options)
    start = 0 if strided else k.shape[1] - q.shape[1]
    segments_k = segments_q if segments_k is None else segments_k
    out = ("BLH.", "BLH") if options.get("return_lse") else "BLH."
    found = None if strided or start else _ring(q, k, v, options)
    if found is not None:
        return _round(found, q, k, v, segments_q, segments_k, sinks_H, out)

    def local(q, k, v, segments_q, segments_k, sinks, ends, axes):
        first = first_row(axes, q.shape[1], start)
        return _flash(
            q, k, v, segments_q=segments_q, segments_k=segments_k, sinks_H=sinks, ends_BxS=ends,
            **options, **({} if first is None else {"first": first}),
        )

    args = (q, k, v, segments_q, segments_k, sinks_H, ends_BxS)
    dims = ("BLH.", "B.K.", "B.K.", "BL", "B.", "H", "B.")
    return each_device(local, args, dims, out, heads=("H", "K"))


def _ring(q, k, v, options):
    """The ring that the plan has keys go round in, None where it gathers them."""
    placed = apply.current()
    axes = () if placed is None else placed.cut("L", q.shape[1])
    if placed is None or len(axes) != 1 or {"first", "implementation"} & set(options):
        return None
    options = {n: x for n, x in options.items() if n != "return_lse"}
    devices = placed.sizes[axes[0]]
    rows = q.shape[1] // devices
    shown = {n: options[n] for n in ("causal", "window") if n in options}
    turns = ring.turns(devices, rows, **shown)
    # of one device: its part of the rows and heads too
    cuts = [a for dim, n in (("B", q.shape[0]), ("H", k.shape[2])) for a in placed.cut(dim, n)]
    parts = devices * math.prod(placed.sizes[a] for a in cuts)
    size = (k.size * k.dtype.itemsize + v.size * v.dtype.itemsize) // parts
    if not ring.serves(placed.context, turns, devices, size):
        return None
    return ring.Ring(axes[0], devices, turns, rows, tuple(sorted(options.items())))


def _round(found, q, k, v, segments_q, segments_k, sinks, out):
    way = zigzag if zigzag.serves(found) else ring

    def local(q, k, v, segments_q, segments_k, sinks, axes):
        assert axes["L"] == (found.axis,), axes
        o, lse = way.attend(found, q, k, v, segments_q, segments_k, sinks)
        return o if isinstance(out, str) else (o, lse)

    args = (q, k, v, segments_q, segments_k, sinks)
    dims = ("BLH.", "BLK.", "BLK.", "BL", "BL", "H")
    return each_device(local, args, dims, out, heads=("H", "K"))


def block_sparse(q, k, v, blocks_BxLxGxN, starts_BxM, **options):
    """As `kernels_pallas.block_sparse`."""

    def local(*args, axes):
        del axes
        return _block_sparse(*args, **options)

    args = (q, k, v, blocks_BxLxGxN, starts_BxM)
    dims = ("BLH.", "B.K.", "B.K.", "BLG.", "B.")
    out = ("BLH.", "BLH") if options.get("return_lse") else "BLH."
    return each_device(local, args, dims, out, heads=("H", "K", "G"))


def token_sparse(q, kv, chosen, **options):
    """As `kernels_pallas.token_sparse`."""

    def local(*args, axes):
        del axes
        return _token_sparse(*args, **options)

    out = ("BLH.", "BLH") if options.get("return_lse") else "BLH."
    return each_device(local, (q, kv, chosen), ("BLH.", "B..", "BL."), out)


def one_softmax(q, *parts: Part):
    """(o, lse) of one softmax over the keys of all parts, each read in its own way.

    Shapes: q [B, L, H, D] -> o [B, L, H, Dv] and lse [B, L, H]; a part's arrays as of its op.
    """
    alone: dict[str, Callable] = {"flash": flash, "block_sparse": block_sparse}
    alone["token_sparse"] = token_sparse
    return joined.attend(q, parts, alone, _ring)


def recall(q, parts, o, lse):
    """What `one_softmax` gave before, with its gradients: `kernels_pallas.joined.recall`."""
    return _joined.recall(q, parts, o, lse)


def token_mass(q, kv, chosen, lse, **options):
    """As `kernels_pallas.token_sparse.token_mass`; without gradients, also across devices."""

    def local(*args, axes):
        mass = _token_mass(*args, **options)
        return jax.lax.psum(mass, axes["H"]) if axes.get("H") else mass

    args = jax.lax.stop_gradient((q, kv, chosen, lse))
    return each_device(local, args, ("BLH.", "B..", "BL.", "BLH"), "BL.")


def index_select(q, k, w, *, segments_q=None, segments_k=None, ends_BxS=None, **options):
    """As `kernels_pallas.indexer`."""

    def local(q, k, w, segments_q, segments_k, ends, axes):
        first = first_row(axes, q.shape[1])
        return _index_select(
            q, k, w, segments_q=segments_q, segments_k=segments_k, ends_BxS=ends, **options,
            **({} if first is None else {"first": first}),
        )

    segments_k = segments_q if segments_k is None else segments_k
    args = (q, k, w, segments_q, segments_k, ends_BxS)
    return each_device(local, args, ("BL..", "B..", "BL.", "BL", "B.", "B."), "BL.")


def index_kl_dense(
    q, k, w, main_q, main_k, main_lse, *, segments_q=None, segments_k=None, ends_BxS=None,
    **options,
):
    """As `kernels_pallas.indexer`."""

    def local(q, k, w, main_q, main_k, main_lse, segments_q, segments_k, ends, axes):
        first = first_row(axes, q.shape[1])
        return _index_kl_dense(
            q, k, w, main_q, main_k, main_lse, segments_q=segments_q, segments_k=segments_k,
            ends_BxS=ends, **options, **({} if first is None else {"first": first}),
        )

    segments_k = segments_q if segments_k is None else segments_k
    args = (q, k, w, main_q, main_k, main_lse, segments_q, segments_k, ends_BxS)
    dims = ("BL..", "B..", "BL.", "BL..", "B...", "BL.", "BL", "B.", "B.")
    return each_device(local, args, dims, "BL")


def index_kl_listed(q, k, w, chosen, mass, **options):
    """As `kernels_pallas.indexer`."""

    def local(*args, axes):
        del axes
        return _index_kl_listed(*args, **options)

    args = (q, k, w, chosen, mass)
    return each_device(local, args, ("BL..", "B..", "BL.", "BL.", "BL."), "BL")
