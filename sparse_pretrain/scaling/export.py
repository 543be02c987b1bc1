"""The table of runs as a file: CSV or parquet, a row a run, a column for every key that differs."""

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.scaling.engines import needs


def flat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `runs.list_runs` with one value a column, all with the same columns.

    The names are those that `fit --csv` knows: `loss` is the held-out nats per token and `params`
    what 6 N D counts, FLOPs over six tokens; the last training loss is `train_loss`. What differs
    between the configurations is `config.KEY`.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row["config"]))
    found = []
    for row in rows:
        one = {k: v for k, v in row.items() if k not in ("loss", "config")}
        work = row["flops"] and row["tokens"] and row["flops"] / row["tokens"] / 6
        one |= {"params": work or None, "loss": row["nats_per_token"]}
        one |= {"train_loss": row["loss"]}
        one |= {f"config.{key}": row["config"].get(key) for key in keys}
        found.append({k: _plain(v) for k, v in one.items()})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A header and a line a run; what is not known is empty.

    Errors: OSError naming a path that cannot be written.
    """
    table, fresh = flat(rows), path.with_name(path.name + ".tmp")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)
    os.replace(fresh, path)


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The same as a parquet file; a column whose values are of several types is text.

    Errors: ValueError when pyarrow is not installed; OSError as `write_csv`.
    """
    arrow = needs("pyarrow", "parquet", "--parquet")
    parquet = needs("pyarrow.parquet", "parquet", "--parquet")
    table = flat(rows)
    columns = {key: _column([row[key] for row in table]) for key in (table[0] if table else {})}
    fresh = path.with_name(path.name + ".tmp")
    parquet.write_table(arrow.table(columns), fresh)
    os.replace(fresh, path)


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int, float}:
        return [None if v is None else float(v) for v in values]
    return values if len(kinds) < 2 else [None if v is None else str(v) for v in values]
