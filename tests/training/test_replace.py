"""Training with experts re-placed every few steps equals training without, to rounding."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from sparse_pretrain import checkpoint, config
from sparse_pretrain.training import loop, replace, run, state
from sparse_pretrain.training import step as steps

STEPS = 10


def experiment(folder, copies, optimizer, experts=6, batch=4, **changes):
    attention = {"kind": "full", "heads": 2}
    router = {"kind": "sigmoid_bias", "rate": 0.02}
    moe = {"kind": "moe", "experts": experts, "top_k": 2, "hidden": 16, "router": router}
    block = {"attention": attention, "ffn": moe | {"copies": copies}}
    source = f"text_folder:{folder}"
    values = {
        "name": "tiny",
        "steps": STEPS,
        "data": {"source": source, "tokenizer": "bytes", "seq": 32, "batch": batch},
        "model": {
            "width": 32,
            "blocks": {"moe": block},
            "prefix": ["moe"],
            "pattern": ["moe"],
            "repeats": 1,
            "dtype": "float32",
        },
        # clipping low enough to be at work; bfloat16 in Muon would turn rounding into differences
        "optim": {"kind": optimizer, "lr": 0.01, "clip": 0.3}
        | ({"ns_dtype": "float32"} if optimizer == "muon" else {}),
        "ema": 0.9,
        "accumulate": 2,
        "sample": {"tokens": 0},
        "eval": {"tokens": 256},
    }
    return config.from_config_dict(values | changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(12):
        words = ["".join(rng.choice(list("abcd"), 3)) for _ in range(300)]
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def trained(wanted):
    """(losses and norms, final state, the maps after every step)."""
    p = run.prepare(wanted)
    e = p.experiment
    mover = replace.Replacer(run.placing(e, p.placed), p.definition, p.placed)
    game = replace.start(e.model) if e.placement.every else {}
    now = state.create(p.definition, p.tx, 0, ema=True, game=game, placed=p.placed)
    step = steps.make_train_step(
        p.definition, e.model, p.tx, schedule=p.schedule, accumulate=e.accumulate, ema=e.ema,
        placed=p.placed,
    )  # fmt: skip
    seen, held, batches = [], [], p.dataset.train()
    for n in range(1, STEPS + 1):
        now, out = step(now, p.put(next(batches)))
        seen.append((float(out["loss"]), float(out["grad_norm"])))
        if e.placement.every and n % e.placement.every == 0:
            now = mover(now)
        held.append(jax.device_get(replace.maps(now.router)))
    if p.placed is None:  # moving experts compiles nothing
        assert step._cache_size() == 1
        assert not e.placement.every or mover._compiled._cache_size() == 1
    return np.array(seen), now, held


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_the_same_losses_and_the_same_weights(optimizer, text):
    alone = trained(experiment(text, 0, optimizer))
    moving = {"every": 3, "devices": 2}
    equal(alone, trained(experiment(text, 4, optimizer, placement=moving)))


PLANS = {
    "fsdp_ep": "fsdp=2,expert=4",
    "zero1_ep": "data=2,expert=4",
    "fsdp_ep_tp": "fsdp=2,expert=2,tensor=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_experts_move_between_devices(plan, text):
    """Under a plan, where every slot lies on one device and its expert's copies on others."""
    sizes = dict(optimizer="adamw", experts=8, batch=8, accumulate=1)
    where = dict(placement={"every": 3}, plan=plan, mesh=PLANS[plan])
    equal(trained(experiment(text, 0, **sizes)), trained(experiment(text, 4, **sizes, **where)))


def test_devices_other_than_the_plans_are_refused(text):
    asked = {"plan": "fsdp_ep", "mesh": "fsdp=2,expert=4", "accumulate": 1}
    wanted = experiment(text, 6, "adamw", placement={"every": 3, "devices": 2}, **asked)
    says = r"config.placement.devices: 2, and plan fsdp_ep deals experts over 4; 0 or 4 fits"
    with pytest.raises(ValueError, match=says):
        run.placing(wanted, run.place(wanted))


def equal(alone, moving):
    """The run whose experts moved is the one of which none had a copy."""
    (plain, alone, _), (placed, state_now, held) = alone, moving
    np.testing.assert_allclose(placed, plain, rtol=2e-4)
    for group, last in held[-1].items():
        assert (held[0][group] != last).any(), "no expert was moved"
        for tree, other in (
            (state_now.params, alone.params),
            (state_now.ema, alone.ema),
        ):
            for name in replace.EXPERTS:
                got, want = (np.asarray(t[group]["ffn"][name]) for t in (tree, other))
                slots = np.atleast_2d(last)
                got = got.reshape(len(slots), slots.shape[1], -1)
                want = want.reshape(len(slots), slots.max() + 1, -1)
                for n, row in enumerate(slots):
                    np.testing.assert_allclose(got[n], want[n][row], rtol=5e-3, atol=5e-4)
    _copies_agree(state_now.opt, held[-1])
    _copies_agree(state_now.params, held[-1])


def _copies_agree(tree, held):
    """Every array of an expert is the same in all slots that hold it; at least one is looked at."""
    looked = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group, name = replace._place(path)
        if group not in held or name not in replace.EXPERTS:
            continue
        slots = np.atleast_2d(held[group])
        leaf = np.asarray(leaf).reshape(len(slots), slots.shape[1], -1)
        for n, row in enumerate(slots):
            first = [list(row).index(e) for e in row]
            np.testing.assert_allclose(leaf[n], leaf[n][first], rtol=1e-5, atol=1e-7)
        looked += 1
    assert looked >= 3


@pytest.mark.slow
def test_a_resumed_run_moves_the_same_experts(text, tmp_path):
    wanted = experiment(
        text, 4, "muon", placement={"every": 3, "devices": 2}, checkpoint={"every": 4, "keep": 9}
    )
    loop.train(wanted, tmp_path / "whole", [], quiet=True)
    short = dataclasses.replace(wanted, schedule=wanted.schedule)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    # drop all after step 4 and go on from there
    for late in (8, 10):
        path = checkpoint.folder(tmp_path / "parts") / f"{late:08d}"
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    (tmp_path / "parts" / "summary.json").unlink()
    loop.train(short, tmp_path / "parts", [], quiet=True)
    losses = [
        [r["loss"] for r in loop.metrics.read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_moving_without_copies_is_refused(text):
    with pytest.raises(ValueError, match=r"placement\.every: 3 moves copies .* ffn\.copies"):
        experiment(text, 0, "muon", placement={"every": 3})
    with pytest.raises(ValueError, match=r"placement: num_gpus: 10 does not divide by 4"):
        experiment(text, 4, "muon", placement={"every": 3, "devices": 4})
