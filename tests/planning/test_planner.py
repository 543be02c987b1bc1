"""The planner: closed forms for FLOPs, bytes and seconds, and requests that cannot be met."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from sparse_pretrain import cli, config
from sparse_pretrain.model import lm
from sparse_pretrain.planning import (
    chips,
    cost,
    flops,
    forecast,
    layout,
    network,
    planner,
    summary,
    work,
)
from sparse_pretrain.scaling import forecast as loss_of
from sparse_pretrain.scaling import planted
from sparse_pretrain.scaling.fit import fitting
from sparse_pretrain.sharding import plans

DENSE = "llama:512x8"


@pytest.fixture(scope="module")
def dense():
    experiment = config.resolve(DENSE)
    model = dataclasses.replace(experiment.model, vocab=1024)
    return dataclasses.replace(experiment, model=model)


def planned(capsys, *args):
    code = cli.main(["plan", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


# --- a token's work


@pytest.mark.parametrize("name", ["deepseek/v3", "olmoe_1b_7b", DENSE])
def test_flops_by_class_add_up_to_those_of_the_model(name):
    model = dataclasses.replace(config.resolve(name).model, vocab=4096)
    found = work.of(model, lm.define(model), 4096)
    whole = flops.train_flops_per_token(model, 4096).model
    # the core is counted with its scores rebuilt: 3.5 products where the model's FLOPs have 3
    assert found.flops - found.core / 7 == pytest.approx(whole, rel=1e-9)


def test_a_dense_model_by_hand(dense):
    """Six FLOPs a weight; numbers in and out of each product of a layer."""
    model = dense.model
    width, hidden, layers = 512, model.blocks["block"].ffn.hidden, 8
    found = work.of(model, lm.define(model), 128)
    assert found.linear == 6 * layers * (4 * width**2 + 3 * width * hidden)
    assert found.head == 6 * width * 1024
    assert found.elements == 3 * layers * (4 * 2 * width + 3 * (width + hidden))
    assert work.again(model, 128, "none").flops == 0
    assert work.again(model, 128, "full").linear == found.linear / 3


def test_seconds_are_the_roofline(dense):
    found = work.of(dense.model, lm.define(dense.model), 128)
    chip, c = chips.CHIPS["h100"], cost.ACCELERATOR
    products, core, traffic = cost.computing(found, chip)
    assert products == pytest.approx((found.linear + found.head) / 989e12 / c.products)
    assert core == pytest.approx(found.core / 989e12 / c.core)
    assert traffic == pytest.approx(2 * c.traffic * found.elements / 3.35e12)
    fast = cost.computing(found, chip, "fp8")
    assert fast[0] < products
    assert fast[1] == core


# --- bytes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("fsdp", {"data": 2, "fsdp": 4}),
        ("fsdp_ep", {"fsdp": 2, "expert": 4}),
        ("zero1", {"data": 8}),
        ("fsdp_tp", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_state_bytes_are_those_of_the_shards(name, sizes):
    """JAX's own shard shapes on eight devices."""
    experiment = config.resolve("olmoe_1b_7b:tiny")
    model = dataclasses.replace(experiment.model, vocab=512)
    definition, plan = lm.define(model), plans.find(name)
    what = layout.state(definition, experiment.optim, ema=False)
    laid = Mesh(np.array(jax.devices()[:8]).reshape(tuple(sizes.values())), tuple(sizes))
    held = {}
    for use in ("stored", "optimizer"):
        held[use] = sum(
            4 * math.prod(NamedSharding(laid, plans.parameter(plan, sizes, d, s, use=use))
                          .shard_shape(s))
            for d, s in what.leaves
        )  # fmt: skip
    got = layout.held_bytes(what, plan, sizes, 1)
    assert got["parameters"] == held["stored"]
    assert got["gradients"] == 2 * held["stored"]
    # two moments and Adam's count of steps
    assert got["optimizer"] == pytest.approx(2 * held["optimizer"], rel=1e-5)


def test_bytes_sent_by_hand(dense):
    definition = lm.define(dense.model)
    leaves = work.weights(definition)
    matrices = sum(math.prod(s) for d, s in leaves if len([x for x in d if x != "N"]) > 1)
    vectors = sum(math.prod(s) for _, s in leaves) - matrices
    table = 1024 * 512  # is looked up where it lies
    load = network.Load(tokens=256.0, micro=3, passes=2)
    (gathered, summed) = network.messages(
        dense.model, definition, plans.find("fsdp"), {"fsdp": 8}, load
    )
    # weights in bfloat16 in both passes, the head in one; gradients in float32
    sent = (matrices - table) * (2 * 2 + 4) - 2 * 512 * 1024
    assert gathered.size == pytest.approx(sent * 7 / 8 * 3)
    wide = dataclasses.replace(dense.model, dtype="float32")
    (more, _) = network.messages(wide, definition, plans.find("fsdp"), {"fsdp": 8}, load)
    sent = (matrices - table) * (2 * 4 + 4) - 4 * 512 * 1024
    assert more.size == pytest.approx(sent * 7 / 8 * 3)
    assert (summed.what, summed.size) == ("gradients", 8 * vectors)
    (once,) = network.messages(dense.model, definition, plans.find("ddp"), {"data": 8}, load)
    assert once.size == 8 * (matrices + vectors)
    one_node = network.seconds(once, chips.CHIPS["h100"], {"data": 8})
    assert one_node == pytest.approx(once.size / 450e9)
    far = network.seconds(once, chips.CHIPS["h100"], {"data": 16})
    assert far == pytest.approx(once.size / 450e9 + once.size * 8 / 15 / 8 / 50e9)


def test_keys_are_gathered_or_go_round(dense):
    """In all three passes of remat=full; gradients in bfloat16 at once, or in float32 by parts."""
    definition, tokens = lm.define(dense.model), 8192

    def received(devices, context):
        load = network.Load(tokens, 1, 3, length=4096 * devices, context=context)
        found = network.messages(
            dense.model, definition, plans.find("fsdp_cp"), {"context": devices}, load
        )
        return next(m.size for m in found if m.what == "keys and values")

    numbers = 8 * tokens * 2 * 512
    assert received(4, "gather") == received(4, "auto") == 3 * 6 * numbers
    # and in zig-zag, with as many queries and o, to their chunks' places, all but a part's
    assert received(4, "ring") == (3 * 10 + 2 * 6 * 3 / 4) * numbers
    assert received(8, "ring") == received(8, "auto") == (7 * 10 + 2 * 6 * 7 / 8) * numbers
    held = [
        layout.working_bytes(
            layout.shapes(dense.model, definition), dense.model, sizes={"context": n},
            load=network.Load(tokens, 1, 3, length=4096 * n, context=how),
        )
        for how in ("gather", "ring") for n in (4, 8)
    ]  # fmt: skip
    assert held[1] - held[0] == pytest.approx(4 * layout.KEYS * tokens * 2 * 512)
    assert held[2] == held[3] < held[1]


def test_tokens_cross_once_to_each_group_they_may_use():
    sent = {}
    for name in ("deepseek/v3", "olmoe_1b_7b"):
        model = config.resolve(name).model
        found = network.messages(
            model, lm.define(model), plans.find("fsdp_ep"), {"fsdp": 2, "expert": 8},
            network.Load(1.0, 1, 2),
        )  # fmt: skip
        sent[name] = next(m.size for m in found if m.what == "tokens")
    assert sent["deepseek/v3"] == 2 * 4 * 7168 * 58 * 4 * 7 / 8  # 4 of 8 groups, not 8 experts
    assert sent["olmoe_1b_7b"] == 2 * 4 * 2048 * 16 * 8 * 7 / 8


def test_what_the_host_keeps_is_not_on_the_chip_and_takes_time(dense):
    """But where the state, come back to be updated, is more than activations were."""
    plan, sizes, fleet = plans.find("fsdp"), {"data": 1, "fsdp": 8}, chips.parse("h100:8")
    host = dataclasses.replace(dense, offload="optimizer")
    moments = 2 * 4 * sum(
        math.prod(s) / network.cuts(plan, sizes, d, s, "stored")
        for d, s in work.weights(lm.define(dense.model))
    )  # fmt: skip
    for rows, length, falls in ((4096, 512, True), (8, 32, False)):
        pair = []
        for experiment in (dense, host):
            data = dataclasses.replace(experiment.data, batch=rows, seq=length)
            asked = dataclasses.replace(experiment, data=data)
            made = planner.Planner(planner.Problem(asked, fleet))
            pair.append(made.evaluate(plan, sizes, 1, "full"))
        there, here = pair
        assert (there.host, here.host) == (0.0, pytest.approx(moments, rel=1e-5))
        room = there.memory["activations"] + there.memory["buffers"]
        expected = moments if falls else room
        assert there.memory_per_chip - here.memory_per_chip == pytest.approx(expected, rel=1e-5)
        slower = here.step.optimizer - there.step.optimizer
        assert slower == pytest.approx(2 * moments / cost.HOST, rel=1e-5)
    made = planner.Planner(planner.Problem(dense, fleet))
    kept, moved = (made.evaluate(plan, sizes, 1, r) for r in ("dots", "offload"))
    assert moved.memory["activations"] + moved.host == pytest.approx(kept.memory["activations"])


# --- plans


def test_every_candidate_uses_all_chips_and_divides(dense):
    made = planner.Planner(planner.Problem(dense, chips.parse("a100:8")))
    found = made.candidates()
    assert {"fsdp", "ddp", "fsdp_tp"} <= {c.plan for c in found}
    for c in found:
        assert math.prod(c.sizes.values()) == 8
        groups = math.prod(c.sizes.get(a, 1) for a in plans.find(c.plan).batch)
        assert c.rows == int(c.rows) == dense.data.batch / groups / c.micro
    fitting = [(float(f"{c.step.total:.4g}"), c.micro) for c in found if made.fits(c)]
    assert fitting == sorted(fitting)


def test_v3_costs_what_it_did(capsys):
    """Within 15 % of 2.664M H800 hours (2412.19437, table 1), on a plan that fits."""
    code, out, _ = planned(
        capsys, "--config=deepseek/v3", "--chips=h800:2048", "--tokens=14.8e12", "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert told["chip_hours"] == pytest.approx(2.664e6, rel=0.15)
    assert told["chip_hours_low"] < 2.664e6 < told["chip_hours_high"]
    assert told["dollars"] == pytest.approx(2 * told["chip_hours"])
    assert told["days"] == pytest.approx(told["chip_hours"] / 2048 / 24)
    assert told["memory_per_chip_bytes"] == pytest.approx(sum(told["memory_bytes"].values()), 1e-6)
    assert told["memory_per_chip_bytes"] < 80e9
    assert told["bound_by"]
    assert told["total_params"] > 671e9


@pytest.mark.parametrize(
    ("hours", "says"),
    [
        (2.0**-12, "takes 0.879 seconds: 0.000244 chip-hours (0.000183 to 0.000326 for"),
        (20.0, "takes 20 hours: 20 chip-hours (15 to 26.7 for"),
        (240_000.0, "takes 1e+04 days: 240,000 chip-hours (179,641 to 320,640 for"),
    ],
)
def test_a_small_run_does_not_cost_nothing(hours, says):
    told = {
        "plan": "single", "mesh": "", "config": "", "accumulate": 1, "remat": "none",
        "pipeline": None, "chip_hours": hours, "chip_hours_low": hours / 1.336,
        "chip_hours_high": hours * 1.336, "days": hours / 24, "dollars": 2 * hours, "price": 2.0,
        "energy_kwh": hours, "step_seconds": 1.0, "bound_by": "products", "seconds": {},
        "memory_per_chip_bytes": 1e9, "memory_bytes": {}, "host_bytes_per_chip": 0,
        "communication": [], "ranked": [],
    }  # fmt: skip
    line = summary.sentences(told)[0]
    assert says in line
    assert "$0 " not in line
    assert " 0 " not in line


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--chips=h900:8"], ["unknown chip 'h900'", "did you mean h800?"]),
        (["--chips=h100:zero"], ["'zero' is no number of chips"]),
        (["--chips=h100:2x4"], ["has no grid 2x4; give 8"]),
        (["--chips=h100:7"], ["no plan deals 16 rows", "config.data.batch=14", "or 4 chips"]),
        (["--chips=h100:8", "--plan=best"], ["unknown plan 'best'", "fsdp_ep"]),
        (["--chips=h100:8", "--plan=fsdp_pp_ep"], ["did you mean fsdp_ep_pp?"]),
        (["--chips=h100:8", "--plan=single"], ["single is for one chip", "8 x h100", "fsdp_ep"]),
        (["--chips=h100:8", "--plan=fsdp_pp", "--config.model.memory.layers=0"],
         ["--plan: fsdp_pp: a pipeline carries no rows of model.memory"]),
        (["--chips=a100:8", "--precision=fp8"], ["a100 has no fp8"]),
        (["--chips=h100:8", "--tokens=-1"], ["--tokens: must be positive"]),
        (["--chips=tpu7x:8", "--budget=100usd"], ["--price: none is known of tpu7x"]),
        (["--chips=h100:8", "--budget=lots"], ["'lots' is neither 1000usd nor 8h"]),
    ],
)  # fmt: skip
def test_impossible_requests_say_what_would_fit(capsys, args, parts):
    code, _, err = planned(capsys, "--config=olmoe_1b_7b:tiny", *args)
    assert code == 2
    assert err.count("\n") == 1
    for part in parts:
        assert part in err, err


def test_too_large_a_model_says_how_many_chips_it_takes(capsys):
    code, _, err = planned(capsys, "--config=mixtral_8x7b", "--chips=h100:4")
    assert code == 2
    assert "holds" in err
    assert "on each of 4 x h100" in err
    assert "x h100 would fit, by fsdp" in err
    assert err.count("\n") == 1


def test_a_peak_measured_once_more_never_falls_and_a_data_sheets_stands(monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda: (2.0, chips.MEASURED))
    for again, peak in ((1.0, 2.0), (3.0, 3.0)):
        monkeypatch.setattr(chips, "_measure", lambda again=again: again)
        assert chips.peak_again() == peak
    monkeypatch.setattr(chips, "peak_flops", lambda: (2.0, "h100 data sheet, bfloat16 dense"))
    assert chips.peak_again() == 2.0


# --- budgets


def test_a_budget_goes_to_the_models_the_law_wants():
    """The best split of a compute budget is (2404.10102, from its E, A, B, alpha and beta) by
    Lagrange's rule; the ladder's rung lies within a factor two of it."""
    told = forecast.spend("100h", chips.parse("h100:8"), None)
    law = loss_of.read("chinchilla").constants
    compute = 6 * told["params"] * told["tokens"]
    gain = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (
        1 / (law["alpha"] + law["beta"])
    )
    best = gain * (compute / 6) ** (law["beta"] / (law["alpha"] + law["beta"]))
    assert best / 2 < told["params"] < 2 * best
    value = law["E"] + law["A"] / told["params"] ** law["alpha"]
    value += law["B"] / told["tokens"] ** law["beta"]
    assert told["loss"] == pytest.approx(value, rel=1e-6)
    assert told["interval"][0] < told["loss"] < told["interval"][1]
    assert told["validity"] == "inside the fitted runs"
    assert told["accuracy"][0]["validity"].startswith("outside validity")
    assert told["loss"] == min(row["loss"] for row in told["ladder"])
    less = forecast.spend("10h", chips.parse("h100:8"), None)
    assert less["loss"] > told["loss"]
    assert less["parameters"] < told["parameters"]


def test_the_users_own_sweep_decides_among_the_widths_of_a_configuration(tmp_path, capsys):
    fit = fitting.fit(planted.sweep(1, noise=0.001), bootstrap=40, follow=8)
    (tmp_path / "fit.json").write_text(json.dumps(fit.to_json()))
    args = ["--config=experiments/isoflop.py:dense", f"--fit={tmp_path}", "--json"]
    args.append("--config.data.tokenizer=bytes")
    code, out, _ = planned(capsys, *args, "--budget=0.01h")
    told = json.loads(out)
    assert code == 0
    assert told["law"] == fit.provenance["data"]
    widths = [row["overrides"]["model.width"] for row in told["ladder"]]
    assert widths == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert {row["batch"] for row in told["ladder"]} == {4}
    assert told["validity"].startswith("outside validity")
    for row in told["ladder"]:
        expected = loss_of.loss(fit, params=row["params"], tokens=row["tokens"])
        assert row["loss"] == pytest.approx(expected["loss"])
    code, out, _ = planned(capsys, *args, "--tokens=1e6")
    said = json.loads(out)["forecast"]
    assert said["tokens"] == 1e6
    assert said["law_span"]["params"] == list(fit.span["params"])


def test_a_plan_forecasts_the_loss_by_a_fit_that_ships(capsys):
    code, out, _ = planned(capsys, "--config=llama:512x8", "--chips=h100:8", "--tokens=1e10")
    assert code == 0
    assert "The forecast is" in out
    assert "outside validity: no task was scored" in out
    code, out, _ = planned(capsys, "--config=llama:512x8", "--chips=h100:8", "--tokens=1e6")
    assert code == 0
    assert "No loss is forecast: outside validity: " in out
    assert "nats a token" not in out
    code, _, err = planned(capsys, "--config=llama:512x8", "--chips=h100:8", "--fit=nowhere")
    assert code == 2
    assert err.startswith("error: --fit: there is no file nowhere; fits that ship: chinchilla")
    assert err.count("\n") == 1
