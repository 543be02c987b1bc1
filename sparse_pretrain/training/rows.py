"""What a step, an evaluation and a run leave in the files, from what the device returned."""

from typing import Any

import numpy as np

from sparse_pretrain.training import evaluate


def of_step(out: dict[str, Any], *, tokens: int, seconds: float, cpu: float) -> dict[str, Any]:
    """A step's numbers as in metrics.jsonl; `tokens` positions took `seconds`, and `cpu` of CPU."""
    row = {
        "loss": float(out["loss"]),
        "bits_per_byte": float(out["bits_per_byte"]),
        "lr": float(out["lr"]),
        "grad_norm": float(out["grad_norm"]),
        "tokens_per_second": tokens / seconds,  # as in the summary: all positions
        "step_seconds": seconds,
        "step_cpu_seconds": cpu,  # all threads of this process: what a busy machine cannot stretch
    }
    if "indexer_loss" in out:
        row["indexer_loss"] = float(out["indexer_loss"])
    if "mtp_loss" in out:  # 2, 3 .. tokens on
        row["mtp_loss"] = np.asarray(out["mtp_loss"], np.float64).tolist()
    if out["max_vio"]:
        row["max_vio"] = float(_violations(out).mean())
        row["dead_experts"] = int(sum((x == 0).sum() for x in _loads(out)))
    return row


def of_experts(out: dict[str, Any]) -> dict[str, Any]:
    """A step's expert loads and prices as in moe.jsonl, layers from the bottom up."""
    return {
        "max_vio": _violations(out).tolist(),
        "load": [row.tolist() for layer in _loads(out) for row in layer],
        "dead_experts": int(sum((x == 0).sum() for x in _loads(out))),
        **_market(out["market"]),
    }


def _violations(out: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.atleast_1d(v) for v in out["max_vio"].values()])


def _loads(out: dict[str, Any]) -> list[np.ndarray]:
    return [np.atleast_2d(v) for v in out["load"].values()]


def _market(told: dict[str, Any]) -> dict[str, Any]:
    """Per layer, from the bottom up: every expert's price and the dual objective, where known."""
    rows: dict[str, Any] = {}
    for name, wide in (("price", True), ("objective", False)):
        known = [np.asarray(layer[name]) for layer in told.values() if name in layer]
        if known:
            layers = [np.atleast_2d(a) if wide else np.atleast_1d(a) for a in known]
            rows[name] = np.concatenate(layers).tolist()
    return rows


def cpu_seconds(steps: list[dict[str, Any]]) -> float | None:
    """CPU time of the steps; None when some are of a run from before it was recorded."""
    if any("step_cpu_seconds" not in row for row in steps):
        return None
    return float(sum(row["step_cpu_seconds"] for row in steps))


def batch_balance(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`max_vio_batch`: MaxVio of single batches, mean over the last tenth of training."""
    last = [r["max_vio"] for r in rows[-(-9 * len(rows) // 10) :] if "max_vio" in r]
    return {"max_vio_batch": float(np.mean(last))} if last else {}


def scored(scores: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's fields as they appear in eval.jsonl and summary.json."""
    keep = ("bits_per_byte", "nats_per_token", "per_domain", "by_position")
    row = {k: scores[k] for k in keep} | {"heldout_tokens": scores["tokens"]}
    row |= {k: scores[k] for k in ("accuracy", "duality_gap") if k in scores}
    return row | (evaluate.balance(scores["load"]) if "load" in scores else {})
