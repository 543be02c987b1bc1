"""The worked example of CONTRIBUTING.md keeps every law, and its commands resolve."""

import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from sparse_pretrain import attention, cli, config, shapes
from sparse_pretrain.model import lm
from tests.architecture import house
from tests.attention import test_every_attention as laws

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATH = "sparse_pretrain/attention/local.py"
CODE = re.search(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1]
LAWS = {name: law for name, law in vars(laws).items() if name.startswith("test_")}


@pytest.fixture
def local(monkeypatch):
    """The example as a module of the package, with its row in the table."""
    name = PATH.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(CODE, PATH, "exec"), module.__dict__)
    row = re.search(r'`"(\w+)": (\w+),`', TEXT)
    monkeypatch.setitem(attention.TABLE, row[1], getattr(module, row[2]))
    return row[1]


@pytest.mark.parametrize("law", LAWS)
def test_it_keeps(law, local, rng, monkeypatch):
    given = {"kind": local, "changes": {"window": 5}, "dtype": "float64"}
    given |= {"rng": rng, "monkeypatch": monkeypatch}
    wanted = inspect.signature(LAWS[law]).parameters
    LAWS[law](**{name: given[name] for name in wanted})


def test_a_window_broken_in_the_forward_pass_is_found(local, rng, monkeypatch):
    """As the text says: the first law fails."""
    variant = attention.TABLE[local]
    stated = variant.mask
    wider = staticmethod(lambda c, context: stated(variant.Config(window=c.window + 1), context))
    monkeypatch.setattr(variant, "mask", wider)
    with pytest.raises(AssertionError):
        laws.test_it_equals_dense_attention_under_its_own_mask(
            local, {"window": 5}, "float64", rng, monkeypatch
        )


def test_its_file_keeps_the_rules(tmp_path):
    for module in house.modules(ROOT):
        copy = tmp_path / module.path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(module.path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / PATH).write_text(CODE)
    with open(tmp_path / "sparse_pretrain/attention/__init__.py", "a") as table:
        table.write("from sparse_pretrain.attention.local import Local\n")
    broken = [line for rule in house.RULES.values() for line in rule(tmp_path)]
    assert [line for line in broken if "local" in line] == []
    assert max(map(len, CODE.splitlines())) <= 100


def test_the_files_that_it_names_are_there():
    tops = "sparse_pretrain|kernels_pallas|experiments|tests"
    named = set(re.findall(rf"`((?:{tops})/[\w/.]+)`", TEXT))
    assert len(named) > 10
    assert {path for path in named if not (ROOT / path).exists()} == {PATH}


def test_its_commands_resolve_and_the_model_builds(local):
    commands = [shlex.split(x) for x in TEXT.splitlines() if x.startswith("sparse-pretrain ")]
    changed = [argv for argv in commands if any(a.startswith("--config.") for a in argv)]
    assert len(changed) == 2
    for argv in changed:
        assert argv[1] in cli.COMMANDS
        _, overrides = cli.split_overrides(argv[2:])
        model = config.resolve("", overrides).model
        kinds = {name: block.attention.KIND for name, block in model.blocks.items()}
        assert local in kinds.values()
    small = ["model.width=32", "model.vocab=50", "model.repeats=1"]
    model = config.resolve("", [*overrides, *small]).model
    definition = lm.define(model)
    params, prices = definition.init(jax.random.key(0))
    assert lm.work_per_token(model, 16).core > 0
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    ones, zeros = np.ones_like(tokens), np.zeros_like(tokens)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    weights = ones.astype(np.float32)
    batch = shapes.Batch(tokens, tokens, ones, positions, weights, ones, zeros)
    hidden, _ = jax.jit(lambda p, q, b: definition.merge(p, q)(b))(params, prices, batch)
    assert np.isfinite(np.asarray(hidden, np.float32)).all()

