"""A fitted law as a record: constants, intervals, where they come from, and how to read it back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import law

CONFIDENCE = 0.95
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A law with the parameters of its fit and of its bootstrap.

    `kind` names the law in `laws.TABLE`; `theta` are its internal parameters, `samples` those of
    every bootstrap refit; `constants` and `intervals` what people read. `noise` is the standard
    deviation of log loss about the law; `span` the least and largest value of each column that was
    fitted, which is where the law is known to hold; `accuracy` the curves from loss to accuracy of
    the tasks that the runs were scored on, as `accuracy.Curve.to_json` writes them.
    """

    kind: str
    theta: Float64[np.ndarray, " parameters"]
    samples: Float64[np.ndarray, "refits parameters"]
    constants: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    dropped: tuple[dict[str, Any], ...]
    rule: str
    runs: int
    objective: float
    delta: float
    noise: float
    span: Mapping[str, tuple[float, float]]
    held_out: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    accuracy: tuple[Mapping[str, Any], ...] = ()

    def predict(
        self,
        features: law.Terms,
        *,
        confidence: float = CONFIDENCE,
        runs: bool = True,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss, low, high) at each row of `features`.

        With `runs` the interval is that of the loss a run will have, else that of the law.
        """
        middle = law.values(features, self.theta)
        draws = law.values(features, self.samples)
        if runs:
            rng = np.random.default_rng(seed)
            draws = draws + self.noise * rng.standard_normal(draws.shape)
        tail = 50 * (1 - confidence)
        low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
        return np.exp(middle), np.exp(np.minimum(low, middle)), np.exp(np.maximum(high, middle))

    def to_json(self, *, samples: bool = True) -> dict[str, Any]:
        """Plain data; `samples=False` leaves out what only a forecast needs."""
        out: dict[str, Any] = {"law": self.kind, **self.constants}
        out |= {"intervals": {k: list(v) for k, v in self.intervals.items()}}
        out |= {"confidence": CONFIDENCE, "dropped": list(self.dropped), "rule": self.rule}
        out |= {"runs": self.runs, "objective": self.objective, "delta": self.delta}
        out |= {"noise": self.noise, "span": {k: list(v) for k, v in self.span.items()}}
        out |= {"held_out": self.held_out, "provenance": dict(self.provenance)}
        if samples:
            out |= {"version": VERSION, "theta": self.theta.tolist()}
            out["samples"] = [[float(f"{x:.9g}") for x in row] for row in self.samples]
            out |= {"accuracy": [dict(curve) for curve in self.accuracy]}
        return out


FIELDS = ("intervals", "dropped", "rule", "runs", "objective", "delta", "noise", "span")


def read(path: Path | str) -> Fit:
    """The fit in a JSON file that `fit --out` wrote.

    Errors: ValueError naming the file and what it lacks.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"fit: there is no file {path}") from None
    except (OSError, ValueError):
        raise ValueError(f"fit: {path} is not a JSON file") from None
    return from_json(content, str(path))


def from_json(content: Any, name: str = "fit") -> Fit:
    """The fit that plain data holds. Errors: ValueError naming what it lacks."""
    need = ("law", "theta", "samples", *FIELDS, "held_out", "provenance")
    lacks = [k for k in need if not isinstance(content, dict) or k not in content]
    if lacks:
        raise ValueError(f"fit: {name} is no fit, it has no {lacks[0]!r}")
    known = {*need, "version", "confidence", "accuracy"}
    return Fit(
        kind=content["law"],
        theta=np.array(content["theta"], np.float64),
        samples=np.array(content["samples"], np.float64),
        constants={
            k: float(v)
            for k, v in content.items()
            if k not in known and isinstance(v, (int, float))
        },
        intervals={k: (float(v[0]), float(v[1])) for k, v in content["intervals"].items()},
        dropped=tuple(content["dropped"]),
        rule=content["rule"],
        runs=int(content["runs"]),
        objective=float(content["objective"]),
        delta=float(content["delta"]),
        noise=float(content["noise"]),
        span={k: (float(v[0]), float(v[1])) for k, v in content["span"].items()},
        held_out=content["held_out"],
        provenance=content["provenance"],
        accuracy=tuple(content.get("accuracy", ())),
    )
