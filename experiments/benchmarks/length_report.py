"""Rows, verdicts and the plot of the length benchmark, from the cells that are on file."""

import math
import statistics

import numpy as np

# A kind is held against full attention; one that changes another variant is held against it too.
AGAINST = {"dsa": ("full", "mla")}
DENSE = ("full", "mla")
LINEAR_GROWTH = ("sliding", "moba")
BREAK_EVEN, FASTER_AT, FASTER = 4096, 32768, 5.0
GROWTH_OVER = (8192, 16384, 32768, 65536)
GROWTH_SLACK, GROWTH_MOST, COUNT_MOST = 0.10, 1.15, 0.05


def _core(turns, name):
    """Seconds of each round without the products with weights; torch times nothing else."""
    linear = turns.get(f"linear_{name}")
    if linear is None:
        return list(turns[name])
    alone = statistics.median(linear)
    return [max(t - alone, 1e-9) for t in turns[name]]


def _medians(turns):
    found = {}
    for name in ("forward", "both"):
        core = _core(turns, name)
        found[name] = statistics.median(turns[name])
        found[f"core_{name}"] = statistics.median(core)
        found[f"core_{name}_spread"] = [min(core), max(core)]
    return found


def rows(cells, clock):
    """One row per kind and length, seconds by the given clock, in order of length."""
    out = []
    for length in sorted(cells, key=int):
        for kind, cell in cells[length].items():
            mine = _medians(cell["turns"][clock])
            row = {"kind": kind, "length": int(length), "seconds": mine}
            row["others"] = cell.get("others")
            row["peak"] = cell["peak"]
            for name in ("temporary", "formula", "counted", "compiler_flops"):
                row[name] = cell.get(name)
            beside = {k: _medians(t[clock]) for k, t in cell["beside"].items()}
            torch = [k for k in beside if k.startswith("torch")]
            if torch:
                beside["torch"] = min((beside[k] for k in torch), key=lambda x: x["core_both"])
            row["faster_than"] = {
                k: {
                    "core": beside[k]["core_both"] / mine["core_both"],
                    "core_forward": beside[k]["core_forward"] / mine["core_forward"],
                    "layer": beside[k]["both"] / mine["both"],
                }
                for k in ("full", "mla", "torch")
                if k in beside
            }
            out.append(row)
    return out


def _of(rows, kind):
    return {r["length"]: r for r in rows if r["kind"] == kind}


def _share(row, dense):
    """Part of full attention's useful FLOPs that a variant does, scoring what it skips included."""
    return row["formula"]["model"] / dense["formula"]["model"]


def print_table(rows):
    """Every row: times in milliseconds, memory in MB, FLOPs in billions."""
    print(
        f"{'':11} {'length':>6} {'forward':>9} {'fwd+bwd':>9} {'core f+b':>9} {'fastest':>9} "
        f"{'slowest':>9} {'/full':>6} {'/torch':>6} {'peak':>7} {'temp':>7} {'GFLOP':>8} "
        f"{'counted':>8} {'share':>6}"
    )
    for row in rows:
        s, ratio = row["seconds"], row["faster_than"]
        low, high = s["core_both_spread"]
        peak, temporary = row["peak"]["both"], (row["temporary"] or {}).get("both")
        flops = (row["formula"] or {}).get("both")
        counted = (row["counted"] or {}).get("both")
        dense = _of(rows, "full").get(row["length"])
        share = f"{_share(row, dense):6.1%}" if row["formula"] and dense else ""
        cells = [_number(ratio.get(k, {}).get("core"), ".2f", 6) for k in ("full", "torch")]
        cells += [_number(x and x / 1e6, ".0f", 7) for x in (peak, temporary)]
        cells += [_number(x and x / 1e9, ".1f", 8) for x in (flops, counted)]
        print(
            f"{row['kind']:11} {row['length']:6} {s['forward'] * 1e3:9.1f} {s['both'] * 1e3:9.1f} "
            f"{s['core_both'] * 1e3:9.1f} {low * 1e3:9.1f} {high * 1e3:9.1f} "
            f"{' '.join(cells)} {share}"
        )
    others = [r["others"] for r in rows if r["others"] is not None]
    if others:
        print(f"other programs used {max(others):.2f} cores at most")


def _number(value, form, width):
    return f"{'':{width}}" if value is None else f"{value:{width}{form}}"


def _slope(lengths, values):
    """Exponent by which the values grow, least squares in logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def verdicts(rows):
    """Each bar of each variant: met, MISSED, or not measured."""
    found = []

    def add(bar, kind, met, text):
        outcome = {True: "met", False: "MISSED", None: "not measured"}[met]
        line = f"{kind:8} {bar}: {text}: {outcome}"
        found.append({"bar": bar, "kind": kind, "met": met, "verdict": line})

    kinds = [k for k in dict.fromkeys(r["kind"] for r in rows) if not k.startswith("torch")]
    full = _of(rows, "full")
    for kind in kinds:
        mine = _of(rows, kind)
        if kind not in DENSE:
            for dense in AGAINST.get(kind, ("full",)):
                _break_even(add, kind, mine, dense)
                _faster(add, kind, mine, dense)
            _memory(add, kind, mine, full)
        _growth(add, kind, mine)
        _count(add, kind, mine)
    return found


def _ratios(mine, dense):
    return {n: r["faster_than"][dense] for n, r in mine.items() if dense in r["faster_than"]}


def _break_even(add, kind, mine, dense):
    ratios = _ratios(mine, dense)
    bar = f"break-even with {dense} at {BREAK_EVEN} or below"
    measured = any(n <= BREAK_EVEN for n in ratios) and any(n >= BREAK_EVEN for n in ratios)
    even = next(
        (n for n in sorted(ratios) if all(ratios[m]["core"] >= 1 for m in ratios if m >= n)),
        math.inf,
    )
    text = ", ".join(f"{r['core']:.2f}x at {n}" for n, r in sorted(ratios.items()) if n <= 8192)
    layer = ", ".join(f"{r['layer']:.2f}x" for n, r in sorted(ratios.items()) if n <= 8192)
    add(bar, kind, even <= BREAK_EVEN if measured else None, f"{text} (whole layer {layer})")


def _faster(add, kind, mine, dense):
    ratio = _ratios(mine, dense).get(FASTER_AT)
    bar = f"{FASTER:g}x {dense} at {FASTER_AT}"
    if ratio is None:
        return add(bar, kind, None, f"needs {FASTER_AT}")
    text = (
        f"{ratio['core']:.2f}x (forward {ratio['core_forward']:.2f}x, layer {ratio['layer']:.2f}x)"
    )
    return add(bar, kind, ratio["core"] >= FASTER, text)


def _memory(add, kind, mine, full):
    """The most that the layer holds above what was there before, forward and backward."""
    both = {n: (r["peak"]["both"], full[n]["peak"]["both"]) for n, r in mine.items() if n in full}
    both = {n: pair for n, pair in both.items() if None not in pair}
    over = {n: pair for n, pair in both.items() if pair[0] >= pair[1]}
    text = ", ".join(
        f"{a / 1e6:.0f} of {b / 1e6:.0f} MB at {n}" for n, (a, b) in (over or both).items()
    )
    if over:
        text = "above at " + text
    add("peak memory below full's", kind, (not over) if both else None, text)


def _growth(add, kind, mine):
    have = [n for n in GROWTH_OVER if n in mine]
    bar = f"growth {GROWTH_OVER[0]} to {GROWTH_OVER[-1]}"
    if len(have) < 2:
        return add(bar, kind, None, "needs these lengths")
    time_ = _slope(have, [mine[n]["seconds"]["core_both"] for n in have])
    work = _slope(have, [mine[n]["formula"]["core_both"] for n in have])
    most = work + GROWTH_SLACK
    if kind in LINEAR_GROWTH:
        most = min(most, GROWTH_MOST)
    text = f"time's exponent {time_:.3f}, its FLOPs' {work:.3f}, at most {most:.3f}"
    whole = have == list(GROWTH_OVER)
    if not whole:
        text += f" (over {have} only)"
    return add(bar, kind, time_ <= most if whole else None, text)


def _count(add, kind, mine):
    gaps = {}
    for n, row in mine.items():
        for name, counted in (row["counted"] or {}).items():
            gaps[n, name] = row["formula"][name] / counted - 1
    if not gaps:
        return add("formula FLOPs", kind, None, "none counted")
    (n, name), worst = max(gaps.items(), key=lambda x: abs(x[1]))
    formula, counted = mine[n]["formula"], mine[n]["counted"][name]
    core = formula[f"core_{name}"]
    # were all of the gap the core's
    of_core = core / (counted - (formula[name] - core)) - 1
    text = f"{worst:+.1%} of the count at most, {name} at {n} (of the core {of_core:+.1%})"
    add("formula FLOPs", kind, abs(worst) <= COUNT_MOST, text)


def plot(rows, path):
    """Time and memory against length, both logarithmic, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    for i, kind in enumerate(kinds):
        mine = _of(rows, kind)
        lengths = sorted(mine)
        style = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": kind}
        style["linestyle"] = "--" if kind.startswith("torch") else "-"
        left.plot(lengths, [mine[n]["seconds"]["core_both"] for n in lengths], **style)
        peaks = [(n, mine[n]["peak"]["both"]) for n in lengths if mine[n]["peak"]["both"]]
        right.plot([n for n, _ in peaks], [p / 1e6 for _, p in peaks], **style)
    ticks = sorted({r["length"] for r in rows})
    for axes, title in ((left, "seconds, core, forward + backward"), (right, "peak memory, MB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
