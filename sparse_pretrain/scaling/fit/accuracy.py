"""Accuracy on a task as a curve over held-out loss, and where it is known."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.scaling.fit import record

Values = Sequence[float] | np.ndarray

# Of the fitted span of losses: as far as a curve is read past its runs. At a quarter, eight of ten
# runs of experiments/isoflop.py lay inside their intervals, and all above the curve.
BEYOND = 0.1
CLEAR = 2.0  # standard errors above guessing that the best run must be
FORMULA = "accuracy = chance + (1 - chance) / (1 + exp(slope (loss - middle)))"
SOURCE = (
    "a logistic curve from loss to accuracy, as Llama 3 (2407.21783, section 3.2.1) and Gadre et "
    "al. (2403.08540, with an exponential) fit it to their own models"
)
OUTSIDE = "outside validity"
NONE = f"{OUTSIDE}: no task was scored on the fitted runs"
STEPS = 60  # of Fisher scoring at most


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy on `task` over loss; `samples` holds (middle, slope) of every refit.

    `spread` is how much wider than binomial the runs scatter (Pearson), `span` the least and the
    largest loss fitted. Units: loss nats/token, slope per nat.
    """

    task: str
    chance: float
    questions: float
    middle: float
    slope: float
    samples: Float64[np.ndarray, "refits 2"]
    intervals: Mapping[str, tuple[float, float]]
    spread: float
    span: tuple[float, float]
    runs: int
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        out = dataclasses.asdict(self)
        out["samples"] = [[float(f"{x:.7g}") for x in row] for row in self.samples]
        out["intervals"] = {k: list(v) for k, v in self.intervals.items()}
        return out | {"span": list(self.span), "formula": FORMULA, "source": SOURCE}


def from_json(content: Mapping[str, Any]) -> Curve:
    """The curve that plain data holds. Errors: ValueError naming what it lacks."""
    names = [f.name for f in dataclasses.fields(Curve)]
    lacks = [n for n in names if n not in content]
    if lacks:
        raise ValueError(f"fit: its curve of accuracy has no {lacks[0]!r}")
    given = {n: content[n] for n in names}
    given["samples"] = np.array(given["samples"], np.float64)
    given["intervals"] = {k: (v[0], v[1]) for k, v in given["intervals"].items()}
    given["span"] = tuple(given["span"])
    return Curve(**given)


def fit(
    task: str,
    losses: Values,
    accuracies: Values,
    *,
    questions: Values,
    chance: float = 0.0,
    bootstrap: int = 200,
    seed: int = 0,
) -> Curve:
    """The likeliest curve of binomial answers, with intervals by refits of resampled runs.

    `questions` is how many each run was asked, `chance` what guessing reaches. `why_not` says why
    the curve forecasts nothing, where no run is clearly above chance or accuracy does not fall with
    loss. Errors: ValueError below four runs, or naming what is no accuracy.
    """
    x, y, n = (np.array(v, np.float64) for v in (losses, accuracies, questions))
    if len(x) < 4:
        raise ValueError(f"accuracy: a curve takes 4 runs, got {len(x)}")
    if not ((y >= 0) & (y <= 1)).all():
        bad = float(y[(y < 0) | (y > 1)][0])
        raise ValueError(f"accuracy: must lie in [0, 1], got {bad:g}")
    if not (n > 0).all():
        raise ValueError(f"questions: must be positive, got {float(n.min()):g}")
    if not 0 <= chance < 1:
        raise ValueError(f"chance: must lie in [0, 1), got {chance:g}")
    best = _solve(x, y, n, chance, np.ones((1, len(x))), None)[0]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=bootstrap)
    samples = _solve(x, y, n, chance, weights.astype(np.float64), best)
    p = _at(x, best, chance)
    free = len(x) - 2
    pearson = float((n * (y - p) ** 2 / np.maximum(p * (1 - p), 1 / n)).sum() / free)
    tail = 50 * (1 - record.CONFIDENCE)
    ends = np.percentile(samples, [tail, 100 - tail], axis=0)
    top = int(y.argmax())
    why = ""
    if y[top] - chance < CLEAR * np.sqrt(max(chance * (1 - chance), 1 / n[top]) / n[top]):
        why = f"no fitted run is clearly above the {100 * chance:.3g} % of guessing"
    elif ends[0, 1] <= 0:
        why = "accuracy does not fall with loss on the fitted runs"
    return Curve(
        task=task,
        chance=float(chance),
        questions=float(np.median(n)),
        middle=float(best[0]),
        slope=float(best[1]),
        samples=samples,
        intervals={
            "middle": (float(ends[0, 0]), float(ends[1, 0])),
            "slope": (float(ends[0, 1]), float(ends[1, 1])),
        },
        spread=max(pearson, 1.0) ** 0.5,
        span=(float(x.min()), float(x.max())),
        runs=len(x),
        why_not=why,
    )


def _at(x: Any, theta: Any, chance: float) -> Any:
    z = np.clip(theta[..., 1] * (x - theta[..., 0]), -500, 500)
    return chance + (1 - chance) / (1 + np.exp(z))


def _solve(x, y, n, chance: float, weights, start) -> np.ndarray:
    """(middle, slope) of most likelihood for each row of `weights`, [refits, 2].

    Fisher scoring on a + b u with u the standardised loss, from `start` or the best of several; a
    weak prior on b keeps it finite where a step separates right from wrong.
    """
    centre, width = float(x.mean()), max(float(x.std()), 1e-6)
    u = np.stack([np.ones(len(x)), (x - centre) / width])
    prior = np.diag([0.0, 1e-3])
    weights = weights * n

    def chances(ab):
        rise = 1 / (1 + np.exp(-np.clip(ab @ u, -30, 30)))
        p = np.clip(chance + (1 - chance) * rise, 1e-9, 1 - 1e-9)
        return p, (1 - chance) * rise * (1 - rise)

    def likelihood(ab):
        p, _ = chances(ab)
        said = (weights * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum(1)
        return said - 0.5 * ((ab @ prior) * ab).sum(1)

    def climbed(ab):
        for _ in range(STEPS):
            p, slope = chances(ab)
            score = (weights * slope * (y - p) / (p * (1 - p))) @ u.T - ab @ prior
            heavy = weights * slope**2 / (p * (1 - p))
            fisher = np.einsum("rk,ik,jk->rij", heavy, u, u) + prior + 1e-9 * np.eye(2)
            move = np.linalg.solve(fisher, score[..., None])[..., 0]
            move /= np.maximum(1, np.abs(move).max(1, keepdims=True))
            before = likelihood(ab)
            for _ in range(20):  # halved until it does not lose
                worse = likelihood(ab + move) < before - 1e-12
                if not worse.any():
                    break
                move = np.where(worse[:, None], move / 2, move)
            ab = ab + move
            if np.abs(move).max() < 1e-9:
                break
        return ab

    if start is None:
        tried = [
            climbed(np.tile([a, b], (len(weights), 1))) for a in (-1.0, 1.0) for b in (-2.0, 1.0)
        ]
        ab = tried[int(np.argmax([likelihood(t).sum() for t in tried]))]
    else:
        ab = climbed(
            np.tile([start[1] * (start[0] - centre), -start[1] * width], (len(weights), 1))
        )
    b = np.where(np.abs(ab[:, 1]) < 1e-6, -1e-6, ab[:, 1])
    return np.stack([centre - width * ab[:, 0] / b, -b / width], 1)


def predict(
    curve: Curve, loss: float, interval: Sequence[float] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of a run whose loss is forecast: `accuracy`, `interval` (95 %), `validity`.

    The interval takes the lower end at the forecast's highest loss and the upper at its lowest, so
    it is wide rather than narrow. Outside validity accuracy and interval are None.
    """
    said: dict[str, Any] = {"task": curve.task, "accuracy": None, "interval": None}
    if curve.why_not:
        return said | {"validity": f"{OUTSIDE}: {curve.why_not}"}
    low, high = curve.span
    past = max(low - loss, loss - high, 0.0)
    where = f"loss {loss:.4g} against {low:.4g} to {high:.4g} of {curve.runs} fitted runs"
    if past > BEYOND * (high - low):
        return said | {"validity": f"{OUTSIDE}: {where}"}
    rng = np.random.default_rng(seed)
    ends = []
    for at, tail in zip(interval or (loss, loss), (97.5, 2.5), strict=True):
        p = _at(at, curve.samples, curve.chance)
        noise = curve.spread * np.sqrt(np.maximum(p * (1 - p), 0) / curve.questions)
        ends.append(float(np.percentile(p + noise * rng.standard_normal(p.shape), tail)))
    value = float(_at(loss, np.array([curve.middle, curve.slope]), curve.chance))
    said["accuracy"] = value
    said["interval"] = [max(0.0, min(ends[1], value)), min(1.0, max(ends[0], value))]
    return said | {"validity": f"extrapolated: {where}" if past > 0 else "inside the fitted losses"}


def sentence(said: Mapping[str, Any]) -> str:
    """A forecast of accuracy in words."""
    if said["accuracy"] is None:
        return f"{said['task']}: {said['validity']}" if said.get("task") else str(said["validity"])
    low, high = said["interval"]
    return (
        f"{said['task']}: {100 * said['accuracy']:.1f} % right [{100 * low:.1f}, "
        f"{100 * high:.1f}], {said['validity']}"
    )


def described(curve: Mapping[str, Any]) -> str:
    """A curve of a fit's `accuracy` in words."""
    if curve["why_not"]:
        return f"{curve['task']}: {OUTSIDE}: {curve['why_not']}"
    (m_low, m_high), (s_low, s_high) = (curve["intervals"][k] for k in ("middle", "slope"))
    return (
        f"{curve['task']}: {100 * curve['chance']:.3g} % by chance, half way up at "
        f"{curve['middle']:.3f} nats [{m_low:.3f}, {m_high:.3f}], slope {curve['slope']:.3g} a nat "
        f"[{s_low:.3g}, {s_high:.3g}]"
    )


def of_rows(rows: Sequence[Mapping[str, Any]], *, bootstrap: int = 200) -> list[Curve]:
    """A curve for each task that at least four of the finished runs were scored on.

    A row's `tasks` maps a task to its accuracy, count and chance, as `workdirs.rows` says them.
    """
    names = dict.fromkeys(name for row in rows for name in row.get("tasks") or {})
    out = []
    for name in names:
        with_it = [row for row in rows if name in (row.get("tasks") or {})]
        own = [(row["loss"], row["tasks"][name]) for row in with_it]
        if len(own) < 4:
            continue
        out.append(
            fit(
                name,
                [loss for loss, _ in own],
                [told["accuracy"] for _, told in own],
                questions=[told["count"] for _, told in own],
                chance=float(np.mean([told["chance"] for _, told in own])),
                bootstrap=bootstrap,
            )
        )
    return out
