"""Credit in a run: gradients dotted one by one, leave-one-out of a step, resume, what is left."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sparse_pretrain import checkpoint, config
from sparse_pretrain.games import mixtures, shapley
from sparse_pretrain.model import lm
from sparse_pretrain.report import write_report
from sparse_pretrain.training import credit, loop, loss
from tests.model.conftest import DENSE, EXPERTS, drawn, packed, small

EVERY, STEPS = 2, 6


FFN = {"dense": DENSE, "experts": dataclasses.replace(EXPERTS, experts=4, hidden=8)}


# experts compile for 10 s; their sums are held by hand in tests/games/test_shapley.py
@pytest.mark.parametrize("ffn", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_credits_are_gradients_dotted_and_what_leaving_a_row_out_costs(ffn, rng):
    """One layer, float32."""
    c = small(prefix=(), pattern=("mixed",), repeats=1)
    block = dataclasses.replace(c.blocks["mixed"], ffn=FFN[ffn])
    definition = lm.define(dataclasses.replace(c, blocks={"mixed": block}))
    params, prices = (drawn(x, 0.1) for x in (definition.shapes, definition.price_shapes))
    batch, target = packed(rng, rows=3, length=8), packed(rng, rows=3, length=8)
    names = np.array([0, 1, 1])[:, None] * np.ones((1, 8), np.int32)
    batch = batch._replace(domains=names.astype(np.int32))
    section = shapley.Config(every=1, experts=ffn == "experts")
    rate = 1.0
    got = credit.Creditor(definition, section)(
        params, prices, batch, [target], ("prose", "code"), rate
    )

    @jax.jit
    @jax.value_and_grad
    def nats(params, batch):
        m = definition.merge(params, prices)
        return loss.token_losses(m, m(batch)[0], batch)[0]

    def alone(row):
        """The batch with the weights of this row only."""
        kept = np.zeros_like(batch.weights)
        kept[row] = batch.weights[row]
        return batch._replace(weights=kept)

    def flat(tree):
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])

    ahead, weight = nats(params, target)[1], float(batch.weights.sum())
    of_rows = [jax.device_get(nats(params, alone(row))[1]) for row in range(3)]
    share = rate / weight / float(target.weights.sum())
    wanted = np.array([share * flat(ahead) @ flat(g) for g in of_rows])
    assert np.abs(wanted[:2]).min() > 1e-3
    np.testing.assert_allclose(got["credit_rows"][0], wanted, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(got["credit"]["prose"], wanted[0], rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(got["credit"]["code"], wanted[1:].sum(), rtol=2e-4, atol=1e-7)
    assert got["credit_tokens"] == {
        "prose": int(batch.weights[0].sum()), "code": int(batch.weights[1:].sum())
    }
    assert ("credit_experts" in got) == section.experts
    if section.experts:  # the same over their own weights alone
        tree = jax.tree.map(
            lambda a, *b: sum(np.float64(x) for x in b) * np.float64(a), ahead, *of_rows
        )
        own = [v for k, v in _named(tree["stack_0"]) if _dims(definition, k)[:2] == ("N", "E")]
        assert len(own) == 3
        by_hand = share * sum(v.reshape(1, 4, -1).sum(-1) for v in own)
        np.testing.assert_allclose(got["credit_experts"], by_hand, rtol=2e-3, atol=1e-7)
    # leave-one-out: a tiny step with all rows, and without one; the second difference is left
    tiny, host = 0.05, jax.device_get(params)

    def after(rows):
        moved = jax.tree.map(
            lambda p, *g: p - np.float32(tiny / weight) * sum(g), host, *[of_rows[r] for r in rows]
        )
        return float(nats(moved, target)[0]) / float(target.weights.sum())

    for row in range(3):
        others = [r for r in range(3) if r != row]
        cost = after(others) - after([0, 1, 2])
        assert cost == pytest.approx(wanted[row] / rate * tiny, rel=0.1, abs=1e-5)


def _named(tree, path=()):
    for k, v in tree.items():
        if isinstance(v, dict):
            yield from _named(v, (*path, k))
        else:
            yield (*path, k), v


def _dims(definition, path):
    found = definition.dims["stack_0"]
    for key in path:
        found = found[key]
    return found


def test_a_row_of_several_domains_is_its_own(rng):
    weights = np.ones((3, 4), np.float32)
    names = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], np.int32)
    weights[1, 2:] = 0  # what of it counts is of one
    owner, called = credit._owners(weights, names, ("a", "b"))
    assert [called[k] for k in owner] == ["b", "a", "a"]
    owner, called = credit._owners(np.ones((3, 4)), names, ("a", "b"))
    assert [called[k] for k in owner] == ["b", "(several)", "a"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two domains; the target is text like one of them."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for domain, letters in (("near", "abab "), ("far", "vwxyz")):
        (folder / domain).mkdir()
        for i in range(8):
            (folder / domain / f"{i}.txt").write_text("".join(rng.choice(list(letters), 3000)))
    aim = folder.parent / "aim.txt"
    aim.write_text("".join(rng.choice(list("abab "), 2000)))
    return folder, aim


def experiment(text, **changes):
    """A dense model of a few thousand parameters, its rows drawn evenly by domain."""
    folder, aim = text
    dense = {"attention": {"kind": "full", "heads": 2}, "ffn": {"kind": "dense", "hidden": 16}}
    values = {
        "name": "credited", "steps": STEPS,
        "data": {"source": f"text_folder:{folder}", "tokenizer": "bytes", "seq": 32, "batch": 8,
                 "mixture": {"kind": "fixed"}},
        "model": {"width": 16, "blocks": {"dense": dense}, "pattern": ["dense"], "repeats": 1},
        "optim": {"kind": "adamw", "lr": 0.01}, "checkpoint": {"every": 3, "keep": 9},
        "eval": {"tokens": 256}, "sample": {"tokens": 0},
        "credit": {"every": EVERY, "tokens": 512, "text": str(aim)},
    }  # fmt: skip
    return config.from_config_dict(values | changes)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_says_which_domain_helps_and_resumes_to_the_bit(text, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    summary = loop.train(experiment(text), whole, [], quiet=True)
    told = rows(whole)
    assert [r["step"] for r in told if "credit" in r] == [2, 4, 6]
    first = told[1]
    assert set(first["credit"]) == set(first["credit_tokens"]) == {"near", "far"}
    per_token = {k: first["credit"][k] / first["credit_tokens"][k] for k in first["credit"]}
    assert per_token["near"] > per_token["far"]
    np.testing.assert_allclose(sum(first["credit_rows"][0]), sum(first["credit"].values()))
    found = summary["credit"]
    assert found["near"]["tokens"] == sum(r["credit_tokens"]["near"] for r in told if "credit" in r)
    page = write_report(whole).read_text()
    assert 'id="credit"' in page
    # from the checkpoint at step 3
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoint.folder(again) / f"{STEPS:08d}")
    (again / "summary.json").unlink()
    loop.train(experiment(text), again, [], quiet=True)
    keys = ("step", "loss", "credit", "credit_tokens", "credit_rows")
    ours, theirs = ([[row.get(k) for k in keys] for row in rows(w)] for w in (again, whole))
    assert ours == theirs


@pytest.mark.slow
def test_a_mixture_goes_where_credit_is(text, tmp_path):
    game = {"kind": "doge", "rate": 1.0, "lag": 4}
    wanted = experiment(text, steps=10)
    section = dataclasses.replace(wanted.data, mixture=mixtures.DogeConfig(rate=1.0, lag=4))
    wanted = dataclasses.replace(wanted, data=section)
    assert wanted.to_dict()["data"]["mixture"] == mixtures.DogeConfig().to_dict() | game
    loop.train(wanted, tmp_path, [], quiet=True)
    told = rows(tmp_path)
    drawn = [row["mixture"]["near"] for row in told]
    assert drawn[:5] == [0.5] * 5  # the first credit, of step 2, is in force 4 steps later
    assert drawn[5] > 0.6
    assert drawn[6] == drawn[5]


def test_a_target_that_cannot_be_read_is_named(text):
    section = shapley.Config(every=EVERY, text="nowhere.txt")
    with pytest.raises(ValueError, match=r"config.credit.text: cannot read nowhere.txt: No such"):
        credit.targets(section, None)
