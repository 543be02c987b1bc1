"""The top record: files, overrides, checks across fields, and what follows from the data."""

import pytest

from sparse_pretrain import config
from sparse_pretrain.training import metrics

BLOCK = {"attention": {"kind": "mla", "heads": 2}, "ffn": {"kind": "moe", "experts": 4}}
BASE = {
    "name": "base",
    "data": {"seq": 32, "batch": 8},
    "model": {"width": 32, "blocks": {"moe": BLOCK}, "pattern": ["moe"], "repeats": 2},
    "optim": {"kind": "muon"},
}


def build(*overrides, **sections):
    return config.from_config_dict(config.SCHEMA.override(BASE | sections, overrides))


def fails(call, *parts):
    with pytest.raises(ValueError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("folder", config.experiment_dirs()[:1])
def test_shipped_experiments_resolve_and_survive_their_record(folder):
    files = [f for f in folder.glob("*.py") if "def get_config" in f.read_text()]
    assert len(files) >= 2
    for file in files:
        experiment = config.resolve(str(file))
        assert experiment.name == file.stem
        assert config.from_config_dict(experiment.to_dict()) == experiment


def test_the_default_is_quickstart_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = config.resolve()
    assert default.name == "quickstart"
    for where in ("quickstart", "quickstart.py", "experiments/quickstart.py"):
        assert config.resolve(where) == default


def test_the_sinks_are_those_that_exist():
    assert set(config.SINKS) == set(metrics.SINKS)
    for section in (config.LogConfig(), config.LogConfig(every=5, sinks=("jsonl", "tensorboard"))):
        assert section.to_dict()["every"] == section.every


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["accumulate=3"], ["config.accumulate: 3 does not divide data.batch 8"]),
        (["data.batch=2147483648"], ["config.data.batch", "2147483648", "seq 32", "2**31"]),
        (["steps=10", "tokens=1000"], ["config.tokens: 1000", "steps 10 of 256", "2560"]),
        (["steps=10", "schedule.warmup=2000", "schedule.decay=1000"], ["config.schedule.warmup",
                                                                       "2000", "1000", "2560"]),
        (["steps=10", "schedule.warmup=100"], ["config.schedule.warmup: 100", "256 tokens"]),
        (["schedule.warmup=0.7", "schedule.decay=0.7", "steps=9"], ["config.schedule.warmup"]),
        (["name=a/b"], ["config.name", "'a/b'"]),
        (["name="], ["config.name", "''"]),
        (["seed=-1"], ["config.seed: must be 0 or more, got -1"]),
        (["seed=4294967296"], ["config.seed: must be below 2**32"]),
        (["ema=1"], ["config.ema: must be in [0, 1), got 1.0"]),
        (["plan=singel"], ["config.plan: unknown plan 'singel'; did you mean single?"]),
        (["log.sinks=jsonl,wandbb"], ["config.log.sinks[1]", "'wandbb'; did you mean wandb?"]),
        (["log.every=0"], ["config.log.every: must be positive, got 0"]),
        (["eval.every=-1"], ["config.eval.every: must be 0 or more, got -1"]),
        (["sample.top_p=0"], ["config.sample.top_p: must be in (0, 1], got 0"]),
        (["model.blocks.moe.ffn.top_k=5"], ["config.model.blocks.moe.ffn.top_k: 5", "experts 4"]),
        (["model.pattern=moe,other"], ["config.model.pattern: block 'other'", "(moe)"]),
        (["model.blocks.moe.attention.kind=full", "model.width=30", "model.blocks.moe.attention"
          ".heads=4"], ["config.model.blocks.moe.attention.heads: width 30", "heads 4"]),
        (["model.blocks.moe.attention.rope.factor=2", "model.blocks.moe.attention.rope.original=8"],
         ["config.data.seq: 32 tokens", "the 16 that model.blocks.moe.attention.rope"]),
        (["data.mixture.kind=hedg"], ["config.data.mixture.kind: unknown kind 'hedg'; did you mean "
                                      "hedge?"]),
        (["data.mixture.kind=fixed", "data.mixture.weights=a=0.5,b=0.4"],
         ["config.data.mixture.weights: must sum to 1, 'a=0.5,b=0.4' sums to 0.9"]),
        (["data.mixture.kind=ado", "data.mixture.lag=2"], ["config.data.mixture.lag: must be at "
                                                           "least 4", "got 2"]),
        (["data.mixture.kind=doremi"], ["config.data.mixture.reference: needs the workdir"]),
        (["data.mixture.kind=doge"], ["config.credit.every: 0, but data.mixture.kind doge"]),
        (["credit.every=2", "plan=ddp"], ["config.credit.every: 2 takes", "got plan ddp"]),
        (["credit.every=2", "model.blocks.moe.ffn.copies=1"], ["config.credit.every: 2 with model."
                                                               "blocks.moe.ffn.copies 1"]),
        (["data.mixture.kind=exp3", "data.pack=stream"],
         ["config.data.mixture.kind: 'exp3' needs pack documents, got 'stream'"]),
    ],
)  # fmt: skip
def test_checks_across_fields_name_both_numbers(overrides, parts):
    fails(lambda: build(*overrides), *parts)


def test_steps_follow_from_tokens_or_the_data():
    assert build("steps=7").steps_of(10**6) == 7
    assert build("tokens=1000").steps_of(10**6) == 4  # 3.9 steps of 256: nothing asked is left out
    assert build().steps_of(1000) == 3  # 3.9: there is no data for a fourth
    assert build("steps=4", "tokens=1000").steps_of(0) == 4


def test_what_the_data_says_completes_an_experiment():
    experiment, run = config.complete(build(), vocab=300, train_tokens=2600)
    assert experiment.model.vocab == 300
    assert (run.steps, run.tokens, run.tokens_per_step) == (10, 2560, 256)
    again, _ = config.complete(experiment, vocab=300, train_tokens=2600)
    assert again == experiment
    config.complete(build("steps=99", "data.repeat=true"), vocab=9, train_tokens=2600)
    config.complete(build("steps=99", "data.pack=random_crop"), vocab=9, train_tokens=2600)


@pytest.mark.parametrize(
    ("overrides", "train_tokens", "parts"),
    [
        (["model.vocab=100"], 2600, ["config.model.vocab: 100", "is 300"]),
        (["steps=11"], 2600, ["config.steps: 11 steps of 256 are 2816", "2600", "repeat"]),
        (["tokens=2561"], 2600, ["config.tokens: 11 steps"]),
        ([], 255, ["config.data.batch: one step of 8 x 32 is 256 tokens", "255"]),
        ([], 2**62, ["config.steps", "never ends"]),
        (["schedule.warmup=3000"], 2600, ["config.schedule.warmup: 3000", "2560"]),
    ],
)
def test_data_that_does_not_fit_is_refused(overrides, train_tokens, parts):
    fails(lambda: config.complete(build(*overrides), vocab=300, train_tokens=train_tokens), *parts)


def experiment_file(folder, body):
    path = folder / "mine.py"
    path.write_text(body)
    return str(path)


def test_a_length_on_the_command_line_replaces_the_files(tmp_path):
    body = f"BASE = {BASE | {'tokens': 5120}!r}\ndef get_config(arg=''):\n    return BASE\n"
    where = experiment_file(tmp_path, body)
    assert config.resolve(where).steps_of(0) == 20
    assert config.resolve(where, ["steps=3"]).steps_of(0) == 3
    body = body.replace("'tokens': 5120", "'steps': 20")
    where = experiment_file(tmp_path, body)
    assert config.resolve(where, ["tokens=512"]).steps_of(0) == 2
    fails(lambda: config.resolve(where, ["tokens=512", "steps=9"]), "config.tokens: 512", "steps 9")


def test_a_file_gets_its_argument_and_lends_its_name(tmp_path):
    body = (
        f"def get_config(arg=''):\n    base = {BASE!r}\n    del base['name']\n"
        "    base['seed'] = len(arg)\n    return base\n"
    )
    where = experiment_file(tmp_path, body)
    assert config.resolve(where).name == "mine"
    assert config.resolve(where).seed == 0
    assert config.resolve(f"{where}:a=1:b").seed == 5
    body = f"def get_config():\n    return {BASE!r}\n"
    where = experiment_file(tmp_path, body)
    assert config.resolve(where).name == "base"
    fails(lambda: config.resolve(f"{where}:x"), "mine.py", "takes no argument, got 'x'")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("x = 1\nraise RuntimeError('two\\nlines')\n", ["line 2: RuntimeError: two lines"]),
        ("def get_config(:\n", ["line 1: SyntaxError"]),
        ("import nothing_of_that_name\n", ["line 1: ModuleNotFoundError"]),
        ("", ["has no function get_config(arg)"]),
        ("def get_config(arg):\n    return 3\n", ["expected a section, got int"]),
        ("def get_config(arg):\n    return {}['x']\n", ["line 2: KeyError"]),
        ("def get_config(arg):\n    raise ValueError('arg: no')\n", ["line 2: arg: no"]),
        ("def get_config(arg):\n    return {'nmae': 'x'}\n", ["config.nmae", "config.name?"]),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, body, parts):
    where = experiment_file(tmp_path, body)
    fails(lambda: config.resolve(where), *parts)
    if "nmae" not in body:
        fails(lambda: config.resolve(where), where)


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(lambda: config.resolve("quikstart"), "'quikstart'; did you mean quickstart.py?")
    fails(lambda: config.resolve("nowhere/x.py:a"), "there is no file 'nowhere/x.py'")
    fails(lambda: config.resolve(str(tmp_path)), "is a folder")
