"""Section A: every exact claim is computed anew and passes; a few numbers are held here besides."""

import functools
from pathlib import Path

import numpy as np
import pytest

from sparse_pretrain.claims import base, bench

KNOWN = base.load()
EXACT = [claim for claim in KNOWN.values() if claim.section == "A"]


@functools.cache
def outcome(id):
    """What a claim's experiment finds; nothing exact writes a file."""
    return KNOWN[id].measure(bench.Bench(Path("unused")))


@pytest.mark.parametrize("claim", EXACT, ids=lambda claim: claim.name)
def test_it_passes(claim):
    found = outcome(claim.id)
    assert found.passed, found
    # each of these is a line of the published list, written down apart from the claims' own files
    assert MEASURED[claim.id] in found.measured


MEASURED = {
    "A1": "BF16 3,918,786,560; F8_E4M3 680,571,043,840; F32 41,555,600; total 684,531,386,000",
    "A2": "11 of 11 equal, OLMoE's active 1,282,017,280",
    "A3": "70.272 / 327.680 / 516.096 KB",
    "A4": "155.3 / 250.5 / 444.9 / 2473.2 GFLOP",
    "A5": "2788K h, $5.576M, 180K h",
    "A6": "cost -42.51 %, cache -93.34 %",
    "A7": "2048 / 2560 / 3584 / 5632",
    "A8": "32 of 32",
    "A9": "5.792B and 18.534B",
    "A10": "81.25 % and 95.31 %",
    "A11": "44.0 to 49.0 %",
    "A12": "50.53 bits",
    "A13": "absorbed",
    "A14": "1.0001 against",
    "A15": "0.759 by Hoffmann's law, 0.794 by the refit",
    "A16": "2.2256440889984477 and 2.2269634075087867",
    "A17": "Pro 26.5 % and 10.5 %, Flash 12.2 % and 7.3 %",
}


def test_every_claim_has_a_row():
    ids = [f"{s}{n}" for s, most in (("A", 17), ("B", 7), ("C", 15)) for n in range(1, most + 1)]
    assert list(KNOWN) == ids
    assert set(MEASURED) == {claim.id for claim in EXACT}


def test_main_model_and_active_parameters_of_v3():
    numbers = outcome("A1").numbers
    assert numbers["block scales"] == 41_540_496
    assert numbers["router biases"] == 15_104
    assert numbers["main model"] == 671_026_419_200
    assert numbers["active, both embeddings"] == 37_552_297_472
    assert numbers["active, one embedding"] == 36_625_618_432


def test_bytes_and_flops_of_v4_at_a_million_tokens():
    numbers = outcome("A17").numbers
    held = numbers["bytes per token"]
    assert held["V3.2"] == 48_068
    assert round(held["Pro"]) == 5_024
    assert round(held["Flash"]) == 3_509
    np.testing.assert_allclose(
        list(numbers["GFLOP per token"].values()), [1115, 295, 136], rtol=0.01
    )


def test_a_wrong_number_fails(tmp_path, monkeypatch):
    """A claim that cannot fail is worth nothing: other hours, another verdict."""
    claim = KNOWN["A5"]
    hours = claim.measure.__globals__["HOURS"]
    monkeypatch.setitem(hours, "post-training", 6_000)
    assert not claim.measure(bench.Bench(tmp_path)).passed
