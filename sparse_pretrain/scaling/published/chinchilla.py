"""Claim B1: the Chinchilla law, refitted to the points of its figure."""

from typing import Any

from sparse_pretrain.scaling.fit import fitting, laws, tables
from sparse_pretrain.scaling.published import files

# Besiroglu et al. (2404.10102), the exact-Huber fit over the grid of starts
PUBLISHED = {"A": 477.84, "B": 2143.86, "E": 1.81724, "alpha": 0.347313, "beta": 0.367183}
CHINCHILLA_FLOPS = 5.76e23


def refit(path: str = "", *, bootstrap: int = 40) -> dict[str, Any]:
    """The five constants, `tokens_per_param` at 5.76e23 FLOPs, and how many points were dropped.

    `path` is the CSV where it is not in the data folder.
    Errors: files.Absent where there is none. Source: 2404.10102, table 1.
    """
    table = tables.read_csv(path or files.find("published/chinchilla/svg_extracted_data.csv"))
    fit = fitting.fit(table, bootstrap=bootstrap)
    params, tokens, _ = laws.optimum(fit.theta, CHINCHILLA_FLOPS)
    return {
        **fit.constants,
        "intervals": dict(fit.intervals),
        "tokens_per_param": float(tokens / params),
        "dropped": len(fit.dropped),
        "dropped_losses": [row["loss"] for row in fit.dropped],
        "runs": fit.runs,
        "objective": fit.objective,
    }
