"""The ledger: every claim with what was published, what was measured, the rule and the verdict."""

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.claims import base, results

BEGIN, END = "<!-- ledger -->", "<!-- end of ledger -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the ledger. `measured` of a claim that has not run is the reason."""

    id: str
    name: str
    kind: str
    claim: str
    source: str
    published: str
    measured: str
    interval: tuple[float, float, float] | None
    criterion: str
    verdict: str
    commit: str
    device: str
    flops: float
    minutes: float
    command: str


def rows(known: dict[str, base.Claim], where: Path, scale: str = "laptop") -> list[Row]:
    """The ledger of these claims with the results in a folder."""
    return [_row(claim, results.read(where, claim, scale)) for claim in known.values()]


def _row(claim: base.Claim, result: dict[str, Any] | None) -> Row:
    head = (claim.id, claim.name, claim.kind, claim.title, claim.source, claim.published)
    if result is None:
        reason = claim.result or "not yet; the command is ready"
        return Row(
            *head, reason, None, claim.criterion, base.NOT_RUN, "", "", 0.0, 0.0, claim.command
        )
    verdict = result["verdict"]
    if result["criterion"] != claim.criterion:
        verdict += ", by another criterion"  # it moved after the result: the verdict is void
    interval = result["interval"]
    device = result["device"]
    kind = device["cpu"] if device["platform"] == "cpu" else device["kind"]
    count = device["usable_cores"]
    cores = f", {count} core{'s' * (count > 1)}" if device["platform"] == "cpu" else ""
    return Row(
        *head,
        result["measured"],
        tuple(interval) if interval else None,
        claim.criterion,
        verdict,
        result["commit"][:7] + ("+" if result["commit"].endswith("+") else ""),
        kind + cores,
        result["flops"],
        result["minutes"],
        claim.command,
    )


def counts(table: Sequence[Row]) -> str:
    """How many claims have which verdict, in words."""
    total = {v: sum(r.verdict == v for r in table) for v in base.VERDICTS}
    void = len(table) - sum(total.values())
    text = ", ".join(f"{count} {verdict}" for verdict, count in total.items())
    return f"{len(table)} claims: {text}" + (f", {void} void" if void else "")


def markdown(table: Sequence[Row]) -> str:
    """The ledger for the README."""
    lines = [
        "| | claim | published | measured here | criterion | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        claim = f"{row.claim} ({row.source.rstrip('.')})"
        cells = (
            row.id, claim, row.published, row.measured, row.criterion,
            row.verdict + (f", {row.commit}" if row.commit else ""),
        )  # fmt: skip
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    devices = sorted({row.device for row in table if row.device})
    tail = f"{counts(table)}. Measured on: {'; '.join(devices)}." if devices else counts(table)
    return "\n".join([*lines, "", tail])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").rstrip(".")


def in_text(text: str, table: Sequence[Row]) -> str:
    """A document with the ledger between its two marks made anew.

    Errors: ValueError where the document has no marks.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"ledger: the document has no marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{markdown(table)}\n{END}{tail}"


def record(claim: base.Claim, row: Row) -> None:
    """Writes the verdict into the claim's own docstring, where it has run."""
    if not row.commit:
        return
    text = claim.path.read_text(encoding="utf-8")
    end = text.index('"""', 3)
    head = re.split(r"^Result:", text[3:end], maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    told = f"Result: {row.verdict} at {row.commit}: {row.measured}."
    told = textwrap.fill(
        told, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    claim.path.write_text(f'"""{head}\n{told}\n{text[end:]}', encoding="utf-8")


def report(known: dict[str, base.Claim], where: Path, scale: str = "laptop") -> str:
    """All claims in full, in markdown: the record, the numbers, the analysis, the command."""
    table = rows(known, where, scale)
    lines = ["# Claims", "", counts(table), ""]
    for row in table:
        claim, result = known[row.id], results.read(where, known[row.id], scale)
        lines += [f"## {row.id}: {row.claim}: {row.verdict}", ""]
        facts = {
            "Source": row.source, "Published": row.published, "Kind": row.kind,
            "Tested": claim.tested, "Criterion": row.criterion, "Measured": row.measured,
        }  # fmt: skip
        if result is not None:
            if row.interval:
                value, low, high = row.interval
                text = f"{value:.4g} [{low:.4g}, {high:.4g}]"
                facts[f"95 % interval of {result['of']}"] = text
            if result["analysis"]:
                facts["Analysis"] = result["analysis"]
            facts["Cost"] = f"{row.minutes:.1f} min" + (
                f", {row.flops:.2g} FLOPs" if row.flops else ""
            )
            facts["Where"] = f"{row.commit}, {row.device}"
        facts["Again"] = f"`{row.command}`"
        lines += [f"- {name}: {text}" for name, text in facts.items()]
        if result is not None and result["numbers"]:
            lines += ["", "```", *_numbers(result["numbers"]), "```"]
        lines.append("")
    return "\n".join(lines)


def _numbers(value: Any, indent: int = 0) -> list[str]:
    pad = "  " * indent
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{pad}{key}", *_numbers(item, indent + 1)]
        else:
            lines.append(f"{pad}{key}: {_plain(item)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        if len(value) > 24:
            return f"[{len(value)} values]"
        return "[" + ", ".join(_plain(v) for v in value) + "]"
    return str(value)
