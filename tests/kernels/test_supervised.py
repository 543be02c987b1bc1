"""A command that goes on where what it calls aborts or hangs."""

import json
import pathlib
import textwrap

import pytest

from kernels_pallas import compile as compiler
from kernels_pallas import supervised

COMMAND = """
    import os, sys, time, pathlib
    import supervised  # itself, without the package, which takes seconds to import
    out = pathlib.Path(sys.argv[1])
    for name in sys.argv[2:]:
        if why := supervised.begin(name):
            out.open("a").write(f"{name} ended before: {why}\\n")
            continue
        if name == "aborts":
            supervised.log().write_text("I1 fine\\nF1128 09:35:03.1 7 a.cc:12] Check failed: x\\n")
            os.abort()
        if name == "hangs":
            time.sleep(600)
        out.open("a").write(f"{name} done\\n")
    sys.exit(3)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "some_command.py").write_text(textwrap.dedent(COMMAND))
    folder = pathlib.Path(supervised.__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{folder}")
    return tmp_path / "out"


def test_what_aborts_or_hangs_is_passed_by(command, capsys):
    argv = [str(command), "first", "aborts", "hangs", "last"]
    assert supervised.supervise("some_command", argv, stall=2) == 3
    lines = command.read_text().splitlines()
    # begun three times; what was done stands there each time, as the command keeps nothing
    assert lines[-4:] == [
        "first done",
        "aborts ended before: ended the process with SIGABRT: Check failed: x",
        "hangs ended before: killed: nothing new in 2 s, or no memory",
        "last done",
    ]
    assert "some_command: aborts: ended the process with SIGABRT" in capsys.readouterr().err


def test_the_same_end_twice_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "other_command.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert supervised.supervise("other_command", []) == 1


def test_alone_nothing_is_noted():
    assert supervised.begin("anything") is None
    assert supervised.log() is None


def test_a_compilers_abort_is_a_row_that_failed(tmp_path, monkeypatch):
    """The next child tells what ended the last one, and keeps it."""
    from kernels_pallas.chips import CHIPS
    from kernels_pallas.compiled import Kept

    (tmp_path / "ended").write_text(
        json.dumps(["v5p linear one_row forward xla", "ended the process with SIGABRT"]) + "\n")
    monkeypatch.setenv("KERNELS_PALLAS_SUPERVISED", str(tmp_path))
    monkeypatch.setattr(compiler, "_one", lambda chip: None)
    monkeypatch.setattr(compiler, "compile_case", lambda case, direction, *_: compiler.Row(
        "v5p", "linear", "one_row", direction, "xla", seconds=1.0))
    (case,) = compiler.cases(("linear",), ("one_row",), abstract=True)
    kept = Kept(str(tmp_path / "kept.jsonl"))
    rows = [row for row, _ in compiler.compile_for(CHIPS["v5p"], [(case, "xla")], kept)]
    assert [row.state for row in rows] == ["failed", "compiled"]
    assert rows[0].error == "ended the process with SIGABRT"
    assert '"error": "ended' in (tmp_path / "kept.jsonl").read_text()


def test_families_of_chips_have_processes_of_their_own(monkeypatch):
    """What training runs comes first for all of them; the table is made of what was kept."""
    asked = []

    def supervise(module, argv, quiet=False):
        assert module == "kernels_pallas.compile"
        options = compiler._parser().parse_args(argv)
        asked.append((options.target, options.main, options.kept_only, quiet))
        return 0

    monkeypatch.setattr(compiler.supervised, "supervise", supervise)
    assert compiler.command(["--target", "h100", "b200", "h200", "--keep", "kept"]) == 0
    hopper, blackwell = ["h100", "h200"], ["b200"]
    assert asked == [(hopper, True, False, True), (blackwell, True, False, True),
                     (hopper, False, False, True), (blackwell, False, False, True),
                     (["h100", "b200", "h200"], False, True, False)]
    asked.clear()
    assert compiler.command(["--target", "v6e", "tpu7x", "--json"]) == 0
    assert asked == [(["v6e", "tpu7x"], False, False, False)]
    asked.clear()
    monkeypatch.setattr(compiler.supervised, "supervise", lambda *a, **k: asked.append(a) or 2)
    assert compiler.command(["--main"]) == 2  # packages are missing: told once
    assert len(asked) == 1
