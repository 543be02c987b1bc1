"""Curves as inline SVG that takes its colours from the page, so that it reads in light and dark."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from sparse_pretrain.training.progress import si

# Colours that stand for the page's variables: matplotlib writes them, `_inline` replaces them.
INK, FAINT = "#0a0b01", "#0a0b02"
SERIES = tuple(f"#0a0c0{i}" for i in range(1, 9))
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(SERIES, 1)
}
POINTS = 600  # more than a chart has pixels across
MANY = 6  # names in a legend that hide the curves


def numbers(rows: Iterable[dict[str, Any]], key: str) -> Float64[np.ndarray, " rows"]:
    """One column of rows as float64; absent, null and non-numeric become NaN."""
    found = [row.get(key) for row in rows]
    ok = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in found]
    return np.array([v if k else math.nan for v, k in zip(found, ok, strict=True)], np.float64)


def smooth(y: Float64[np.ndarray, " rows"], span: int) -> Float64[np.ndarray, " rows"]:
    """Exponential mean over about `span` rows, NaN skipped.

    The span grows from 1 over the first rows, so that the steep start is followed, not smeared.
    """
    out = np.full(len(y), np.nan)
    mean, seen = 0.0, 0
    for i, value in enumerate(y):
        if np.isfinite(value):
            mean += (value - mean) / min(span, 1 + seen // 5)
            out[i], seen = mean, seen + 1
    return out


def thin(
    x: Float64[np.ndarray, " rows"], y: Float64[np.ndarray, " rows"], points: int = POINTS
) -> tuple[Float64[np.ndarray, " kept"], Float64[np.ndarray, " kept"]]:
    """At most `points` points of a curve that keep its extremes, so that spikes stay visible."""
    if len(x) <= points:
        return x, y
    picked = set()
    for part in np.array_split(np.arange(len(x)), points // 2):
        values = y[part]
        if np.isfinite(values).any():
            picked |= {part[np.nanargmin(values)], part[np.nanargmax(values)]}
    index = np.array(sorted(picked), np.int64)
    return x[index], y[index]


class Chart:
    """One figure of one or more panels over a shared x, drawn without pyplot's global state."""

    def __init__(self, *, x: str, panels: Sequence[str], height: float = 2.5):
        import matplotlib  # half a second, and only reports draw

        self._style = {
            "svg.fonttype": "none",  # text stays text: smaller, and in the page's font
            "svg.hashsalt": "sparse-pretrain",
            "font.size": 10,
            "font.family": "sans-serif",
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": FAINT,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": FAINT,
            "axes.unicode_minus": False,
        }
        with matplotlib.rc_context(self._style):
            from matplotlib.figure import Figure

            self.figure = Figure(figsize=(5.2, height), facecolor="none")
            self.axes = list(self.figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0])
            for axes, label in zip(self.axes, panels, strict=True):
                axes.set_facecolor("none")
                axes.set_ylabel(label)
                axes.grid(True, linewidth=0.5, alpha=0.6)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
                axes.xaxis.set_major_formatter(lambda v, _: si(v))
            self.axes[-1].set_xlabel(x)
        self._height = height

    def line(self, x, y, *, colour: int = 0, panel: int = 0, **style: Any) -> None:
        """A curve, thinned to what the eye can tell apart."""
        x, y = thin(np.asarray(x, np.float64), np.asarray(y, np.float64))
        style = {"linewidth": 1.4, "color": SERIES[colour % len(SERIES)]} | style
        self.axes[panel].plot(x, y, **style)

    def points(self, x, y, *, colour: int = 0, panel: int = 0, **style: Any) -> None:
        """Single measurements, joined thinly."""
        style = {"marker": "o", "markersize": 3.5, "linewidth": 0.8} | style
        self.line(x, y, colour=colour, panel=panel, **style)

    def mark(self, x: float, name: str) -> None:
        """A vertical line through all panels with a name at its top."""
        import matplotlib

        for axes in self.axes:
            axes.axvline(x, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        with matplotlib.rc_context(self._style):
            top = self.axes[0]
            place = {"transform": top.get_xaxis_transform(), "va": "top"}
            top.text(x, 0.98, f" {name}", fontsize=8, color=INK, **place)

    def svg(self, title: str, *, right: float = 0.965) -> str:
        """The figure as an `<svg>` element with `title` as its accessible name."""
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        with matplotlib.rc_context(self._style):
            below = 0.0
            for axes in self.axes:
                handles, labels = axes.get_legend_handles_labels()
                style: dict[str, Any] = {"loc": "best"}
                if len(labels) > MANY and axes is self.axes[-1]:
                    # no corner is free of lines: under the plot, which grows by as much
                    below = 0.1 + 0.2 * math.ceil(len(labels) / 3)
                    style = {"loc": "lower center", "ncols": 3, "bbox_to_anchor": (0.55, 0.0)}
                    style["bbox_transform"] = self.figure.transFigure
                if labels:
                    axes.legend(handles, labels, frameon=False, fontsize=9, **style)
            height = self._height + below
            self.figure.set_figheight(height)
            self.figure.subplots_adjust(
                left=0.155, right=right, bottom=(0.52 + below) / height, top=1 - 0.12 / height,
                hspace=0.12,
            )
            out = io.StringIO()
            FigureCanvasSVG(self.figure).print_svg(out)
        return _inline(out.getvalue(), title)


def _inline(text: str, title: str) -> str:
    """A matplotlib SVG file as an element for an HTML page that holds several."""
    from html import escape

    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # ids are only unique within one figure
    prefix = "f" + re.sub(r"\W+", "", title).lower() + "-"
    text = re.sub(r'(\sid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size, "matplotlib wrote no viewBox"
    head = f'<svg role="img" aria-label="{escape(title)}" {size.group()}>'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    return text.replace("font: 10px 'sans-serif'", "font: 10px system-ui, sans-serif").strip()


def heatmap(load_NxE: Float64[np.ndarray, "N E"], title: str, *, x: str = "expert") -> str:
    """Load over the even share, layers down and experts (or devices) across; 1 is balance.

    Units: pairs, or any fraction of them.
    """
    import matplotlib

    even = load_NxE.mean(axis=1, keepdims=True)
    share = np.divide(load_NxE, even, out=np.zeros_like(load_NxE), where=even > 0)
    layers = len(share)
    chart = Chart(x=x, panels=["MoE layer"], height=min(4.5, max(1.7, 0.9 + 0.22 * layers)))
    axes = chart.axes[0]
    with matplotlib.rc_context(chart._style):
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.ticker import MaxNLocator

        axes.grid(False)
        top = max(1.5, float(share.max()))
        image = axes.imshow(
            share,
            aspect="auto",
            cmap="RdYlBu_r",
            norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top),
            interpolation="nearest",
        )
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 10)))
        bar = chart.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
        bar.set_ticks([0, 1, top])
        bar.ax.set_yticklabels(["0", "1", f"{top:.3g}"])
        bar.outline.set_visible(False)
    return chart.svg(title, right=0.92)  # the colour bar has its numbers there
