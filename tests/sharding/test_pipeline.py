"""1F1B and ZB-H1 compute what one device does, and hold what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain import optim
from sparse_pretrain.model import lm
from sparse_pretrain.sharding import apply, mesh, plans, ticks
from sparse_pretrain.training import partial, processes, state, step
from tests.sharding import equality

BOTH = ("1f1b", "zero_bubble")
DENSE = dict(
    dense=dict(attention=dict(kind="full", heads=2, kv_heads=1, head_dim=8), ffn=dict(kind="dense"))
)


def gradients(
    model, batch, accumulate, plan="", text="", devices=1, *, own_alone=False, **options
):  # fmt: skip
    """(gradients, report) of one batch, on one device where there is no plan."""
    definition = lm.define(model)
    tx = optim.TABLE["adamw"].build(
        optim.TABLE["adamw"].Config(), definition.dims, lambda n: jnp.float32(0.01)
    )
    placed = None
    if plan:
        found = plans.find(plan)
        laid = mesh.make(found, text, jax.devices()[:devices])
        placed = apply.Placed(found, laid, accumulate, **options)
    fresh = state.create(definition, tx, 0, ema=False, placed=placed)

    mask = partial.own_mask(model, fresh.params) if own_alone else None

    def run(fresh, batch):
        return step.gradients(definition, fresh, batch, accumulate, mask, placed)

    if placed is None:
        return jax.device_get(jax.jit(run)(fresh, batch))
    return jax.device_get(placed.jit(run)(fresh, placed.put(batch, batch.tokens.shape[0])))


def equal_gradients(pipeline, micro, stages, rows, **changes):
    """Gradients and reports of rows with padding, the last row's among them."""
    model = equality.model(blocks=DENSE, pattern=("dense",), repeats=stages, tied=True, **changes)
    batch = jax.tree.map(lambda a: a[-rows:], next(equality.batches(1)))
    want, told = gradients(model, batch, micro)
    laid = f"pipe={stages}"
    got, said = gradients(model, batch, micro, "ddp_pp", laid, stages, pipeline=pipeline)
    close = np.testing.assert_allclose
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4, atol=2e-6), got, want)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-5), said, told)
    assert ("mtp" in said) == ("mtp" in changes)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-3


def test_gradients_are_those_of_accumulation():
    """Three micro-batches through two stages."""
    equal_gradients("1f1b", 3, 2, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "micro"), [("1f1b", 4), ("zero_bubble", 2)])
def test_gradients_and_reports_are_those_of_accumulation(pipeline, micro):
    """Three stages; four micro-batches, no multiple of them, and two, fewer than they are.

    A prefix, an MTP layer, z-loss and tied embeddings are at both ends of the pipeline.
    """
    equal_gradients(pipeline, micro, 3, 8, prefix=("dense",), mtp=dict(depth=1), z_loss=1e-3)


def test_a_schedule_is_named_or_chosen():
    for asked, runs in (("auto", "1f1b"), ("gpipe", "gpipe"), ("zero_bubble", "zero_bubble")):
        placed = processes.place("ddp_pp", "pipe=2,data=4", 4, pipeline=asked)
        assert placed.schedule == runs
        assert placed.piped
        assert not placed.inside("pipe").piped
    cut = processes.place("ddp_cp_pp", "pipe=2,context=4", 4)
    assert cut.schedule == "gpipe"
    cut = processes.place("ddp_cp_pp", "pipe=2,context=4", 4, pipeline="1f1b")
    with pytest.raises(
        ValueError, match=r"^pipeline: 1f1b does not run with context=4: .* auto do"
    ):
        cut.check(lm.define(equality.model()), rows=8, length=64)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ticks.SCHEDULES)
def test_bfloat16_goes_through_as_on_one_device(pipeline):
    """Its sums over devices are taken in float32 on CPU, where XLA aborts on others."""
    model = equality.model(blocks=DENSE, pattern=("dense",), repeats=2)
    model = dataclasses.replace(model, dtype="bfloat16")
    batch = next(equality.batches(1))
    want, told = gradients(model, batch, 4)
    got, said = gradients(model, batch, 4, "ddp_pp", "pipe=2", 2, pipeline=pipeline)
    np.testing.assert_allclose(said["nats"], told["nats"], rtol=1e-3)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", BOTH)
def test_an_indexer_trained_alone_gets_the_gradients_of_one_device(pipeline):
    """Everything else gets none; the indexers' own losses are means over each micro-batch."""
    layer = dict(attention=equality.ATTENTIONS["dsa"], ffn=dict(kind="dense"))
    model = equality.model(blocks=dict(layer=layer), pattern=("layer",), repeats=2)
    batch = next(equality.batches(1))
    want, told = gradients(model, batch, 4, own_alone=True)
    got, said = gradients(model, batch, 4, "ddp_pp", "pipe=2", 2, own_alone=True, pipeline=pipeline)
    close = np.testing.assert_allclose
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4, atol=2e-6), got, want)
    close(said["indexer_loss"], told["indexer_loss"], rtol=1e-5)
    own = {p for p, leaf in jax.tree_util.tree_leaves_with_path(want) if np.abs(leaf).max() > 0}
    assert own == {
        p for p, is_own in jax.tree_util.tree_leaves_with_path(
            partial.own_mask(model, want)
        ) if is_own
    }  # fmt: skip


CASES = {
    "experts": ("fsdp_ep_pp", "pipe=2,fsdp=2,expert=2", 8, 2, dict(mtp=dict(depth=1), z_loss=1e-3)),
    "no multiple": ("ddp_pp", "pipe=3", 3, 4, dict(repeats=3, prefix=("moe",))),
    "fewer": ("ddp_pp", "pipe=4,data=2", 8, 2, dict(repeats=4, mtp=dict(depth=2))),
    "remat": ("fsdp_pp", "pipe=2,fsdp=2", 4, 4, dict(remat="full", residual=dict(kind="mhc"))),
    "tensor": ("fsdp_tp_pp", "pipe=2,tensor=2", 4, 4, dict(remat="dots")),
}


@pytest.fixture(scope="module")
def alone():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pipeline", BOTH)
def test_twenty_steps_equal_one_device(pipeline, case, alone):
    """Prices, auxiliary losses and rows with padding among them."""
    plan, text, devices, micro, changes = CASES[case]
    if case not in alone:
        model = equality.model(**{k: v for k, v in changes.items() if k != "remat"})
        alone[case] = equality.losses(model, accumulate=micro)
    found, params = equality.losses(
        equality.model(**changes), plan, text, accumulate=micro, asked=dict(pipeline=pipeline),
        devices=jax.devices()[:devices],
    )  # fmt: skip
    want, theirs = alone[case]
    np.testing.assert_allclose(found, want, atol=1e-5, rtol=0)
    assert found[-1] < found[0] - 0.2, "a run that does not learn shows nothing"
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # Adam divides by small gradients
