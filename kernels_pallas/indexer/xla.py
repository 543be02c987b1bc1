"""The indexer for any platform, with its own backward passes.

Queries go by chunks against all keys that could be before them: a chunk's scores are all that is
held. The queries are cut in a few parts first, and a part meets only the keys that end inside it or
before, so that little more than the causal half is computed. Letters beside the house's: C queries
of a chunk.

Keys are chosen without a sort (select.py). Measured by kernels_pallas.bench on two busy cores
without AMX (jax 0.12), milliseconds of index_select so and with `lax.top_k`: dsa_4k 140 and 451,
csa_4k 35 and 142.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.indexer import select

NOTHING, EMPTY = -1e30, -1e29
# Scores of one chunk over all heads, parts of a long row, and queries that are worth parting.
# Measured with AMX, a row of 4096, 4 heads of 32; the divergence over all keys, forward and
# backward, in milliseconds with one and two threads: 1 << 18: 235 and 215, 20: 274 and 158, 22: 495
# and 182.
SCORES, PARTS, SHORT = 1 << 20, 4, 512
# Scores that are chosen from at once, and products of all heads that they are made of at once.
# Fewer rows at once leave products with many keys at half the processor's rate. Scoring tile by
# tile of keys, up to the last that a query sees, was slower: a tile's scores lie strewn in the
# order of select.py.
CHOSEN, MULTIPLIED = 1 << 20, 1 << 22


class Plan(NamedTuple):
    """All that is known when tracing."""

    scale: float
    main_scale: float
    stride: int
    span: int


class Marks(NamedTuple):
    """What masks beside positions, each None or int: segments [B, L] and [B, S], ends [B, S].

    `first` [] is the row of query 0, None for 0.
    """

    segments_q: Any = None
    segments_k: Any = None
    ends: Any = None
    first: Any = None


def marks_of(segments_q, segments_k, ends, first):
    """Return what masks beside positions."""
    known = isinstance(first, int) and first == 0
    return Marks(segments_q, segments_k, ends, None if known else jnp.asarray(first, jnp.int32))


def wide(dtype):
    """Return the dtype of scores and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _parts(L, S, stride, span, whole=False):
    """Return (first query, last query + 1, keys that may end before that) of every part.

    `whole`: nobody knows where the queries stand, so any key may.
    """
    count = PARTS if L > SHORT else 1
    edges = [L * i // count for i in range(count + 1)]
    seen = [S if whole else min(S, max(1, (b - span) // stride + 1)) for b in edges[1:]]
    return list(zip(edges[:-1], edges[1:], seen, strict=True))


def keys_per_query(length, *, keys=None, stride=1, span=1):
    """Return how many keys a query is scored against, on average, later ones among them.

    Units: keys, of `keys` [S], `length` when None: what is executed.
    """
    S = length if keys is None else keys
    if not S:
        return 0.0
    parts = _parts(length, S, stride, span)
    return sum((b - a) * seen for a, b, seen in parts) / length


def choice_per_query(length, top, *, keys=None, stride=1, span=1):
    """Return the FLOPs of a query's choice, on average, its scores aside: as executed."""
    S = length if keys is None else keys
    if not S:
        return 0.0
    parts = _parts(length, S, stride, span)
    return sum((b - a) * select.flops(seen, min(top, seen)) for a, b, seen in parts) / length


def sweep(plan, S, width, xs, call, carry, marks, held=SCORES):
    """Run `call(carry, chunk of xs, its first row, keys)` over all queries; join what it returns.

    xs are [B, L, ...]; `width` numbers are held for every query and key, `held` in all.
    """
    B, L = xs[0].shape[:2]
    outs = []
    for a, b, seen in _parts(L, S, plan.stride, plan.span, marks.first is not None):
        chunks = -(-(b - a) * seen * width * B // held)
        C = -(-(b - a) // max(1, min(chunks, b - a)))

        def cut(x, a=a, b=b, C=C):
            x = lax.slice_in_dim(x, a, b, axis=1)
            x = jnp.pad(x, ((0, 0), (0, -(b - a) % C), *((0, 0) for _ in x.shape[2:])))
            x = x.reshape(B, -1, C, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        cuts = tuple(cut(x) for x in xs)
        first = a + C * lax.iota(jnp.int32, cuts[0].shape[0])

        def body(carry, x, seen=seen):
            return call(carry, x[1:], x[0], seen)

        carry, out = lax.scan(body, carry, (first, *cuts))
        join = functools.partial(_join, B=B, length=b - a)
        outs.append(jax.tree.map(join, out))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outs)


def _join(x, B, length):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(B, -1, *x.shape[3:])[:, :length]


def seen_by(plan, marks, first, C, keys, segments_q):
    """[B or 1, C, keys]: which keys each query of a chunk may see."""
    row = first + lax.iota(jnp.int32, C)
    if marks.first is not None:
        row = row + marks.first
    if marks.ends is None:
        ends = (lax.iota(jnp.int32, keys) * plan.stride + (plan.span - 1))[None]
    else:
        ends = marks.ends[:, :keys]
    seen = ends[:, None, :] <= row[None, :, None]
    if marks.segments_k is not None:
        same = segments_q[:, :, None] == marks.segments_k[:, None, :keys]
        seen = seen & same & (segments_q != 0)[:, :, None]
    return seen


def own_segments(marks, q):
    """Return the queries' segments [B, L], zeros where there are none."""
    return jnp.zeros(q.shape[:2], jnp.int32) if marks.segments_q is None else marks.segments_q


def stands(marks, first):
    """The row of a chunk's first query."""
    return first if marks.first is None else first + marks.first


def products(q, k, dtype):
    """Products [B, C, J, keys]: rows by keys, as XLA:CPU runs on the matrix units."""
    B, C, J, D = q.shape
    raw = jnp.einsum("brd,bsd->brs", q.reshape(B, C * J, D), k, preferred_element_type=dtype)
    return raw.reshape(B, C, J, -1)


def scored(plan, raw, w):
    """[B, C, keys] of raw products and the heads' weights."""
    w = w.astype(raw.dtype) * plan.scale
    return added(jnp.maximum(raw[:, :, j], 0) * w[:, :, j, None] for j in range(w.shape[2]))


def added(parts):
    """Return the sum of arrays, written out.

    XLA:CPU (jax 0.12) vectorises no reduction along a dim that is not the last.
    """
    return functools.reduce(jnp.add, parts)


def index_select(q_BxLxJxD, k_BxSxD, w_BxLxJ, *, top, segments_q=None, segments_k=None,
                 ends_BxS=None, stride=1, span=1, scale=1.0, first=0):
    """Score some queries at a time, and choose for many of them at once."""
    q, k, w = lax.stop_gradient((q_BxLxJxD, k_BxSxD, w_BxLxJ))
    (B, L, J), S = q.shape[:3], k.shape[1]
    if 0 in (B, L, S):
        return jnp.full((B, L, top), -1, jnp.int32)
    plan, dtype = Plan(float(scale), 1.0, stride, span), wide(q.dtype)
    marks = marks_of(segments_q, segments_k, ends_BxS, first)
    ends = marks.ends
    if ends is None:
        ends = (lax.iota(jnp.int32, S) * stride + (span - 1))[None]
    parts = {}
    for *_, keys in _parts(L, S, stride, span, marks.first is not None):
        levels = select.levels(keys, min(top, keys))
        lay = functools.partial(select.spread, dim=1, levels=levels)
        own = None if marks.segments_k is None else lay(marks.segments_k[:, :keys])
        later = lay(ends[:, :keys].astype(jnp.int32), fill=jnp.iinfo(jnp.int32).max)
        parts[keys] = levels, lay(k[:, :keys]), marks._replace(ends=later, segments_k=own)

    def chunk(carry, x, first, keys):
        levels, table, where = parts[keys]
        (_, C), N = x[0].shape[:2], table.shape[1]
        c = -(-C // -(-B * C * J * N // MULTIPLIED))  # scored at once
        n = -(-C // c)

        def cut(x):
            x = jnp.pad(x, ((0, 0), (0, n * c - C), *((0, 0) for _ in x.shape[2:])))
            return jnp.moveaxis(x.reshape(B, n, c, *x.shape[2:]), 1, 0)

        def score(part):
            first, q, w, segments = part
            seen = seen_by(plan, where, first, c, N, segments)
            return jnp.where(seen, scored(plan, products(q, table, dtype), w), -jnp.inf)

        rows = first + c * lax.iota(jnp.int32, n)
        scores = lax.map(score, (rows, *(cut(part) for part in x)))
        found = select.largest(scores.reshape(n * B * c, N), min(top, keys), levels)
        found = jnp.moveaxis(found.reshape(n, B, c, -1), 0, 1).reshape(B, n * c, -1)[:, :C]
        spare = ((0, 0), (0, 0), (0, top - found.shape[-1]))
        return carry, jnp.pad(found, spare, constant_values=-1)

    xs = (q, w, own_segments(marks, q))
    return sweep(plan, S, 1, xs, chunk, None, marks, CHOSEN)[1]


def best(plan, marks, q_BxLxJxD, k_BxSxD, w_BxLxJ, top, score, width, held=SCORES):
    """Return the numbers of the best keys, -1 for none, [B, L, top], by chunks of queries.

    `score(first row, q, k, w, segments)` returns a chunk's scores [B, C, keys], -inf for what is
    not seen, and holds `width` numbers for each.
    """
    own = own_segments(marks, q_BxLxJxD)

    def chunk(carry, x, first, keys):
        q, w, segments = x
        value, at = lax.top_k(score(first, q, k_BxSxD[:, :keys], w, segments), min(top, keys))
        at = jnp.where(value > -jnp.inf, at.astype(jnp.int32), -1)
        spare = ((0, 0), (0, 0), (0, top - at.shape[-1]))
        return carry, jnp.pad(at, spare, constant_values=-1)

    xs = (q_BxLxJxD, w_BxLxJ, own)
    return sweep(plan, k_BxSxD.shape[1], width, xs, chunk, None, marks, held)[1]


def selecting(scores, held):
    """Return index_select of a chip's kernel, which scores so many pairs at once.

    scores(plan, marks, first row, q, k, w, segments) returns a chunk's, as `best` wants them.
    """
    def index_select(q_BxLxJxD, k_BxSxD, w_BxLxJ, *, top, segments_q=None, segments_k=None,
                     ends_BxS=None, stride=1, span=1, scale=1.0, first=0):
        """Score a part of the queries and take their best."""
        q, k, w = lax.stop_gradient((q_BxLxJxD, k_BxSxD, w_BxLxJ))
        (B, L), S = q.shape[:2], k.shape[1]
        if 0 in (B, L, S):
            return jnp.full((B, L, top), -1, jnp.int32)
        marks = marks_of(segments_q, segments_k, ends_BxS, first)
        plan = Plan(float(scale), 1.0, stride, span)

        def score(first, q, k, w, segments):
            return scores(plan, marks, stands(marks, first), q, k, w, segments)

        return best(plan, marks, q, k, w, top, score, 1, held)

    return index_select
