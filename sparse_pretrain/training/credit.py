"""What each sequence and each domain of a step is worth to a target text, while a run trains."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_pretrain import nn, shapes, spec
from sparse_pretrain.games import shapley
from sparse_pretrain.training import loss, step

MIXED = "(several)"  # the domain of a row in which documents of several meet


class Creditor:
    """Measures steps of one model; compiled once.

    A credit is in nats per token of the target: what a step along the gradient of that sequence
    alone would save, at the step's rate, in the batch's mean. All of a step's add up to the fall of
    the target's loss, to first order. That step is plain descent: the optimizer's own is turned and
    scaled by what it has seen before. Losses are those of held-out text, where routers go by their
    prices and the balance counts nothing; the z-loss does.
    """

    def __init__(self, definition: nn.Definition, section: shapley.Config, *, seq: int = 0):
        self._seq = seq

        def nats(params, prices, batch):
            model = definition.merge(params, prices)
            total, _ = loss.token_losses(model, model(batch)[0], batch)
            return total  # nats per token alone would pass no gradient

        @jax.jit
        def add(params, prices, batch, total):
            more = jax.grad(nats)(params, prices, batch)
            return jax.tree.map(jnp.add, total, more)

        @jax.jit
        def credits(params, prices, batch, target, share):
            """Rows' credits [B] for a step of size 1, and those by expert."""
            batch = step.cut(batch, seq) if seq else batch
            target = jax.tree.map(lambda g: g * share, target)
            weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
            parts = None
            if section.experts:
                parts = lambda found: shapley.by_expert(found, definition.dims)  # noqa: E731
            found, kept = shapley.first_order(
                lambda p, row: nats(p, prices, row) / weight, params, batch, target, parts
            )
            return found, kept

        self._add, self._credits = add, credits

    def __call__(
        self, params: Any, prices: Any, batch: Any, targets: list[Any], domains: tuple[str, ...],
        rate: float,
    ) -> dict[str, Any]:  # fmt: skip
        """A step's row of the log, before the step is taken.

        `credit` by domain, `credit_tokens` targets by domain, `credit_rows` of every sequence (as a
        matrix of one row, which only the file keeps), `credit_experts` by layer and expert.
        """
        total = jax.tree.map(jnp.zeros_like, params)
        for target in targets:
            total = self._add(params, prices, target, total)
        share = 1.0 / sum(float(np.sum(t.weights)) for t in targets)
        credit, kept = jax.device_get(
            self._credits(params, prices, batch, total, jnp.float32(share))
        )
        weights, names = (np.asarray(x) for x in (batch.weights, batch.domains))
        if self._seq:
            weights, names = (x.reshape(-1, self._seq) for x in (weights, names))
        credit = np.asarray(credit, np.float64) * rate
        owner, all_names = _owners(weights, names, domains)
        sums = shapley.by_group(credit, owner, len(all_names))
        tokens = shapley.by_group(weights.sum(1).astype(np.float64), owner, len(all_names))
        seen = [k for k in range(len(all_names)) if tokens[k]]
        row: dict[str, Any] = {
            "credit": {all_names[k]: float(sums[k]) for k in seen},
            "credit_tokens": {all_names[k]: int(tokens[k]) for k in seen},
            "credit_rows": [credit.tolist()],
        }
        if kept:
            layers = [np.atleast_2d(kept[name]) * rate for name in sorted(kept)]
            row["credit_experts"] = [each.tolist() for layer in layers for each in layer]
        return row


def _owners(weights_BxL, names_BxL, domains) -> tuple[np.ndarray, tuple[str, ...]]:
    """The domain of each row's targets, one past the last where they are of several; and names."""
    counted = weights_BxL > 0
    low = np.where(counted, names_BxL, np.iinfo(np.int32).max).min(1)
    high = np.where(counted, names_BxL, -1).max(1)
    owner = np.where(low == high, high, len(domains))
    return np.where(high < 0, 0, owner), (*(domains or ("all",)), MIXED)


def targets(section: shapley.Config, dataset: Any) -> list[shapes.Batch]:
    """The batches that credit is given for.

    Errors: ValueError naming the field where the file cannot be read or says nothing.
    """
    if not section.text:
        found = list(dataset.heldout(limit_tokens=section.tokens))
    else:
        path = Path(section.text).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
            count = -(-section.tokens // (dataset.config.batch * dataset.config.seq))
            found = list(itertools.islice(dataset.text(text), count))
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or type(e).__name__
            raise ValueError(f"config.credit.text: cannot read {path}: {reason}") from None
        except ValueError as e:
            raise ValueError(f"config.credit.text: {path}: {e}") from None
    spec.require(
        any(np.any(b.weights > 0) for b in found), "config.credit: its target holds no text"
    )
    return found


def per_token(row: dict[str, Any]) -> dict[str, float]:
    """A measured step's credit per target, by domain."""
    return {k: v / row["credit_tokens"][k] for k, v in row["credit"].items()}


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`credit`: sums over the steps that were measured, by domain; nothing without such steps."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.get("credit", {}).items():
            kept = found.setdefault(name, {"credit": 0.0, "tokens": 0})
            kept["credit"] += value
            kept["tokens"] += row["credit_tokens"][name]
    return {"credit": found} if found else {}
