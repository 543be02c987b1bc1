"""A law of the best learning rate or batch, from runs that tried several at several sizes."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sparse_pretrain
from sparse_pretrain.scaling.fit import hyper, tables

SETTINGS = ("lr", "batch")
OF = ("flops", "params", "tokens")  # what a law may be a power of
NAMES = {
    **tables.NAMES,
    "lr": ("lr", "learning rate", "rate"),
    "batch": ("batch", "batch size", "bs", "batch tokens"),
}
SAME = 1e-3  # in logarithms: runs whose sizes differ by less are of one size
PUBLISHED = {
    "deepseek": (hyper.DEEPSEEK, "DeepSeek LLM, 2401.02954, section 3.1"),
    "step_law": (hyper.STEP_LAW, "Step Law, 2503.04715"),
}

METHOD = (
    "vertices of parabolas in the logarithm of the setting, then least squares in logarithms with "
    "95 % Student intervals; held_out is the mean factor less one by which a fit without a point "
    "misses it"
)

Rows = Sequence[Mapping[str, Any]]


def read_csv(path: Path | str) -> list[dict[str, float]]:
    """The runs of a CSV with `loss`, `lr` or `batch` or both, and two of params, tokens and flops.

    Errors: ValueError naming the column, or the line and its value.
    """
    sizes = tables.read_csv(path)
    header = [h for h in next(csv.reader(Path(path).read_text("utf-8-sig").splitlines())) if h]
    plain = {" ".join(h.replace("_", " ").lower().split()): h for h in header}
    own = {k: next((plain[n] for n in NAMES[k] if n in plain), None) for k in SETTINGS}
    if not any(own.values()):
        raise ValueError(f"csv: {path} has the columns {', '.join(header)}; it needs lr or batch")
    extra = tables.read_csv(path, [name for name in own.values() if name])
    columns = {k: getattr(sizes, k) for k in (*OF, "loss")}
    columns |= {k: extra.column(name) for k, name in own.items() if name}
    return [{k: float(v[i]) for k, v in columns.items()} for i in range(len(sizes))]


def optima(rows: Rows, setting: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the best value at each size, sizes that have none and why).

    A size is params, tokens and, for the rate, batch. Losses of one value are averaged over seeds;
    of the batch each is taken at the best of the rates tried with it.
    Errors: ValueError when runs do not say the setting.
    """
    lacks = [r for r in rows if not r.get(setting)]
    if lacks:
        raise ValueError(f"{setting}: {len(lacks)} of {len(rows)} runs do not say it")
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    fixed = ("params", "tokens", "batch") if setting == "lr" else ("params", "tokens")
    for row in rows:
        key = tuple(round(np.log(row[k]) / SAME) if row.get(k) else 0 for k in fixed)
        groups.setdefault(key, []).append(row)
    found, left = [], []
    for _, group in sorted(groups.items()):
        at = {k: float(np.median([r[k] for r in group])) for k in ("params", "tokens")}
        at["flops"] = 6 * at["params"] * at["tokens"]
        tried = _curve(group, setting)
        at |= {"runs": len(group), "values": len(tried)}
        if len(tried) < 3:
            left.append(at | {"reason": f"{len(tried)} values tried, an optimum takes 3"})
            continue
        best = hyper.best(list(tried), list(tried.values()))
        if best["inside"]:
            found.append(at | best)
        else:
            reason = f"the best of them, {best['value']:.3g}, is at an end of the grid"
            left.append(at | {"reason": reason})
    return found, left


def _curve(group: Rows, setting: str) -> dict[float, float]:
    """Value of the setting -> loss."""
    means: dict[tuple[float, float], list[float]] = {}
    for row in group:
        other = row.get("lr") if setting == "batch" else None
        means.setdefault((float(row[setting]), float(other or 0)), []).append(float(row["loss"]))
    out: dict[float, float] = {}
    for (value, _), losses in means.items():
        mean = float(np.mean(losses))
        out[value] = min(mean, out.get(value, mean))
    return out


def fit(
    rows: Rows,
    setting: str,
    of: Sequence[str] = ("flops",),
    *,
    source: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The law of a setting: `constants`, `intervals`, `held_out`, the `optima` and those `left`.

    `constants` is None, and `why` says the reason, where too few sizes have an optimum.
    Errors: ValueError naming the setting, the column, or what runs do not say.
    """
    if setting not in SETTINGS:
        raise ValueError(f"law: {setting!r} is not one of {', '.join(SETTINGS)}")
    unknown = [name for name in of if name not in OF]
    if unknown or not of:
        raise ValueError(f"of: {unknown[0] if unknown else ''!r} is not one of {', '.join(OF)}")
    found, left = optima(rows, setting)
    formula = f"{setting} = factor x " + " x ".join(f"{name}^({name})" for name in of)
    out: dict[str, Any] = {"law": setting, "of": list(of), "formula": formula}
    try:
        law = hyper.power(
            {name: [o[name] for o in found] for name in of}, [o["value"] for o in found]
        )
        out |= law | {"why": ""}
    except ValueError as e:
        out |= {"constants": None, "intervals": None, "points": len(found), "held_out": None}
        out["why"] = str(e)
    span = {k: [min(o[k] for o in found), max(o[k] for o in found)] for k in OF} if found else {}
    said = {}
    for name, (laws, where) in PUBLISHED.items():
        values = [hyper.evaluate(laws[setting], **{k: o[k] for k in OF}) for o in found]
        said[name] = {"source": where, "at_optima": values}
    out |= {"span": span, "optima": found, "left": left, "published": said}
    return out | {
        "provenance": {
            "data": source,
            "method": METHOD,
            "program": f"sparse-pretrain {sparse_pretrain.__version__}",
            **(provenance or {}),
        }
    }


def lines(law: Mapping[str, Any]) -> list[str]:
    """A law and the optima behind it, for people."""
    out = []
    for o in law["optima"]:
        low, high = o["bracket"]
        out.append(
            f"{o['params']:.3g} params, {o['tokens']:.3g} tokens: best {law['law']} "
            f"{o['value']:.4g} (tried beside it {low:.4g} and {high:.4g}), loss {o['loss']:.4f}, "
            f"{o['runs']} runs"
        )
    for o in law["left"]:
        out.append(f"{o['params']:.3g} params, {o['tokens']:.3g} tokens: left out, {o['reason']}")
    if law["constants"] is None:
        return out
    out.append(law["formula"])
    for name, found in law["constants"].items():
        low, high = law["intervals"][name]
        out.append(f"  {name} {found:.4g} [{low:.4g}, {high:.4g}]")
    out.append(f"a fit without a size misses its best by {100 * law['held_out']:.1f} % in the mean")
    for said in law["published"].values():
        factors = [v / o["value"] for v, o in zip(said["at_optima"], law["optima"], strict=True)]
        out.append(
            f"{said['source']}, says {min(factors):.3g} to {max(factors):.3g} times these optima"
        )
    return out


def read(path: Path | str) -> dict[str, Any]:
    """The law in a file that `fit --law=lr` or `--law=batch` wrote.

    Errors: ValueError naming the file, and why it holds no law.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"fit: {path} is not a JSON file") from None
    if not isinstance(content, dict) or "constants" not in content or "of" not in content:
        raise ValueError(f"fit: {path} holds no law of lr or batch")
    if content["constants"] is None:
        raise ValueError(f"fit: {path} holds no law: {content.get('why')}")
    return content


def value(law: Mapping[str, Any], **columns: float) -> tuple[float, str]:
    """(what the law says at params, tokens and flops, where that lies of the runs it is fitted to).

    Errors: ValueError naming a column that the law needs.
    """
    found = hyper.evaluate(law["constants"], **columns)
    far = 1.0
    for name in law["of"]:
        low, high = law["span"][name]
        far = max(far, columns[name] / high, low / columns[name])
    return found, "inside the fitted runs" if far <= 1 + 1e-6 else f"{far:.3g} times beyond them"
