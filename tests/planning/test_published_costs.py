"""The cost model's bars on published runs, each predicted by a fit to the others."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_pretrain.planning import cost

FILE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "published_costs.py"
_SPEC = importlib.util.spec_from_file_location("published_costs", FILE)
published = importlib.util.module_from_spec(_SPEC)
sys.modules["published_costs"] = published
_SPEC.loader.exec_module(published)


@pytest.fixture(scope="module")
def table():
    return published.table()


def test_the_bars(table):
    rows, _ = table
    assert len(rows) >= 8
    assert len({r["name"] for r in rows}) == len(rows)
    errors = {r["name"]: abs(r["error"]) for r in rows}
    assert np.median(list(errors.values())) <= published.BAR
    assert errors["DeepSeek-V3"] <= published.BAR_V3
    v3 = next(r for r in rows if r["name"] == "DeepSeek-V3")
    assert v3["low"] < 2_664_000 < v3["high"]


def test_the_constants_in_use_are_those_of_the_fit(table):
    rows, constants = table
    assert constants.products == pytest.approx(cost.ACCELERATOR.products, rel=2e-3)
    assert constants.traffic == pytest.approx(cost.ACCELERATOR.traffic, rel=2e-3)
    logs = [abs(np.log1p(r["error"])) for r in rows]
    assert np.exp(np.quantile(logs, 0.8)) == pytest.approx(cost.SPREAD, abs=0.02)
