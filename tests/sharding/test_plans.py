"""Every plan: what it cuts, what it refuses, and that it computes what one device does."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, mesh, plans
from sparse_pretrain.training import processes
from tests.sharding import equality

MESHES = {
    "ddp": "data=8",
    "zero1": "data=8",
    "fsdp": "data=2,fsdp=4",
    "fsdp_tp": "fsdp=2,tensor=4",
    "fsdp_ep": "fsdp=2,expert=4",
    "fsdp_ep_cp": "fsdp=2,expert=2,context=2",
    "fsdp_ep_pp": "pipe=2,fsdp=2,expert=2",
    "fsdp_ep_tp": "fsdp=2,expert=2,tensor=2",
    "zero1_ep": "data=2,expert=4",
}
for name in plans.PLANS:  # another row of the table: pairs along its axes, the rest to its rows
    axes = [a for a in plans.find(name).axes if a not in ("data", plans.find(name).rest)]
    MESHES.setdefault(name, ",".join(f"{axis}=2" for axis in axes[:3]))
del MESHES["single"]


def placed(name, text, **options):
    plan = plans.find(name)
    return apply.Placed(plan, mesh.make(plan, text), **options)


def test_the_table_holds_plans_and_products_of_its_parts():
    assert all(plans.known(name) for name in plans.PLANS)
    assert plans.find("ddp_tp_cp").axes == ("data", "context", "tensor")
    for wrong in ("fsdp_pp_ep", "ep", "single_tp", "fsdp_fsdp", "fsdp_tp_tp", "zero2", ""):
        with pytest.raises(ValueError, match=r"^plan: unknown plan"):
            plans.find(wrong)


def test_a_parameter_is_cut_once_per_axis_and_only_where_it_divides():
    sizes = {"fsdp": 4, "expert": 2, "tensor": 2}
    plan = plans.find("fsdp_ep_tp")

    def lies(dims, shape, use="stored"):
        return plans.parameter(plan, sizes, dims, shape, use=use)

    expert = ("N", "E", "D", "F")
    assert lies(expert, (3, 8, 32, 16)) == P(None, "expert", "fsdp", "tensor")
    assert lies(expert, (3, 8, 32, 16), "used") == P(None, "expert", None, "tensor")
    assert lies(("V", "D"), (64, 32)) == P("tensor", ("fsdp", "expert"))
    assert lies(("D",), (32,)) == P(None)  # a vector is not worth a message
    assert lies(("D", "E"), (30, 8)) == P(None, ("expert", "fsdp"))  # 30 rows do not divide
    assert lies(("Dc", "H", "Dh"), (16, 4, 8)) == P(("fsdp", "expert"), "tensor", None)
    zero = plans.find("zero1")
    assert plans.parameter(zero, {"data": 8}, ("D", "F"), (32, 16)) == P(None, None)
    cut = plans.parameter(zero, {"data": 8}, ("D", "F"), (32, 16), use="optimizer")
    assert cut == P("data", None)


@pytest.mark.parametrize(
    ("plan", "text", "says"),
    [
        ("fsdp", "expert=4", "plan fsdp has no axis expert, it uses data, fsdp"),
        ("fsdp_ep", "expert=3", "expert=3 is 3 devices and there are 8; .* one of 1, 2, 4, 8"),
        ("fsdp", "fsdp=0", "'fsdp=0' gives no size, as in fsdp=2"),
        ("fsdp", "rows=2", "'rows' is no axis; axes are pipe, data,"),
        ("ddp", "data=4,data=2", "axis data is there twice"),
        ("single", "data=8", "plan single has no axis data, it is for one device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(plan, text, says):
    with pytest.raises(ValueError, match=says) as e:
        mesh.make(plans.find(plan), text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("plan", "text", "batch", "says"),
    [
        ("fsdp_ep", "fsdp=1,expert=8", {"experts": 4}, "expert=8 .* the 4 experts .*: 1, 2, 4$"),
        ("fsdp_tp", "tensor=8", {}, "tensor=8 .* the 4 heads .*sizes that fit: 1, 2, 4$"),
        ("ddp", "", {"rows": 12}, "deals 12 rows .* data=8, which is 8; a batch of 8 rows fits"),
        ("fsdp_ep_cp", "context=8", {"length": 36}, "context=8 .* the 36 tokens of a row"),
        ("fsdp", "fsdp=8", {"rows": 8, "accumulate": 2}, "fsdp=8 x 2 micro-batches, which is 16"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_would(plan, text, batch, says):
    section = equality.model()
    if "experts" in batch:
        ffn = section.blocks["moe"].ffn.__class__(experts=batch["experts"], top_k=2, hidden=16)
        block = section.blocks["moe"].__class__(attention=section.blocks["moe"].attention, ffn=ffn)
        section = section.__class__(
            width=32, vocab=64, blocks={"moe": block}, pattern=("moe",), repeats=2
        )
    laid = placed(plan, text, microbatches=batch.get("accumulate", 1))
    with pytest.raises(ValueError, match=says) as e:
        laid.check(lm.define(section), rows=batch.get("rows", 8), length=batch.get("length", 64))
    assert "\n" not in str(e.value)


def test_tokens_travel_as_asked_or_as_the_platform_can():
    assert [apply.exchange("auto", p) for p in ("cpu", "gpu", "tpu")] == [
        "padded", "ragged", "padded",
    ]  # fmt: skip
    assert apply.exchange("ragged", "tpu") == "ragged"
    with pytest.raises(ValueError, match=r"^config.exchange: ragged, which cpu cannot do; padded"):
        processes.place("fsdp_ep", "expert=4", 1, "ragged")
    assert processes.place("fsdp_ep", "expert=4", 1, "padded").exchange == "padded"


def test_each_process_reads_one_run_of_rows():
    assert placed("fsdp_ep_cp", "context=2").share(16) == (0, 1)
    batch = next(equality.batches(1))
    laid = placed("fsdp_ep_cp", "fsdp=2,expert=2,context=2").put(batch, 8)
    assert laid.tokens.sharding.spec == P(("fsdp", "expert"), "context")
    np.testing.assert_array_equal(laid.tokens, batch.tokens)
    assert placed("fsdp_ep", "expert=4").shares == 1
    # said before any data is read, and not by jax's own error about shardings
    says = "^mesh: plan fsdp_ep deals 12 rows .* expert=8, which is 8; a batch of 8 rows fits$"
    with pytest.raises(ValueError, match=says):
        placed("fsdp_ep", "expert=8").share(12)


@pytest.fixture(scope="module")
def alone():
    return {}


def equal(alone, attention, plan, text, *, accumulate=1, asked=None, **changes):
    key = attention, accumulate
    if key not in alone:
        alone[key] = equality.losses(equality.model(attention), accumulate=accumulate)
    section = equality.model(attention, **changes)
    found, params = equality.losses(section, plan, text, accumulate=accumulate, asked=asked)
    np.testing.assert_allclose(found, alone[key][0], atol=1e-5, rtol=0)
    assert found[-1] < found[0] - 0.2, "a run that does not learn shows nothing"
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone[key][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # Adam divides by small gradients


def test_tokens_and_experts_on_eight_devices_equal_one_device(alone):
    equal(alone, "mla", "fsdp_ep_cp", MESHES["fsdp_ep_cp"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", MESHES)
def test_every_plan_equals_one_device(plan, alone):
    laid = placed(plan, MESHES[plan])
    groups = math.prod(laid.sizes.get(a, 1) for a in laid.plan.batch)
    equal(alone, "mla", plan, MESHES[plan], accumulate=1 if groups == equality.ROWS else 2)


# MoBA's runs part where a token's experts turn on a last digit: test_choices.py
@pytest.mark.slow
@pytest.mark.parametrize("attention", sorted(set(equality.ATTENTIONS) - {"mla", "moba"}))
def test_every_attention_equals_one_device_with_rows_cut_and_heads_cut(attention, alone):
    equal(alone, attention, "fsdp_tp_cp", "fsdp=2,tensor=2,context=2")
