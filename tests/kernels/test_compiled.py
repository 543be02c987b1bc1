"""Files of what became of compilations."""

import json

import pytest

from kernels_pallas import compiled


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
