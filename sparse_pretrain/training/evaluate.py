"""Held-out loss over a finite list of batches: in total, by domain and position; experts' load."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_pretrain import nn, shapes
from sparse_pretrain.games import prices
from sparse_pretrain.model import lm
from sparse_pretrain.routing.base import market_means
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import apply
from sparse_pretrain.training import loss

FIRST = 64  # tokens in the first bucket of positions


def edges(length: int) -> tuple[int, ...]:
    """Where the buckets of positions begin, and where the last ends: 0, 64, 128, 256 .. length."""
    found, edge = [0], FIRST
    while edge < length:
        found.append(edge)
        edge *= 2
    return (*found, length)


class Evaluator:
    """Scores batches of one model; compiled once and used for every evaluation of a run.

    With `accuracy` also whether each target is the likeliest token, which needs the logits of a
    row: for tasks with an answer, and not for text.
    """

    def __init__(
        self,
        definition: nn.Definition,
        domains: tuple[str, ...],
        *,
        accuracy: bool = False,
        placed: apply.Placed | None = None,
    ):
        self._domains = domains
        self._rows = rows = max(len(domains), 1)

        def step(params, prices, batch: shapes.Batch):
            """Sums of nats, targets, bytes, perhaps hits, by domain and position; loads, gaps."""
            model = definition.merge(params, prices)
            hidden, aux = model(batch)
            _, nats = loss.token_losses(model, hidden, batch)
            counted = (batch.weights > 0).astype(jnp.float32)
            size = batch.bytes.astype(jnp.float32) * counted
            told = [nats * batch.weights, batch.weights, size]
            if accuracy:
                told.append(hits(model, hidden, batch.targets) * batch.weights)
            columns = jnp.stack(told, -1)
            mine = (
                batch.domains[..., None]
                == jnp.arange(rows, dtype=batch.domains.dtype)[None, None, :]
            )
            cuts, place = edges(batch.tokens.shape[1]), batch.positions[..., None]
            starts, ends = (jnp.array(c, place.dtype)[None, None] for c in (cuts[:-1], cuts[1:]))
            groups = jnp.concatenate([mine, (place >= starts) & (place < ends)], -1)
            sums = jnp.einsum("blg,blc->gc", groups.astype(jnp.float32), columns)
            markets = {g: market_means(told) for g, told in aux.market.items()}
            gaps = {g: means["gap"] for g, means in markets.items() if "gap" in means}
            return sums, aux.load, gaps

        self._placed = placed
        jit: Any = jax.jit if placed is None else placed.jit
        # every process reads the sums
        everywhere = {} if placed is None else {"out_shardings": placed.replicated}
        self._step = jit(step, **everywhere)

    def __call__(self, params: Any, prices: Any, batches: Iterable[shapes.Batch]) -> dict[str, Any]:
        """Nats per token and bits per byte, in total and per domain; `load`, pairs per expert.

        `by_position`: nats per token by the place of the token that predicts, counted from where
        its document begins in the row.
        `accuracy`, where it was asked for, is the weighted share of targets that are likeliest.

        Shapes: load [N, E] over the layers with experts from the bottom up, absent without any;
        `duality_gap` [] per token, mean over batches and layers with prices, absent without any.
        Sums of a batch are float32 on the device, sums over batches float64 on the host.
        Errors: ValueError when the batches hold no target.
        """
        total, pending = np.zeros((), np.float64), None
        load: list[np.ndarray] = []
        gaps: list[float] = []

        def add(sums, loads, gap):
            nonlocal total, load
            found = [np.atleast_2d(np.asarray(x, np.float64)) for x in loads.values()]
            load = [a + b for a, b in zip(load, found, strict=True)] if load else found
            total = total + np.asarray(sums, np.float64)
            gaps.extend(float(np.mean(x)) for x in gap.values())

        length = 0
        for batch in batches:
            length = batch.tokens.shape[1]
            if self._placed is not None:
                # rows are those of all processes, which hold equal shares
                batch = self._placed.put(batch, batch.tokens.shape[0] * self._placed.shares)
            sums = self._step(params, prices, batch)
            if pending is not None:  # read one batch late, so that the device is never idle
                add(*pending)
            pending = sums
        if pending is not None:
            add(*pending)
        if not total.ndim or not total[: self._rows, 1].sum():
            raise ValueError("eval: the text holds no target to score")
        total, places = np.split(total, [self._rows])
        rows = {name: _row(total[i]) for i, name in enumerate(self._domains) if total[i, 1]}
        scores = {**_row(total.sum(0)), "per_domain": rows, "by_position": _curve(places, length)}
        scores |= {"load": np.concatenate(load)} if load else {}
        return scores | ({"duality_gap": float(np.mean(gaps))} if gaps else {})


def hits(
    model: lm.LM, hidden: Float[Array, "B L D"], targets: Int[AnyArray, "B L"]
) -> Float[Array, "B L"]:
    """1 where the target is the likeliest token, the first of equals; one row's logits at a time.

    A softcap keeps the order, so it is left out.
    """
    head, layout = model.head_weight(hidden.dtype)
    head = head.astype(hidden.dtype)

    def row(part):
        x_LxD, target_L = part
        letters = "ld,dv->lv" if layout == "DV" else "ld,vd->lv"
        logits = jnp.einsum(letters, x_LxD, head, preferred_element_type=jnp.float32)
        return (jnp.argmax(logits, axis=-1) == target_L).astype(jnp.float32)

    return jax.lax.map(row, (hidden, jnp.asarray(targets)))


def balance(load_NxE: Float[np.ndarray, "N E"]) -> dict[str, Any]:
    """How evenly experts are used: `max_vio_global` mean over layers, `dead_experts` in all layers.

    Source: MaxVio_global of 2408.15664, over the whole held-out text.
    """
    worst = np.asarray(prices.max_violation(jnp.asarray(load_NxE, jnp.float32)))
    return {"max_vio_global": float(worst.mean()), "dead_experts": int((load_NxE == 0).sum())}


def _curve(sums_Px3, length: int) -> list[dict[str, Any]]:
    """A row per bucket of positions that holds a target."""
    found = []
    for start, end, sums in zip(edges(length)[:-1], edges(length)[1:], sums_Px3, strict=True):
        if sums[1]:
            row = _row(sums)
            keep = {key: row[key] for key in ("nats_per_token", "tokens")}
            found.append({"from": start, "to": end, **keep})
    return found


def _row(sums) -> dict[str, float]:
    nats, tokens, size, *right = (float(x) for x in sums)
    row = {
        "bits_per_byte": nats / math.log(2) / max(size, 1.0),
        "nats_per_token": nats / tokens,
        "tokens": int(tokens),
    }
    return row | ({"accuracy": right[0] / tokens} if right else {})
