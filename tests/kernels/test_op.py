"""Op: order of preference, reasons, and no falling back."""

import pytest

from kernels_pallas.op import Backend, Op, prefer


def _small_only(x, *, y=0):
    return None if x + y < 10 else f"x + y = {x + y} is not below 10"


OP = Op("double", (
    Backend("fast", lambda x, *, y=0: ("fast", 2 * x + y), _small_only),
    Backend("reference", lambda x, *, y=0: ("reference", 2 * x + y)),
))


def test_the_first_that_can_run_is_taken():
    assert OP(3, y=1) == ("fast", 7)
    assert OP(30) == ("reference", 60)
    assert OP(3, implementation="reference") == ("reference", 6)


def test_explain_gives_a_verdict_per_backend_in_order():
    assert list(OP.explain(3).items()) == [("fast", None), ("reference", None)]
    assert OP.explain(8, y=2) == {"fast": "x + y = 10 is not below 10", "reference": None}


def test_a_named_backend_never_falls_back():
    with pytest.raises(ValueError, match=r"double: .*'fast' cannot run: x \+ y = 12 is not below"):
        OP(12, implementation="fast")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'slow' is unknown; there are fast, reference"):
        OP(1, implementation="slow")


def test_nothing_can_run():
    op = Op("never", (Backend("a", print, lambda: "no a"), Backend("b", print, lambda: "no b")))
    with pytest.raises(ValueError, match=r"no implementation can run \(a: no a; b: no b\)"):
        op()


def test_tables_are_checked():
    with pytest.raises(AssertionError, match="reference comes last"):
        Op("x", (Backend("reference", print), Backend("a", print)))
    with pytest.raises(AssertionError, match="twice"):
        Op("x", (Backend("a", print), Backend("a", print)))


def test_preferred_backends_come_first_where_they_can_run():
    with prefer("reference", "slow"):
        assert OP(3) == ("reference", 6)
        with prefer("fast"):
            assert OP(3, y=1) == ("fast", 7)
            assert OP(30) == ("reference", 60)  # fast refuses
        assert OP(3, implementation="fast") == ("fast", 6)
    assert OP(3) == ("fast", 6)
