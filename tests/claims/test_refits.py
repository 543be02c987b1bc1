"""Section B as claims: cheap ones run here; tests/scaling/test_published.py holds their numbers."""

import pytest

from sparse_pretrain.claims import base, bench
from sparse_pretrain.scaling.published import files

CHEAP = ("B4", "B5", "B6")
KNOWN = base.load()


@pytest.mark.parametrize("id", CHEAP)
def test_it_passes_where_its_data_is(id, tmp_path):
    try:
        found = KNOWN[id].measure(bench.Bench(tmp_path))
    except files.Absent as e:
        pytest.skip(str(e))
    assert found.passed, found
