"""Workdirs that look like real runs, made in milliseconds."""

import json
import math
from pathlib import Path

import numpy as np

DOMAINS = ("async and net", "data formats", "text & <markup>", "tools", "numbers")
CONFIG = {
    "name": "quickstart",
    "steps": 300,
    "seed": 0,
    "data": {"source": "python_stdlib", "tokenizer": "bpe:4096", "seq": 256, "batch": 32},
    "optim": {"kind": "muon", "lr": 0.002, "betas": [0.9, 0.95], "clip": 1.0},
    "model": {
        "width": 256,
        "layers": 4,
        "attention": {"kind": "mla", "heads": 4},
        "ffn": {
            "kind": "moe",
            "experts": 16,
            "router": {"kind": "sigmoid_bias", "rate": 1e-3},
        },
    },
}
SAMPLE = (
    'def parse(self, text="<b>&amp;</b>"):\n    """Return the tokens of text."""\n    return [\n'
)


def write(
    path: Path,
    *,
    steps: int = 300,
    done: int | None = None,
    seed: int = 0,
    layers: int = 3,
    experts: int = 16,
    bits: float = 2.0,
    status: str = "finished",
    config: dict | None = None,
    manifest_hash: str = "0123456789abcdef",
    **run,
) -> dict:
    """Write a workdir and return {'run', 'summary', 'metrics', 'eval', 'moe'} as written."""
    rng = np.random.default_rng(seed)
    config = CONFIG | {"steps": steps, "seed": seed} | (config or {})
    done = steps if done is None else done
    batch = 32 * 256
    metrics, evals, moe = [], [], []
    noise, level = rng.normal(0, 0.04, done), rng.uniform(0.8, 1.2, experts * layers)
    level = level.reshape(layers, experts)
    for step in range(1, done + 1):
        loss = 8.3 * step**-0.45 + 3.0 * bits / 2 + noise[step - 1]
        warm = min(1.0, step / 30) * min(1.0, (steps - step + 1) / (0.2 * steps))
        pace = 21000 * (1 + 0.03 * rng.normal()) * (0.55 if step % 97 == 0 else 1)
        row = {"step": step, "tokens": step * batch, "loss": loss, "lr": 0.002 * warm}
        row |= {"grad_norm": abs(0.4 + 3 / step + 0.05 * rng.normal()), "mfu": pace / 52500}
        metrics.append(row | {"tokens_per_second": pace, "bits_per_byte": loss / 2.6})
        if step % max(1, steps // 6) == 0 or step == done:
            final = bits + 1.2 * (1 - step / steps)
            spread = {d: final * (0.8 + 0.1 * i) for i, d in enumerate(DOMAINS)}
            per = {
                d: {"bits_per_byte": b, "nats_per_token": b * 1.6, "tokens": 40000 + 1000 * i}
                for i, (d, b) in enumerate(spread.items())
            }
            evals.append({"step": step, "tokens": step * batch, "bits_per_byte": final})
            evals[-1] |= {"nats_per_token": final * 1.6, "per_domain": per}
            evals[-1]["by_position"] = [
                {"from": a, "to": b, "nats_per_token": final * (1.7 - a / 1e3), "tokens": 1000 + a}
                for a, b in ((0, 64), (64, 128), (128, 256))
            ]
        if experts and step % max(1, steps // 40) == 0:
            uneven = 1 + (level - 1) * 4 * math.exp(-3 * step / steps)
            load = np.maximum(uneven, 0.0) / uneven.sum(1, keepdims=True)
            vio = load.max(1) / load.mean(1) - 1
            moe.append({"step": step, "max_vio": vio.tolist(), "load": load.tolist()})
            moe[-1]["dead_experts"] = int((load == 0).sum())
    record = {
        "name": config["name"],
        "config": config,
        "argv": ["sparse-pretrain", "train", "--config=quickstart.py", f"--workdir={path}"],
        "commit": "a1b2c3d4e5f6a7b8",
        "versions": {"jax": "0.12.0", "python": "3.12.3"},
        "device": {"kind": "cpu", "count": 1, "memory_bytes": 8 << 30},
        "manifest": {
            "hash": manifest_hash,
            "source": "python_stdlib",
            "overlap_50": 0.012,
            "domains": {
                d: {"documents": 100 + i, "train_bytes": 2_000_000 + i, "heldout_bytes": 90_000 + i}
                for i, d in enumerate(DOMAINS)
            },
        },
        "derived": {
            "total_params": 12_345_678,
            "active_params": 4_567_890,
            "active_params_with_embedding": 5_616_466,
            "steps": steps,
            "tokens": steps * batch,
            "train_flops_per_token": 3.1e7,
        },
        "created": "2026-01-02T03:04:05+00:00",
        "status": status,
        **run,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps(record))
    for name, rows in (("metrics", metrics), ("eval", evals), ("moe", moe)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {}
    if status == "finished":
        last = evals[-1]
        summary = {
            "name": config["name"],
            "steps": steps,
            "tokens": steps * batch,
            "bits_per_byte": last["bits_per_byte"],
            "nats_per_token": last["nats_per_token"],
            "tokens_per_second": 20987.6,
            "compile_seconds": 11.5,
            "wall_seconds": 161.25,
            "flops": steps * batch * 3.1e7,
            "per_domain": last["per_domain"],
            "by_position": last["by_position"],
            "manifest_hash": manifest_hash,
            "sample": SAMPLE,
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return {"run": record, "summary": summary, "metrics": metrics, "eval": evals, "moe": moe}
