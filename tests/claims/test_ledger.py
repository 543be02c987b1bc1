"""The frame: verdicts, what is run again and what is not, the ledger, and the README's copy."""

import json
import subprocess
from pathlib import Path

import pytest

from sparse_pretrain import cli
from sparse_pretrain.claims import base, bench, ledger, ngram, reproduce, results
from sparse_pretrain.scaling.published import files

ROOT = Path(__file__).resolve().parents[2]
TEXT = '''"""C99: The moon is made of cheese.

Source: 1234.56789,
    table 1.
Published: 42.
Kind: DIRECTION.
Tested: a slice.
Criterion: above 40.
Cost: nothing.
"""

from sparse_pretrain.claims import base

FOUND = 41.5


def measure(bench):
    """A number."""
    run = bench.kept("slice", {"a": 1}, lambda: {"x": FOUND, "flops": 2.0, "seconds": 60.0})
    if run["x"] > 50:
        raise base.NotRun("no cheese here")
    return base.Outcome(
        passed=run["x"] > 40, measured=f"{run['x']}", interval=(41.5, 41.0, 42.0), of="cheese",
        numbers={"x": run["x"], "inf": float("inf")},
    )
'''


@pytest.fixture
def claim(tmp_path):
    """A claim of one file, made anew with another number on demand."""

    def make(found=41.5, text=TEXT):
        file = tmp_path / "c99_cheese.py"
        file.write_text(text.replace("FOUND = 41.5", f"FOUND = {found}"))
        return base.parse(file)

    return make


def run(claim, tmp_path, **more):
    return reproduce.run_claim(
        claim, tmp_path / "out", tmp_path / "runs", say=lambda _: None, **more
    )


def test_a_claim_is_its_docstring(claim):
    c = claim()
    assert (c.id, c.name, c.kind, c.section) == ("C99", "c99_cheese", "DIRECTION", "C")
    assert c.source == "1234.56789, table 1."
    assert c.criterion == "above 40."
    # the record of a result changes no code, another number does
    recorded = claim(text=TEXT.replace("Cost: nothing.", "Cost: nothing.\nResult: PASS."))
    assert (recorded.code, recorded.result) == (c.code, "PASS.")
    assert claim(40.5).code != c.code


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("C99: The", "The", "ID: title"),
        ("Criterion: above 40.\n", "", "Criterion"),
        ("Kind: DIRECTION", "Kind: GUESS", "GUESS"),
        ("def measure", "def other", "measure"),
    ],
)
def test_a_file_that_is_no_claim_says_why(claim, old, new, told):
    with pytest.raises(ValueError, match=told):
        claim(text=TEXT.replace(old, new))


def test_pass_fail_and_not_run(claim, tmp_path):
    verdict = run(claim(), tmp_path)
    assert verdict.verdict == base.PASS
    assert reproduce.describe(verdict) == "PASS: 41.5; cheese 41.5 [41, 42]"
    record = json.loads((tmp_path / "out/c99_cheese.json").read_text())
    assert (record["minutes"], record["flops"], record["numbers"]["inf"]) == (1.0, 2.0, None)
    assert run(claim(39.0), tmp_path, again=True).verdict == base.FAIL
    assert run(claim(60.0), tmp_path, again=True).verdict == base.NOT_RUN
    # a claim that cannot run leaves the earlier result
    assert json.loads((tmp_path / "out/c99_cheese.json").read_text())["verdict"] == base.FAIL


def test_a_criterion_without_a_rule_is_reported(claim, tmp_path):
    verdict = run(claim(text=TEXT.replace('run["x"] > 40, m', "None, m")), tmp_path)
    assert verdict.verdict == base.REPORTED
    (row,) = ledger.rows({"C99": claim()}, tmp_path / "out")
    assert ledger.counts([row]) == "1 claims: 0 PASS, 0 FAIL, 1 REPORTED, 0 NOT RUN"


def test_runs_are_kept_and_again_removes_them(claim, tmp_path):
    assert run(claim(41.5), tmp_path).result["numbers"]["x"] == 41.5
    assert run(claim(44.0), tmp_path).result["numbers"]["x"] == 41.5  # the same content: kept
    assert run(claim(44.0), tmp_path, again=True).result["numbers"]["x"] == 44.0


def test_what_is_measured_is_skipped_until_the_code_changes(claim, tmp_path, monkeypatch):
    first = run(claim(), tmp_path)
    monkeypatch.setattr(results, "current", lambda result, c: result["code"] == c.code)
    assert run(claim(), tmp_path).skipped
    assert "measured before" in reproduce.describe(run(claim(), tmp_path))
    assert not run(claim(44.0), tmp_path).skipped
    assert first.result["code"] == claim(41.5).code


def test_current_reads_commit_and_code(claim, tmp_path):
    c, head = claim(), _git("rev-parse", "HEAD")
    result = {"code": c.code, "commit": head}
    changed = bool(_git("diff", "--name-only", head, "--", *results.PACKAGES))
    assert results.current(result, c) is not changed
    assert not results.current(result | {"commit": head + "+"}, c)
    assert not results.current(result | {"code": "other"}, c)


def _git(*argv):
    done = subprocess.run(["git", "-C", ROOT, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    return done.stdout.strip()


def test_a_criterion_that_moves_voids_the_verdict(claim, tmp_path):
    run(claim(), tmp_path)
    moved = claim(text=TEXT.replace("above 40", "above 41"))
    (row,) = ledger.rows({"C99": moved}, tmp_path / "out")
    assert row.verdict == "PASS, by another criterion"
    assert "1 void" in ledger.counts([row])
    (row,) = ledger.rows({"C99": claim()}, tmp_path / "out")
    assert (row.verdict, row.measured, row.minutes) == ("PASS", "41.5", 1.0)
    text = ledger.in_text(f"a\n{ledger.BEGIN}\nold\n{ledger.END}\nb", [row])
    assert "old" not in text
    assert "| C99 | The moon is made of cheese (1234.56789, table 1) | 42 | 41.5 |" in text
    assert text.endswith("\nb")
    report = ledger.report({"C99": claim()}, tmp_path / "out")
    assert "95 % interval of cheese: 41.5 [41, 42]" in report
    with pytest.raises(ValueError, match="marks"):
        ledger.in_text("nothing", [row])


def test_missing_and_changed_public_files(tmp_path, monkeypatch):
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "cache"))
    place = bench.Bench(tmp_path / "runs")
    with pytest.raises(base.NotRun, match=r"karpathy/makemore, names.txt"):
        place.data("names/names.txt")
    (tmp_path / "names").mkdir()
    (tmp_path / "names/names.txt").write_text("emma\n")
    with pytest.raises(ValueError, match="sha256"):
        place.data("names/names.txt")


def test_the_readme_and_the_report_are_current():
    known, where = base.load(), results.folder()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = ledger.rows(known, where)
    command = "sparse-pretrain claims --readme=README.md"
    assert ledger.in_text(text, table) == text, f"run {command}"
    report = (where / "REPORT.md").read_text(encoding="utf-8")
    assert report == ledger.report(known, where), "run sparse-pretrain claims --report"
    for row in table:
        assert row.verdict in base.VERDICTS, row
        told = known[row.id].result
        if row.verdict != base.NOT_RUN:  # the file's own record is of the same verdict
            assert told.startswith(f"{row.verdict} at {row.commit[:7]}"), (row.id, told)


def test_the_commands(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    assert cli.main(["reproduce", "A8", "a10_moba_sparsity", f"--results={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS:") == 2
    assert "2 PASS, 0 FAIL, 0 REPORTED, 0 NOT RUN" in out
    assert cli.main(["claims", "--json", "--section=A", f"--results={tmp_path}"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in rows if r["verdict"] == "PASS"] == ["A8", "A10"]
    for argv, told in (
        (["reproduce"], "--section or --all"),
        (["reproduce", "kv_per_tokens"], "kv_per_token"),
        (["reproduce", "A8", "--scale=h200"], "accelerator"),
    ):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1


def test_counts_against_a_hand_count():
    """Order 1 on 'abab', of two symbols: every number by hand."""
    import numpy as np

    train = np.array([0, 1, 0, 1])
    # after a: b twice, one kind; p(b|a) = (2 + 1 p(b)) / 3; p(b) = (2 + 2 / 2) / 6 = 1/2
    assert ngram.nats(train, np.array([0, 1]), 2, 0) == pytest.approx(np.log(2))
    expected = -(np.log((1 + 0.5) / 2) + np.log((2 + 0.5) / 3)) / 2
    assert ngram.nats(train, np.array([0, 1]), 2, 1) == pytest.approx(expected)
    with pytest.raises(ValueError, match="63 bits"):
        ngram.nats(train, train, 2**20, 4)


def test_counts_on_shakespeare():
    """The published-in-house scores of orders 1 to 5."""
    import numpy as np

    try:
        text = files.find("tinyshakespeare/input.txt").read_text()
    except files.Absent as e:
        pytest.skip(str(e))
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([symbols[c] for c in text])
    cut = int(0.9 * len(ids))
    found = [ngram.nats(ids[:cut], ids[cut:], len(symbols), order) for order in range(1, 6)]
    assert [round(x, 3) for x in found] == [2.486, 2.049, 1.774, 1.669, 1.698]
