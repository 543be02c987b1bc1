"""The parity command: what it is asked, and that it sees what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import parity
from kernels_pallas.linear import reference, xla
from kernels_pallas.op import Backend, Op


@pytest.mark.parametrize(("argv", "says"), [
    (["--op", "flush"], "op 'flush' is unknown"),
    (["--op", "linear", "--spec", "olmoe"], "spec 'olmoe' is unknown"),
    (["--op", "linear", "--backend", "cudnn"], "backend 'cudnn' is unknown; there are reference"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
])
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        parity.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_table_and_json(capsys):
    argv = ["--op", "grouped_matmul", "--spec", "nothing", "--dtype", "bfloat16"]
    assert parity.main([*argv, "--json"]) == 0
    here, there, *_ = json.loads(capsys.readouterr().out)["rows"]
    assert (here["backend"], here["same_bits"], here["failed"]) == ("xla", True, False)
    assert there["refused"].startswith("needs an NVIDIA GPU")
    assert parity.main([*argv, "--backend", "mosaic_gpu"]) == 1
    out, err = capsys.readouterr()
    assert "refused grouped_matmul mosaic_gpu: needs an NVIDIA GPU" in out
    assert "nothing ran" in err


def _wrong_slope(x, w):
    @jax.custom_vjp
    def f(x, w):
        return reference.linear(x, w)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda kept, d: (1.01 * d @ kept[1].T, kept[0].T @ d))
    return f(x, w)


def _broken(x, w):
    raise NotImplementedError("no such instruction")


def test_errors_are_seen_where_they_are(monkeypatch, capsys):
    (case,) = parity.cases(("linear",), ("one_row",))
    op = Op("linear", (
        Backend("right", xla.linear),
        Backend("off", lambda x, w: 1.001 * xla.linear(x, w)),
        Backend("wrong_slope", _wrong_slope),
        Backend("nan", lambda x, w: xla.linear(x, w) * jnp.nan),
        Backend("broken", _broken),
        Backend("reference", reference.linear),
    ))
    case = dataclasses.replace(case, op=op, call=op)
    names = [backend.name for backend in op.backends]
    right, off, slope, nan, broken, same = parity.check_case(case, "float32", names)
    assert not right.failed
    assert right.values < 1 > right.gradients
    # an error of a thousandth, in units of float32's tolerance of 2e-5
    assert off.values == pytest.approx(1e-3 / 2e-5, rel=0.05)
    assert (off.failed, slope.failed, nan.failed, broken.failed, same.failed) == (
        True, True, True, True, False)
    assert slope.values < 1
    assert slope.worst == "gradient[0]"
    assert np.isinf(nan.values)
    assert broken.error == "NotImplementedError: no such instruction"
    monkeypatch.setattr(parity, "cases", lambda *chosen, parity, dtype: [case])
    assert parity.main(["--op", "linear", "--spec", "one_row", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED NotImplementedError: no such instruction" in out
    assert sum("FAILED" in line for line in out.splitlines()) == 4


def test_keys_are_compared_by_their_scores():
    (case,) = parity.cases(("index_select",), ("one_token",))
    made = case.make()
    wanted = parity.Wanted(case, made)
    with parity.oracle():
        arguments, arrays, _ = wanted.inputs
        keywords = wanted.options | arrays
        alone, scores = parity._chosen_scores(arguments, keywords, wanted.out)
        _, other = parity._chosen_scores(arguments, keywords, np.zeros_like(wanted.out) + 7)
    q, k, w = (np.asarray(a, np.float64) for a in made[0])
    assert (alone == 1).all()  # one key is there for each, the other slot lists nothing
    by_hand = (np.maximum(np.einsum("bjd,bd->bj", q[:, 0], k[:, 0]), 0) * w[:, 0]).sum(-1)
    np.testing.assert_allclose(scores[:, 0, 0], by_hand, rtol=1e-12)
    assert np.isinf(other).all()  # there is no key 7


def test_nothing_is_compared_for_being_nothing():
    want = np.array([1.0, -1e30])
    assert parity._compare(np.array([1.0, -1e30], np.float32), want, "float32", 0.0)[""] == 0
    assert parity._compare(np.array([1.0, 3.0], np.float32), want, "float32", 0.0)[""] > 1
