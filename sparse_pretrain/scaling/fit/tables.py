"""The runs a law is fitted to: columns of sizes, tokens and losses, from a CSV or from workdirs."""

import csv
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

# What a column may be called, lower case; spaces and underscores are one.
NAMES = {
    "params": ("params", "model size", "n", "parameters", "active params"),
    "tokens": ("tokens", "d", "training tokens", "data"),
    "flops": ("flops", "c", "training flop", "training flops", "compute", "training compute"),
    "loss": ("loss", "l", "nats per token"),
}
CHANCES = "a CSV needs `loss` and two of `params`, `tokens` and `flops`"
FAR = 3.0  # robust standard deviations
DIVERGED = 20.0  # robust standard deviations of the residuals
CONSISTENT = 1.4826  # times a median absolute deviation: a normal law's standard deviation


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Runs by column. Units: `params` active parameters, `tokens` training targets, `loss` nats.

    `extra` holds further positive columns by name (experts, keys); `source` and `sha256` say where
    the numbers come from; `labels` name the runs.
    """

    params: Float64[np.ndarray, " runs"]
    tokens: Float64[np.ndarray, " runs"]
    loss: Float64[np.ndarray, " runs"]
    labels: tuple[str, ...] = ()
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    source: str = ""
    sha256: str = ""

    def __post_init__(self):
        for name in ("params", "tokens", "loss", *self.extra):
            column = self.column(name)
            if len(column) != len(self.loss):
                raise ValueError(f"{name}: {len(column)} values, but loss has {len(self.loss)}")
            bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
            if bad.size:
                at = int(bad[0])
                raise ValueError(f"{name}: must be positive, got {column[at]} in run {at + 1}")

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> Float64[np.ndarray, " runs"]:
        """6 N D."""
        return 6 * self.params * self.tokens

    def column(self, name: str) -> Float64[np.ndarray, " runs"]:
        """A column by name. Errors: ValueError naming those there are."""
        if name in ("params", "tokens", "loss", "flops"):
            return getattr(self, name)
        if name not in self.extra:
            known = ", ".join(["params", "tokens", "loss", *self.extra])
            raise ValueError(f"column: there is no {name!r}; known are {known}")
        return self.extra[name]

    def take(self, keep: np.ndarray) -> "Table":
        """The runs that a mask or an index keeps, in its order."""
        index = np.arange(len(self))[keep]
        return dataclasses.replace(
            self,
            params=self.params[index],
            tokens=self.tokens[index],
            loss=self.loss[index],
            labels=tuple(self.labels[i] for i in index) if self.labels else (),
            extra={name: column[index] for name, column in self.extra.items()},
        )

    def label(self, i: int) -> str:
        """What to call run `i` (from 0)."""
        return self.labels[i] if self.labels else f"row {i + 1}"


def read_csv(path: Path | str, extra: Sequence[str] = ()) -> Table:
    """The runs of a CSV; a missing one of params, tokens and flops follows from C = 6 N D.

    With all three, params and tokens are taken as they are. Columns named in `extra` come along.
    Errors: ValueError naming the column, or the line and its value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"csv: there is no file {path}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"csv: {path} is not text") from None
    reader = csv.DictReader(text.splitlines())
    header = [name for name in reader.fieldnames or [] if name]
    chosen = {key: _find(header, names) for key, names in NAMES.items()}
    known = [key for key in ("params", "tokens", "flops") if chosen[key]]
    if not chosen["loss"] or len(known) < 2:
        raise ValueError(f"csv: {path} has the columns {', '.join(header) or 'none'}; {CHANCES}")
    missing = [name for name in extra if name not in header]
    if missing:
        raise ValueError(f"csv: {path} has no column {missing[0]!r}; it has {', '.join(header)}")
    # by their line in the file, which is not their number where there are blank lines
    rows: dict[int, dict[str, Any]] = {}
    for row in reader:
        if any(v.strip() for v in row.values() if isinstance(v, str)):
            rows[reader.line_num] = row
    if not rows:
        raise ValueError(f"csv: {path} holds no rows")
    read = {key: _numbers(rows, name, path) for key, name in chosen.items() if name}
    params = read["params"] if "params" in read else read["flops"] / 6 / read["tokens"]
    tokens = read["tokens"] if "tokens" in read else read["flops"] / 6 / params
    return Table(
        params=params,
        tokens=tokens,
        loss=read["loss"],
        extra={name: _numbers(rows, name, path) for name in extra},
        source=path.name,
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _find(header: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {" ".join(h.replace("_", " ").lower().split()): h for h in reversed(header)}
    return next((plain[name] for name in names if name in plain), None)


def _numbers(rows: Mapping[int, Mapping[str, Any]], name: str, path: Path) -> np.ndarray:
    out = []
    for line, row in rows.items():
        try:
            out.append(float(row[name]))
        except (TypeError, ValueError):
            got = f"got {row[name]!r}"
            raise ValueError(f"csv: {path}, line {line}: {name}: not a number, {got}") from None
        if not (np.isfinite(out[-1]) and out[-1] > 0):
            raise ValueError(f"csv: {path}, line {line}: {name}: must be positive, got {row[name]}")
    return np.array(out, np.float64)


def spread(values: np.ndarray) -> float:
    """A robust standard deviation: the median absolute deviation, scaled."""
    return float(CONSISTENT * np.median(np.abs(values - np.median(values))))


RULE = (
    f"a run is dropped when log(tokens/params) is more than {FAR:g} robust standard deviations "
    f"({CONSISTENT} MAD) below the table's median, as it has hardly begun to train, or when it "
    f"lies more than {DIVERGED:g} robust standard deviations (at least 0.1 % of the loss) off the "
    "law fitted to the others, as it has diverged"
)


def undertrained(table: Table) -> np.ndarray:
    """Which runs the first half of RULE drops: a rule on the design, blind to the losses."""
    ratio = np.log(table.tokens / table.params)
    limit = FAR * spread(ratio)
    return (np.median(ratio) - ratio > limit) & (limit > 0)


def from_runs(root: Path | str, extra: Sequence[str] = ()) -> tuple[Table, list[str]]:
    """(the finished runs at or below a folder, what was left out and why).

    `params` is the model FLOPs per token of training over 6, so that C = 6 N D is what was counted;
    `loss` the held-out nats/token. `extra` may hold `expansion`, all parameters over active ones.
    Errors: ValueError when no run is finished, the runs saw different corpora, or a column of
    `extra` is nothing that runs say.
    """
    from sparse_pretrain.scaling.fit import workdirs

    rows, left = workdirs.rows(Path(root))
    if not rows:
        raise ValueError(f"runs: {root} holds no finished run" + (f": {left[0]}" if left else ""))
    corpora = sorted({row["corpus"] for row in rows})
    if len(corpora) > 1:
        raise ValueError(f"runs: the runs saw different corpora: {', '.join(corpora)}")
    for name in extra:
        if name not in rows[0]:
            raise ValueError(f"runs: they do not say {name!r}; give it in a CSV")
    column = lambda key: np.array([row[key] for row in rows], np.float64)  # noqa: E731
    table = Table(
        params=column("params"),
        tokens=column("tokens"),
        loss=column("loss"),
        labels=tuple(row["label"] for row in rows),
        extra={name: column(name) for name in extra},
        source=f"{Path(root).name}, corpus {corpora[0]}",
    )
    return table, left
