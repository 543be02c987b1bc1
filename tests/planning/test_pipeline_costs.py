"""What a pipeline's schedule costs: seconds against its table's, bytes against each other."""

import dataclasses

import pytest

from sparse_pretrain import cli, config
from sparse_pretrain.planning import chips, cost, planner
from sparse_pretrain.sharding import plans, ticks

SIZES = {"pipe": 4, "data": 1, "fsdp": 1}


@pytest.fixture(scope="module")
def evaluate():
    base = config.resolve("llama:512x8", ["data.batch=64"])
    model = dataclasses.replace(base.model, vocab=1024)
    made = {}

    def run(pipeline, micro, sizes=SIZES, plan="fsdp_pp"):
        if pipeline not in made:
            experiment = dataclasses.replace(base, model=model, pipeline=pipeline)
            fleet = chips.parse("h100:4")
            made[pipeline] = planner.Planner(planner.Problem(experiment, fleet))
        return made[pipeline].evaluate(plans.find(plan), sizes, micro, "none")

    return run


@pytest.mark.parametrize(("S", "M"), [(1, 4), (2, 1), (4, 2), (4, 3), (4, 4), (4, 9), (8, 16)])
def test_what_a_stage_waits_is_what_its_table_says(S, M):
    """The table is run op by op; the estimate is a closed form."""
    for f, b, w in ((1, 1, 1), (1, 2, 1), (2, 5, 1), (1, 2.6, 0.4)):
        for name in ("gpipe", "1f1b"):
            table = ticks.table(name, S, M).seconds(f, b + w)
            assert cost.waits(S, M, M * (f + b + w)) == pytest.approx(table - M * (f + b + w))
        table = ticks.table("zero_bubble", S, M).seconds(f, b, w)
        found = cost.waits(S, M, M * (f + b + w), M * w)
        assert found == pytest.approx(table - M * (f + b + w))


def test_a_plan_waits_and_holds_by_its_schedule(evaluate):
    few, many = ({p: evaluate(p, m) for p in ticks.SCHEDULES} for m in (4, 16))
    bubble = {p: c.step.bubble for p, c in many.items()}
    assert bubble["gpipe"] == bubble["1f1b"] > bubble["zero_bubble"] > 0
    held = {p: c.memory["activations"] for p, c in many.items()}
    assert held["1f1b"] < held["gpipe"], "it keeps as many inputs as there are stages"
    assert held["1f1b"] < held["zero_bubble"], "which keeps both sides of its products"

    def per_token(c):
        return c.memory["activations"] / c.rows

    # in micro-batches: 1F1B's do not grow with their number, GPipe's do
    assert per_token(many["1f1b"]) == per_token(few["1f1b"])
    assert per_token(many["gpipe"]) > per_token(few["gpipe"])


def test_a_stage_does_its_forward_pass_again(evaluate):
    """One pass of four of the layers' products is done twice; the head's three are not."""
    piped = evaluate("1f1b", 4).step.products
    alone = evaluate("1f1b", 4, {"pipe": 1, "data": 1, "fsdp": 4}).step.products
    assert 1.2 < piped / alone < 4 / 3


def test_rows_cut_along_context_are_planned_by_gpipe(evaluate):
    sizes = {"pipe": 2, "data": 1, "fsdp": 1, "context": 2}
    cut = evaluate("zero_bubble", 4, sizes, "fsdp_cp_pp")
    assert cut == dataclasses.replace(evaluate("gpipe", 4, sizes, "fsdp_cp_pp"))


def test_the_plan_says_the_schedule(capsys):
    args = ["plan", "--config=llama:512x8", "--chips=h100:4", "--plan=fsdp_pp"]
    assert cli.main([*args, "--config.model.vocab=1024", "--pipeline=zero_bubble"]) == 0
    said = capsys.readouterr().out
    assert "Its stages take turns by zero_bubble and wait" in said
    assert said.rstrip().endswith("--pipeline=zero_bubble")
    assert cli.main([*args, "--pipeline=dualpipe"]) == 2
    assert "pipeline: unknown value 'dualpipe'" in capsys.readouterr().err
