"""The commands on one small run: train, resume, refuse, score, write, list, compare, plan."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sparse_pretrain import cli, config, data
from sparse_pretrain.planning import flops

EXPERIMENT = """
from ml_collections import ConfigDict

def get_config(arg=""):
    ffn = dict(kind="moe", experts=4, top_k=2, hidden=16)
    block = dict(attention=dict(kind="full", heads=2), ffn=ffn)
    return ConfigDict(dict(
        name="tiny",
        steps=6,
        data=dict(source="text_folder:texts", tokenizer="bytes", seq=32, batch=4),
        model=dict(width=16, blocks=dict(moe=block), pattern=("moe",), repeats=2),
        optim=dict(kind="adamw", lr=1e-2),
        schedule=dict(kind="constant", warmup=0.0),  # one program for runs of every length
        checkpoint=dict(every=2),
        eval=dict(tokens=512),
        sample=dict(tokens=8, prompt="the "),
    ))
"""
WORDS = "the cat sat on the mat and ran to see what was there in a red hat".split()


def spawn(folder, *argv, **kw):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "SPARSE_PRETRAIN_CACHE": str(folder / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "sparse_pretrain", *argv]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts, an experiment, and a run that the command line trained.

    Made once and shared by the test processes, since it takes longer than all the tests.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "commands"
    try:
        root.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 400
        while not (root / "err.txt").exists():
            assert time.monotonic() < deadline, "the process that trains did not end"
            time.sleep(0.2)
        return root
    rng = np.random.default_rng(0)
    for domain in ("one", "two"):
        (root / "texts" / domain).mkdir(parents=True)
        for i in range(20):
            text = " ".join(rng.choice(WORDS, 200))
            (root / "texts" / domain / f"{i}.txt").write_text(f"{domain} {i} {text}\n")
    (root / "tiny.py").write_text(EXPERIMENT)
    done = spawn(root, "train", "--config=tiny.py")
    out, err = done.communicate(timeout=400)
    (root / "out.txt").write_text(out)
    (root / "err.txt").write_text(err)
    assert done.returncode == 0, err
    return root


@pytest.fixture
def command(folder, capsys, monkeypatch):
    """Runs a command in this process, in the folder: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)

    def call(*argv):
        code = cli.main(list(argv))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_a_run_leaves_its_files_and_says_what_it_did(folder):
    run = folder / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("steps", "tokens", "bits_per_byte", "nats_per_token", "tokens_per_second"):
        assert np.isfinite(summary[key]), key
    for key in ("compile_seconds", "wall_seconds", "flops"):
        assert summary[key] > 0, key
    assert summary["steps"] == 6
    assert [r["step"] for r in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (run / "report.html").stat().st_size > 1000
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["argv"] == ["sparse-pretrain", "train", "--config=tiny.py"]
    # the recorded configuration is the resolved one, and builds again
    assert config.from_config_dict(record["config"]).to_dict() == record["config"]
    out = (folder / "out.txt").read_text()
    assert "bits/byte" in out
    assert "report.html" in out
    assert "Traceback" not in (folder / "err.txt").read_text()
    assert "Warning" not in (folder / "err.txt").read_text()


def test_a_finished_run_is_not_trained_again(command, folder):
    before = (folder / "runs/tiny/metrics.jsonl").read_text()
    code, _, err = command("train", "--config=tiny.py")
    assert (code, err) == (0, "")
    assert (folder / "runs/tiny/metrics.jsonl").read_text() == before


def test_a_finished_run_shows_its_table_again_without_its_corpus(command, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **kw: pytest.fail("the data was looked at"))
    code, out, err = command("train", "--config=tiny.py")
    assert (code, err) == (0, "")
    for part in ("finished already", "bits/byte", "report.html", "What to try next"):
        assert part in out


@pytest.mark.parametrize("broken", ["[]", '{"name": "tiny", "conf'])
def test_a_broken_record_is_one_line_that_names_it(command, folder, broken):
    name = f"broken{len(broken)}"
    (folder / "broken" / name).mkdir(parents=True, exist_ok=True)
    (folder / "broken" / name / "run.json").write_text(broken)
    file = f"broken/{name}/run.json"
    for argv in (["train", "--config=tiny.py"], ["eval"], ["generate"]):
        code, out, err = command(*argv, f"--workdir=broken/{name}")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {file}: cannot be read (")
        assert err.count("\n") == 1
    code, out, err = command("runs", f"broken/{name}")
    assert (code, err) == (0, "")
    assert f"broken/{name}: run.json is " in out
    assert "failed" in out


def test_another_configuration_is_refused_with_the_differing_keys(command):
    code, _, err = command(
        "train", "--config=tiny.py", "--config.model.width=32", "--config.optim.lr=1e-3"
    )
    assert code == 2
    assert err.count("\n") == 1
    for part in ("error: ", "model.width", "16", "32", "optim.lr", "0.001"):
        assert part in err


def test_eval_scores_the_held_out_text(command, folder):
    code, out, err = command("eval", "--workdir=runs/tiny", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found["per_domain"]) == {"one", "two"}
    assert found["step"] == 6
    # the loop's last evaluation saw `eval.tokens` of them; the domains add up to the whole
    parts = found["per_domain"].values()
    assert sum(p["tokens"] for p in parts) == found["tokens"]
    nats = sum(p["nats_per_token"] * p["tokens"] for p in parts)
    assert nats / found["tokens"] == pytest.approx(found["nats_per_token"])
    # bytes are tokens here, but for the one between documents
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / np.log(2), rel=0.05)


def test_eval_of_a_text_and_of_other_data(command, folder):
    (folder / "t.txt").write_text("the cat sat on the mat " * 20)
    code, out, _ = command("eval", "--workdir=runs/tiny", "--text=t.txt", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["per_domain"]) == {"text"}
    assert found["manifest_hash"] is None
    (folder / "texts").rename(folder / "gone")  # a text needs the tokenizer, not the corpus
    again = command("eval", "--workdir=runs/tiny", "--text=t.txt", "--json")
    (folder / "gone").rename(folder / "texts")
    assert json.loads(again[1]) == found
    (folder / "noise.txt").write_text("".join(chr(33 + i * 7919 % 90) for i in range(460)))
    noise = json.loads(command("eval", "--workdir=runs/tiny", "--text=noise.txt", "--json")[1])
    assert noise["bits_per_byte"] > found["bits_per_byte"]
    code, out, _ = command("eval", "--workdir=runs/tiny", "--data=text_folder:texts/one")
    assert code == 0
    assert out.startswith("tiny at step 6")
    assert "bits/byte" in out


def test_eval_and_generate_take_any_checkpoint(command):
    found = {}
    for which in ("last", "best", "6", "4"):
        argv = ["--workdir=runs/tiny", f"--checkpoint={which}", "--json"]
        code, out, err = command("eval", *argv)
        assert (code, err) == (0, "")
        found[which] = json.loads(out)
        code, out, err = command("generate", *argv, "--tokens=2")
        assert (code, err) == (0, "")
        assert json.loads(out)["step"] == found[which]["step"] == (4 if which == "4" else 6)
    assert found["last"] == found["best"] == found["6"]
    assert found["4"]["bits_per_byte"] != found["6"]["bits_per_byte"]


def test_eval_of_tasks(command, folder):
    lines = [
        {"prompt": "the cat sat on the", "choices": ["mat", "~~~~"], "answer": 0, "task": "a"},
        {"prompt": "the cat sat on the", "choices": ["mat", "~~~~"], "answer": 1, "task": "b"},
    ]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = command("eval", "--workdir=runs/tiny", "--tasks=tasks.jsonl", "--json")
    assert code == 0
    found = json.loads(out)["tasks"]
    assert found["count"] == 2
    assert found["accuracy"] == found["chance"] == 0.5
    assert {found["per_task"][k]["accuracy"] for k in "ab"} == {0.0, 1.0}
    assert "bits_per_byte" not in json.loads(out)


def test_a_task_named_all_is_not_the_total(command, folder):
    choices = {"prompt": "the cat sat on the", "choices": ["mat", "~~~~"]}
    lines = [
        choices | {"answer": 0, "task": "all"},
        choices | {"answer": 1},
        choices | {"answer": 1},
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ("eval", "--workdir=runs/tiny", "--tasks=all.jsonl")
    found = json.loads(command(*argv, "--json")[1])["tasks"]
    assert found["count"] == 3
    assert {k: (v["count"], v["accuracy"]) for k, v in found["per_task"].items()} == {
        "all": (1, 1.0),
        "": (2, 0.0),
    }
    table = [line.split() for line in command(*argv)[1].splitlines()[2:]]
    assert [(row[0], row[-1]) for row in table] == [("all", "1"), ("(no", "2"), ("(all)", "3")]


def test_generate(command):
    argv = ["generate", "--workdir=runs/tiny", "--tokens=6"]
    code, out, err = command(*argv, "--json", "--prompt=the ", "--seed=1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["prompt"], found["tokens"], found["step"]) == ("the ", 6, 6)
    code, out, err = command(*argv, "--prompt=the ", "--seed=1")
    assert (code, out, err) == (0, "the " + found["text"] + "\n", "")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["generate", "--tokens=0"], ["--tokens: must be at least 1, got 0"]),
        (["generate", "--temperature=-1"], ["--temperature: must be 0 or more, got -1.0"]),
        (["generate", "--temperature=nan"], ["--temperature"]),
        (["generate", "--top-p=1.5"], ["--top-p: must be in (0, 1], got 1.5"]),
        (["generate", "--seed=-1"], ["--seed"]),
        (["eval", "--text=nothing.txt"], ["--text: cannot read 'nothing.txt': no such file"]),
        (["eval", "--text=texts"], ["--text: cannot read 'texts': is a directory"]),
        (["eval", "--text=t.txt", "--data=python_stdlib"], ["--text or --data"]),
        (["eval", "--text=empty.txt"], ["--text: 'empty.txt': ", "no token to predict"]),
        (["eval", "--tasks=nothing.jsonl"], ["--tasks: cannot read nothing.jsonl"]),
        (["eval", "--tasks=tiny.py"], ["--tasks: tiny.py, line 2"]),
        (["eval", "--data=text_folder:empty"], ["data.source", "empty"]),
        (["eval", "--checkpoint=5"], ["--checkpoint: ", "no checkpoint '5'; steps there are 4, 6"]),
        (["generate", "--checkpoint=worst"], ["--checkpoint: ", "'worst'; steps there are 4, 6"]),
    ],
)
def test_mistakes_on_a_trained_run(command, folder, argv, parts):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty.txt").write_text("")
    code, out, err = command(*argv, "--workdir=runs/tiny")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    for part in ("error: ", *parts):
        assert part in err


def test_a_missing_run_names_those_there_are(command):
    code, _, err = command("eval", "--workdir=runs/other")
    assert code == 2
    assert "'runs/other' holds no run; there are " in err
    assert "runs/tiny" in err


def test_runs_and_their_difference(command, folder):
    code, out, _ = command("runs", "--json")
    assert code == 0
    (row,) = [r for r in json.loads(out) if r["workdir"] == "runs/tiny"]
    assert (row["name"], row["status"]) == ("tiny", "finished")
    assert "tiny" in command("runs")[1]
    code, out, _ = command("runs", "diff", "runs/tiny", "runs/tiny", "--json")
    assert code == 0
    assert json.loads(out)["config"] == []
    code, _, err = command("runs", "diff", "runs/tiny", "runs/none")
    assert code == 2
    assert "runs/none" in err


def test_config_prints_what_it_costs(command):
    code, out, err = command("config", "--config=tiny.py", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    # by hand: bytes and their end are 257 tokens; width 16, 2 layers, 4 experts of which 2, and 1
    vocab, attention, expert = 257, 4 * 16 * 16 + 2 * 8, 3 * 16 * 16
    layer = attention + 4 * expert + expert + 16 * 4 + 2 * 16
    assert found["total_params"] == 2 * vocab * 16 + 2 * layer + 16
    assert found["active_params"] == found["total_params"] - vocab * 16 - 2 * 2 * expert
    assert found["active_params_with_embedding"] == found["active_params"] + vocab * 16
    assert found["kv_bytes_per_token"] == 2 * 2 * 16 * 2
    assert found["kv_format"] == "bfloat16, full"
    assert found["steps"] == 6
    assert found["tokens"] == 6 * 4 * 32
    assert found["config"]["model"]["width"] == 16
    experiment = config.resolve("tiny.py", ["model.vocab=257"])
    per_token = flops.train_flops_per_token(experiment.model, 32).model
    assert found["train_flops_per_token"] == per_token > 6 * 2 * layer / 3
    code, out, _ = command("config", "--config=tiny.py", "--config.model.width=32")
    assert code == 0
    assert "width: 32" in out
    assert "FLOPs per token" in out


def test_the_record_of_a_run_is_what_config_said(command, folder):
    said = json.loads(command("config", "--config=tiny.py", "--json")[1])
    derived = json.loads((folder / "runs/tiny/run.json").read_text())["derived"]
    shared = set(said) & set(derived)
    assert {"steps", "total_params", "flops", "memory_bytes"} <= shared
    assert {k: said[k] for k in shared} == {k: derived[k] for k in shared}


def test_another_run_can_be_started_from(command, folder):
    argv = ["train", "--config=tiny.py", "--config.steps=2", "--quiet"]
    assert command(*argv, "--init-from=runs/tiny", "--workdir=runs/next") == (0, "", "")
    first = rows(folder / "runs/next/metrics.jsonl")[0]["loss"]
    fresh = rows(folder / "runs/tiny/metrics.jsonl")
    assert first < fresh[0]["loss"] - 0.1
    for source, part in (("runs/none", "runs/none"), ("runs/tiny@5", "steps there are 4, 6")):
        argv = ("train", "--config=tiny.py", f"--init-from={source}", "--workdir=runs/x")
        code, _, err = command(*argv)
        assert code == 2
        assert err.startswith("error: config.init_from: ")
        assert part in err


def test_ctrl_c_saves_and_the_same_command_resumes(folder):
    argv = ["train", "--config=tiny.py", "--config.steps=100000", "--config.data.repeat=true",
            "--workdir=runs/long", "--config.checkpoint.every=1000000"]  # fmt: skip
    run = folder / "runs/long"
    process = spawn(folder, *argv)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len(rows(run / "metrics.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    told, done = err.strip().split("\n")
    assert told.startswith("stopping after this step")
    assert "same command again" in done
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert list((run / "checkpoints").iterdir())
