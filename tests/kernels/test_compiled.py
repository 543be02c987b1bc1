"""Files of what became of compilations."""

import json

import pytest

from kernels_pallas import compiled


def test_a_change_of_one_op_ages_that_one_and_what_is_made_of_it(tmp_path):
    """Also where a file that all share names every op."""
    files = {"__init__.py": "from kernels_pallas.flash import flash", "device.py": "chips = ()",
             "flash/xla.py": "one = 1", "linear/xla.py": "two = 2",
             "indexer/xla.py": "from kernels_pallas.flash import xla"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = compiled.sources(tmp_path)
    (tmp_path / "flash" / "xla.py").write_text("one = 3")
    after = compiled.sources(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"flash", "indexer"}
    (tmp_path / "device.py").write_text("chips = (1,)")
    assert compiled.sources(tmp_path)[""] != after[""]


def test_files_of_rows_are_merged_by_program(tmp_path, capsys):
    """The last row of each stays, in the first file; another's rows and versions come along."""
    def row(spec, seconds, target="h200"):
        return json.dumps({"key": "", "by": "a" if target == "h200" else "b", "row": {
            "target": target, "op": "flash", "spec": spec, "direction": "forward",
            "backend": "xla", "seconds": seconds}})

    heads = [json.dumps({"by": by, "versions": {"jax": by}}) for by in "ab"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("\n".join([heads[0], row("plain", 1), row("gqa", 2), row("plain", 3)]) + "\n")
    two.write_text("\n".join([*heads, row("gqa", 4), row("gqa", 5, "v5p")]) + "\n")
    assert compiled.main([str(one), str(two)]) == 0
    assert capsys.readouterr().out == f"{one}: 3 programs\n"
    assert one.read_text().splitlines() == [
        heads[0], row("plain", 3), row("gqa", 4), heads[1], row("gqa", 5, "v5p")]
    assert sorted(tmp_path.iterdir()) == [one, two]
    before = one.read_text()
    two.write_text("{}\n")
    with pytest.raises(SystemExit):
        compiled.main([str(one), str(two)])
    assert f"{two}: line 1 is not a row" in capsys.readouterr().err
    assert one.read_text() == before
