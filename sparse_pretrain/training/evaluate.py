"""Held-out loss over a finite list of batches, in total and per domain."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import nn, shapes
from sparse_pretrain.training import loss


class Evaluator:
    """Scores batches of one model; compiled once and used for every evaluation of a run."""

    def __init__(self, definition: nn.Definition, domains: tuple[str, ...]):
        self._domains = domains
        self._rows = rows = max(len(domains), 1)

        @jax.jit
        def step(params, prices, batch: shapes.Batch):
            """Sums of nats, targets and bytes, [domains, 3]."""
            model = definition.merge(params, prices)
            hidden, _ = model(batch)
            _, nats = loss.token_losses(model, hidden, batch)
            counted = (batch.weights > 0).astype(jnp.float32)
            size = batch.bytes.astype(jnp.float32) * counted
            columns = jnp.stack([nats * batch.weights, batch.weights, size], -1)
            mine = (
                batch.domains[..., None]
                == jnp.arange(rows, dtype=batch.domains.dtype)[None, None, :]
            )
            return jnp.einsum("bld,blc->dc", mine.astype(jnp.float32), columns)

        self._step = step

    def __call__(self, params: Any, prices: Any, batches: Iterable[shapes.Batch]) -> dict[str, Any]:
        """Nats per token and bits per byte, in total and per domain.

        Sums of a batch are float32 on the device, sums over batches float64 on the host.
        Errors: ValueError when the batches hold no target.
        """
        total, pending = np.zeros((self._rows, 3), np.float64), None
        for batch in batches:
            sums = self._step(params, prices, batch)
            if pending is not None:  # read one batch late, so that the device is never idle
                total += np.asarray(pending, np.float64)
            pending = sums
        if pending is not None:
            total += np.asarray(pending, np.float64)
        if not total[:, 1].sum():
            raise ValueError("eval: the text holds no target to score")
        rows = {name: _row(total[i]) for i, name in enumerate(self._domains) if total[i, 1]}
        return {**_row(total.sum(0)), "per_domain": rows}


def _row(sums) -> dict[str, float]:
    nats, tokens, size = (float(x) for x in sums)
    return {
        "bits_per_byte": nats / math.log(2) / max(size, 1.0),
        "nats_per_token": nats / tokens,
        "tokens": int(tokens),
    }
