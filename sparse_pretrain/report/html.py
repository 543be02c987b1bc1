"""The few HTML pieces that reports are made of; every page is one file and asks no network."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sparse_pretrain.training.progress import si

STYLE = """
:root { color-scheme: light dark; --ink:#1d2530; --faint:#c3cad4; --soft:#5b6675; --page:#f6f7f9;
 --card:#ffffff; --c1:#2563eb; --c2:#d9730d; --c3:#0f9d6b; --c4:#d6336c; --c5:#7c3aed; --c6:#0891b2;
 --c7:#a16207; --c8:#64748b; --bad:#b91c1c; --good:#15803d; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e8ee; --faint:#48515e; --soft:#9aa5b4;
 --page:#12161c; --card:#1a2028; --c1:#6aa5ff; --c2:#f5a04a; --c3:#3fcf97; --c4:#f77fa8;
 --c5:#b18cff; --c6:#3fc6e0; --c7:#dcb54a; --c8:#94a3b8; --bad:#f87171; --good:#4ade80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page);
 color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 4px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 8px; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); font-size: .87rem; }
.cards { display: grid; gap: 12px; margin: 12px 0;
 grid-template-columns: repeat(auto-fit, minmax(min(45%, 190px), 1fr)); }
.card, section { background: var(--card); border-radius: 10px; padding: 14px;
 border: 1px solid color-mix(in srgb, var(--faint) 50%, transparent); }
.card b { display: block; font-size: 1.35rem; line-height: 1.25; white-space: nowrap; }
.card > span { color: var(--soft); font-size: .82rem; }
.columns { columns: 2 440px; column-gap: 12px; margin-bottom: 12px; }
section { margin-bottom: 12px; }
.columns section { break-inside: avoid; }
svg { width: 100%; max-width: 660px; height: auto; display: block; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: 4px 10px 4px 0; vertical-align: top;
 border-bottom: 1px solid color-mix(in srgb, var(--faint) 45%, transparent); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 28%; min-width: 40px; vertical-align: middle; }
td.bar i { display: block; height: 10px; border-radius: 3px; background: var(--c1); }
td.long { overflow-wrap: anywhere; min-width: 10.5rem; }
pre, code { font: .84rem/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 26rem;
 overflow-y: auto; }
code span { display: inline-block; overflow-wrap: anywhere; max-width: 100%; }
@media (max-width: 520px) { table { font-size: .8rem; } th, td { padding-right: 7px; }
 body { padding: 10px; } .card, section { padding: 11px; } }
summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: 8px; }
.bad { color: var(--bad); } .good { color: var(--good); }
.key { display: inline-block; width: 12px; height: 4px; border-radius: 2px; margin-right: 6px;
 vertical-align: middle; }
li { margin-bottom: 8px; } ol, ul { padding-left: 20px; margin: 4px 0; }
"""


class Raw(str):
    """Text that already is HTML."""


def text(value: Any) -> str:
    """A value as HTML text; only `Raw` passes unescaped."""
    return value if isinstance(value, Raw) else escape("-" if value is None else str(value))


def number(value: Any, digits: int = 4, unit: str = "") -> Raw:
    """A number as people read it, with the exact one in `data-value`; anything else as '-'."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return Raw("-")
    shown = f"{value:.{digits}f}" if abs(value) < 1000 else si(value, digits)
    return exact(value, shown + unit)


def count(value: Any, unit: str = "") -> Raw:
    """A count with an SI letter, and the exact one in `data-value`."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return Raw("-")
    return exact(value, si(value) + unit)


def exact(value: float, shown: str) -> Raw:
    """`shown`, carrying `value` for programs and for the pointer."""
    return Raw(f'<span data-value="{value!r}" title="{value!r}">{escape(shown)}</span>')


def card(key: str, label: str, value: Any) -> Raw:
    """One headline number."""
    return Raw(
        f'<div class="card" data-key="{escape(key)}"><b>{text(value)}</b>'
        f"<span>{text(label)}</span></div>"
    )


def section(title: str, body: str, *, id: str) -> Raw:
    """A titled box; nothing at all when there is nothing to put in it."""
    if not body:
        return Raw("")
    return Raw(f'<section id="{id}"><h2>{text(title)}</h2>{body}</section>')


def folded(title: str, body: str, *, id: str) -> Raw:
    """A box that opens on demand."""
    if not body:
        return Raw("")
    return Raw(
        f'<section id="{id}"><details><summary>{text(title)}</summary>{body}</details></section>'
    )


def command(line: str) -> Raw:
    """A shell command that wraps between its words only, not at their hyphens."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in line.split(" "))
    return Raw(f"<code>{words}</code>")


def bar(share: float) -> Raw:
    """A horizontal bar of `share` of the cell, for a table's bar column."""
    return Raw(f'<i style="width:{100 * min(max(share, 0), 1):.1f}%"></i>')


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], kinds: str = "") -> Raw:
    """A table; `kinds` has a letter per column: l text, n number, b bar, w long text."""
    names = {"n": ' class="n"', "b": ' class="bar"', "w": ' class="long"'}
    kinds = kinds.ljust(len(header), "l")
    head = "".join(
        f"<th{names['n'] if k == 'n' else ''}>{text(h)}</th>"
        for h, k in zip(header, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{names.get(k, '')}>{text(v)}</td>" for v, k in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return Raw(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )
