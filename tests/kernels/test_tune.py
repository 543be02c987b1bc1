"""Block sizes: which of argument, file and guess decides; damaged files; and the search itself."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench, blocks, device, tune
from kernels_pallas.chips import CHIPS
from kernels_pallas.cross_entropy import cross_entropy, specs
from kernels_pallas.grouped_matmul import contiguous, tiles
from kernels_pallas.op import Backend, Op

GUESS, OTHERS = {"m": 64, "n": 128}, ({"m": 128, "n": 256}, {"m": 32, "n": 32})


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder of tuned files in place of the package's, and this device's part of it."""
    monkeypatch.setattr(blocks, "FOLDER", tmp_path)
    return tmp_path / device.kind()


def write(folder, entry, op="an_op"):
    blocks.store(folder / f"{op}.json", {"op": op, "entries": [entry]})


def ask(length=8, **given):
    return blocks.choose("an_op", "b", {"L": length, "dtype": "float32"}, GUESS, OTHERS, **given)


ENTRY = {"backend": "b", "workload": {"dtype": "float32", "L": 8}, "blocks": OTHERS[0]}


def test_argument_then_file_then_guess(folder):
    assert ask() == GUESS
    write(folder, ENTRY)
    assert ask() == OTHERS[0]
    assert ask(length=9) == GUESS  # another workload
    assert ask(m=None, n=None) == OTHERS[0]
    # an argument decides alone: the file's m belongs to the file's n
    assert ask(m=None, n=512) == {"m": 64, "n": 512}
    with blocks.trying({blocks.name_of("an_op", "b", ENTRY["workload"]): OTHERS[1]}):
        assert ask() == OTHERS[1]
    assert ask() == OTHERS[0]


def test_a_file_is_of_one_kind_of_device(folder):
    write(folder, ENTRY)
    with device.assume(CHIPS["h200"].target):
        assert device.kind() == "nvidia_h200"
        assert ask() == GUESS
        write(blocks.FOLDER / "nvidia_h200", ENTRY | {"blocks": OTHERS[1]})
        assert ask() == OTHERS[1]
    assert ask() == OTHERS[0]


@pytest.mark.parametrize(("text", "says"), [
    ("{", "no JSON: "),
    ("[]", "entries: expected a list"),
    ('{"entries": [3]}', r"entries\[0\].backend: got None, expected a str"),
    ('{"entries": [{"backend": "b", "workload": {}}]}', r"entries\[0\].blocks: got None"),
    ('{"entries": [{"backend": "b", "workload": {}, "blocks": {"m": "64"}}]}',
     r"entries\[0\].blocks.m: got '64', expected a number above 0"),
    ('{"entries": [{"backend": "b", "workload": {}, "blocks": {"m": 0}}]}',
     r"entries\[0\].blocks.m: got 0"),
    ('{"entries": [{"backend": "b", "workload": {"L": 8, "dtype": "float32"}, '
     '"blocks": {"m": 7, "n": 7}}]}', r"blocks=\{'m': 7, 'n': 7\} of b .* is none of what it runs"),
])
def test_a_damaged_file_is_refused_in_one_line(folder, text, says):
    folder.mkdir()
    (folder / "an_op.json").write_text(text)
    blocks._read.cache_clear()
    with pytest.raises(ValueError, match=f"an_op.json: {says}") as refused:
        ask()
    assert "tune again, or delete the file" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cross_entropy_takes_its_chunk_from_the_file(folder):
    (x, head, *rest), keywords = specs.Spec(T=256, D=8, V=16).arguments()

    def chunk(**changed):
        jaxpr = str(jax.make_jaxpr(lambda x: cross_entropy(x, head, *rest, **keywords | changed)[0])
                    (x))
        return next(n for n in (64, 128, 256) if f"f32[{n},16]" in jaxpr)

    assert chunk() == 256
    workload = {"T": 256, "D": 8, "V": 16, "head": "DV", "dtype": "float32"}
    large = 2**22 // 16
    write(folder, {"backend": "xla", "workload": workload, "blocks": {"chunk": large // 4}},
          "cross_entropy")
    assert chunk() == 256  # a larger chunk than there are tokens
    with blocks.trying({blocks.name_of("cross_entropy", "xla", workload): {"chunk": 128}}):
        assert chunk() == 128
        assert chunk(chunk=64) == 64


def test_hopper_tiles_come_from_the_file(folder):
    shape = jax.ShapeDtypeStruct
    whole = shape((4,), jnp.int32)
    layout = contiguous(whole, whole, 512, 128)
    with device.assume(CHIPS["h200"].target):
        assert tiles.choose(layout, 512, 2, contracted=64).n == 256
        workload = {"product": "rows", "rows": 512, "experts": 4, "contracted": 64, "columns": 512}
        write(blocks.FOLDER / device.kind(),
              {"backend": "mosaic_gpu", "workload": workload, "blocks": {"n": 128}},
              "grouped_matmul")
        plan = tiles.choose(layout, 512, 2, contracted=64)
        assert (plan.n, plan.out_slots) == (128, 2)
        assert tiles.choose(layout, 512, 2, product="weights", contracted=64).n == 256


def _paced(x, w):
    """The seconds that a run in so many parts is to take."""
    del w
    parts = blocks.choose("linear", "paced", {"T": x.shape[0]}, {"parts": 4},
                          [{"parts": 1}, {"parts": 8}, {"parts": 3}])["parts"]
    if parts == 3:
        raise NotImplementedError("three parts")
    return jnp.float32(parts)


@pytest.fixture
def paced(monkeypatch):
    """The command with one workload whose result is its time, times a factor by turns."""
    (case,) = tune.cases(("linear",), ("one_row",))
    op = Op("linear", (Backend("paced", _paced), Backend("reference", lambda x, w: x @ w)))
    case = dataclasses.replace(case, op=op, call=op)
    monkeypatch.setattr(tune, "cases", lambda *chosen, speed: [case])

    def run(factors):
        clock = itertools.cycle(factors)  # one for each of the three that run
        monkeypatch.setattr(bench, "batch", lambda call: 1)
        monkeypatch.setattr(bench, "timed", lambda call, times: float(call()) * next(clock))
        return tune.main(["--op", "linear", "--direction", "forward", "--rounds", "4"])

    return run


def test_the_fastest_is_found_and_written(folder, paced, capsys):
    assert paced([1]) == 0
    out, err = capsys.readouterr()
    assert "linear one_row paced {\"T\": 1}: {'parts': 1}" in out
    assert "{'parts': 3}: NotImplementedError: three parts" in err
    found = json.loads((folder / "linear.json").read_text())
    assert found["device"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__
    (entry,) = found["entries"]
    assert entry["blocks"] == {"parts": 1}
    assert entry["milliseconds"] == {"guess": 4000, "tuned": 1000}
    write(folder, ENTRY, "linear")
    assert paced([1]) == 0  # another workload's entry stays
    assert len(json.loads((folder / "linear.json").read_text())["entries"]) == 2
    # what wins half of the rounds only is no finding, and what was found before is taken back
    assert paced([1, 1, 1, 1, 6, 6]) == 0
    assert json.loads((folder / "linear.json").read_text())["entries"] == [ENTRY]


@pytest.mark.parametrize(("argv", "says"), [
    ([], "required: --op"),
    (["--op", "linear", "--rounds", "3"], "at least 4"),
    (["--op", "linear", "--backend", "cudnn"], "backend 'cudnn' is unknown"),
])
def test_wrong_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_nothing_to_tune_is_said(folder, capsys):
    assert tune.main(["--op", "linear", "--spec", "one_row"]) == 0
    assert "asks for block sizes" in capsys.readouterr().err
    assert not folder.exists()
