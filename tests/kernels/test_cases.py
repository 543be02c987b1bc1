"""The workloads of every op as calls: their shapes, and the work that they are counted to be."""

import jax
import numpy as np
import pytest

from kernels_pallas.cases import OPS, _visible, cases
from kernels_pallas.flash import specs


def test_every_op_and_spec_has_shapes():
    found = list(cases(abstract=True))
    assert {case.op.name for case in found} == set(OPS)
    for case in found:
        arguments, keywords = case.shapes()
        assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves((arguments, keywords)))
        assert None in case.op.explain(*arguments, **keywords).values()
        assert case.gradient >= case.forward >= 0


@pytest.mark.parametrize("name", ["plain", "loop_strided_window"])
def test_visible_pairs_are_counted(name):
    s = specs.PARITY[name]
    S = s.S or s.L
    row = np.arange(s.L)[:, None] + (S - s.L if s.stride == s.span == 1 else 0)
    behind = row - (np.arange(S) * s.stride + s.span - 1)
    seen = (behind >= 0) & (behind < (s.window or S + s.L))
    assert _visible(s.L, S, window=s.window, stride=s.stride, span=s.span) == seen.sum()
