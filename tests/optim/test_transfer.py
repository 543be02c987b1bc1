"""Hyper-parameter transfer: nothing at the base's sizes, the papers' factors off them."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.model import lm, transfer
from sparse_pretrain.optim import adamw, muon
from sparse_pretrain.optim.transfer import Factors
from tests.model.conftest import small

FILE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "coordinate_check.py"
AT_BASE = transfer.Config(base_width=32, base_depth=5, base_tokens=1e6, base_active=0.25)


def _wide(**changes):
    """Twice as wide and twice as deep as `small`, heads and hidden grown alike."""
    base = small()
    blocks = {}
    for name, section in base.blocks.items():
        attention = section.attention
        sizes = {"heads": 2 * attention.heads}
        if attention.KIND == "full":
            sizes |= {"kv_heads": 2 * attention.kv_heads, "head_dim": 8}
        feed = dataclasses.replace(section.ffn, hidden=2 * section.ffn.hidden)
        blocks[name] = dataclasses.replace(
            section, attention=dataclasses.replace(attention, **sizes), ffn=feed
        )
    depth = {"prefix": ("dense", "dense"), "repeats": 4}
    return dataclasses.replace(base, width=64, blocks=blocks, **(depth | changes))


def _leaves(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("rule", [adamw.Config(), muon.Config(), muon.Config(rms=0.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_factor_is_exactly_one_at_the_base(rule, tied):
    config = small(transfer=AT_BASE, tied=tied)
    found = optim.factors(rule, config, lm.define(config), 1e6)
    assert found is not None
    assert set(_leaves(found.rate).values()) == set(_leaves(found.decay).values()) == {1.0}
    rules = lm.transfer_rules(config)
    dims = jax.tree.leaves(lm.define(config).dims, is_leaf=lambda d: isinstance(d, tuple))
    assert {rules.start(d) for d in dims} == {rules.head_gain} == {1.0}
    off = small(tied=tied)
    assert optim.factors(rule, off, lm.define(off), 1e6) is None


def test_adams_factors_off_the_base_are_the_tables():
    """Table 8 of 2203.03466, its last column; table 1 of 2505.01618 with alpha 1."""
    config = _wide(transfer=transfer.Config(base_width=32, base_depth=5))
    found = optim.factors(adamw.Config(), config, lm.define(config))
    rate, decay = _leaves(found.rate), _leaves(found.decay)
    deep, want = 10 / 5, {}
    mla, mixed = "['stack_0']['attention']", "['stack_1']"
    for name in ("['embedding']", "['norm']['scale']", mla + "['q_norm']['scale']"):
        want[name] = 1.0
    for name in ("['head']", mla + "['w_dq']", mla + "['w_dkv']", mixed + "['ffn']['w_gate']"):
        want[name] = 1 / 2
    want[mixed + "['ffn']['router']['w']"] = want[mixed + "['attention']['w_k']"] = 1 / 2
    for name in ("['w_uq']", "['w_uk']", "['w_uv']"):  # they read latents of a fixed width
        want[mla + name] = 1.0
    for name in (mla + "['w_o']", mixed + "['ffn']['w_down']", mixed + "['attention']['w_o']"):
        want[name] = 1 / 2 / deep
    for name, value in want.items():
        assert rate[name] == pytest.approx(value), name
        assert decay[name] * rate[name] == pytest.approx(1.0), name


def test_muons_factors_keep_the_spectral_condition():
    """Updates' spectral norms go as sqrt(fan-out / fan-in), whatever the rule scales them by."""
    config = _wide(transfer=transfer.Config(base_width=32))
    for rule in (muon.Config(), muon.Config(rms=0.0)):
        found = optim.factors(rule, config, lm.define(config))
        for path, rows, cols, rows0, cols0 in (
            (("stack_0", "attention", "w_uq"), 24, 4 * 12, 24, 2 * 12),
            (("stack_0", "attention", "w_dkv"), 64, 20, 32, 20),
            (("stack_0", "attention", "w_o"), 4 * 12, 64, 2 * 12, 32),
            (("stack_1", "ffn", "w_gate"), 64, 48, 32, 24),
            (("stack_1", "ffn", "w_down"), 48, 64, 24, 32),
        ):
            rate = found.rate
            for key in path:
                rate = rate[key]
            norm = rate * muon.scale(rows, cols, rule.rms)
            norm0 = muon.scale(rows0, cols0, rule.rms)
            assert norm / norm0 == pytest.approx(np.sqrt(cols / rows * rows0 / cols0)), path


def test_tokens_and_experts():
    given = transfer.Config(base_tokens=1e6, base_active=0.5)
    config = small(transfer=given)
    found = optim.factors(adamw.Config(), config, lm.define(config), 16e6)
    rate = _leaves(found.rate)
    assert rate["['head']"] == pytest.approx(16**-0.32)
    expert = rate["['stack_0']['ffn']['w_up']"]  # 2 of 8 experts against one of two
    assert expert == pytest.approx(16**-0.32 * np.sqrt(0.25 / 0.5))
    assert rate["['stack_0']['ffn']['shared']['w_up']"] == rate["['head']"]
    assert rate["['stack_0']['ffn']['router']['w']"] == rate["['head']"]
    assert set(_leaves(found.decay).values()) == {1.0}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_how_parameters_start(tied):
    """Deviations of a wide model: hidden as fan-in^-0.5, layers' ends as 1 / depth, head as 1."""
    config = _wide(transfer=transfer.Config(base_width=32, base_depth=5), tied=tied)
    params = jax.jit(lm.define(config).init)(jax.random.key(0))[0]
    plain = lm.define(dataclasses.replace(config, transfer=transfer.Config()))
    before = _leaves(jax.jit(plain.init)(jax.random.key(0))[0])
    after = {k: v for k, v in _leaves(params).items() if v.ndim > 1 and "scale" not in k}
    ratio = {k: float(np.asarray(v).std() / np.asarray(before[k]).std()) for k, v in after.items()}
    want = {"['stack_0']['ffn']['router']['w']": 2**-0.5, "['embedding']": 2**0.5 if tied else 1.0}
    for name, found in ratio.items():
        end = name.endswith(("['w_o']", "['w_down']"))
        assert found == pytest.approx(want.get(name, 2**-0.5 if end or "router" in name else 1.0))
    gain = lm.transfer_rules(config).head_gain
    assert gain == (0.5 if tied else 1.0)


def test_the_update_takes_the_factors():
    """One step of each rule: the factor times the update, and a decay that stays rate x decay."""
    dims = {"a": ("D", "F"), "b": ("D",)}
    params = {"a": jnp.full((4, 4), 2.0), "b": jnp.ones(4)}
    grads = {"a": jnp.zeros((4, 4)), "b": jnp.ones(4)}
    factors = Factors({"a": 0.25, "b": 1.0}, {"a": 4.0, "b": 1.0})
    config = adamw.Config(weight_decay=0.5, clip=0.0)
    for given, decay in ((None, 0.5), (factors, 0.5)):
        rule = adamw.build(config, dims, lambda n: jnp.float32(0.1), given)
        update, _ = rule.update(grads, rule.init(params), params)
        np.testing.assert_allclose(update["a"], -0.1 * decay * 2.0, rtol=1e-6)
        np.testing.assert_allclose(update["b"], -0.1, rtol=1e-5)
    moving = adamw.build(adamw.Config(weight_decay=0.0), dims, lambda n: jnp.float32(0.1), factors)
    update, _ = moving.update({"a": jnp.ones((4, 4)), "b": grads["b"]}, moving.init(params), params)
    np.testing.assert_allclose(update["a"], -0.025, rtol=1e-5)


@pytest.fixture(scope="module")
def check():
    """The benchmark, which imports a neighbour of its own."""
    sys.path.insert(0, str(FILE.parent))
    spec = importlib.util.spec_from_file_location("coordinate_check", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FILE.parent))


@pytest.mark.slow
def test_sizes_do_not_follow_the_width(check):
    """Two widths and few steps; the benchmark has four widths and more."""
    largest = {}
    for arm in ("on", "off"):
        found = {w: check.sizes(w, arm, lr=0.02, steps=4, seeds=1) for w in (64, 256)}
        largest[arm] = np.abs(check.slopes(found)[-1]).max()
    assert largest["on"] < 0.2 < 0.5 < largest["off"]


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"^base_width: must not be negative, got -1"):
        transfer.Config(base_width=-1)
    with pytest.raises(ValueError, match=r"^base_active: must be 0 to 1, got 2"):
        transfer.Config(base_active=2.0)
    with pytest.raises(ValueError, match=r"^grows: must hold 'D'"):
        transfer.Config(grows=("F",))
