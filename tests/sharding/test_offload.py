"""Optimizer state and activations in the host's memory: where they lie, and the same numbers."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from kernels_pallas.chips import CHIPS
from sparse_pretrain import checkpoint, config, optim
from sparse_pretrain.model import lm
from sparse_pretrain.planning import chips
from sparse_pretrain.planning import compile as compiler
from sparse_pretrain.sharding import apply, mesh, offload, plans
from sparse_pretrain.training import state
from tests.sharding import equality

SMALL = equality.model("full", remat="none")


@pytest.mark.slow  # two steps compiled; that a checkpoint goes back to the host stays a default
def test_the_optimizers_state_lies_on_the_host_and_the_losses_are_the_same():
    found = [equality.losses(SMALL, steps=3, host=host) for host in (False, True)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_under_a_plan_too(optimizer):
    options = dict(plan="fsdp_ep", text="fsdp=2,expert=4", steps=5, optimizer=optimizer)
    found = [equality.losses(SMALL, **options, host=host) for host in (False, True)]
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][0][-1] < found[0][0][0]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "text"), [("single", ""), ("fsdp", "data=1,fsdp=8")])
def test_activations_on_the_host_are_those_kept_on_the_device(plan, text):
    """The products that remat=dots keeps, so the same losses to the last bit."""
    found = []
    for remat in ("dots", "offload"):
        model = dataclasses.replace(SMALL, remat=remat)
        found.append(equality.losses(model, plan, text, steps=3))
    np.testing.assert_array_equal(found[0][0], found[1][0])


def test_a_checkpoint_goes_back_to_the_host(tmp_path):
    """Of a state under a plan; what is restored lies where its template does."""
    definition = lm.define(SMALL)
    rule = optim.TABLE["adamw"]
    tx = rule.build(rule.Config(), definition.dims, lambda n: np.float32(1e-3))
    plan = plans.find("fsdp")
    placed = apply.Placed(plan, mesh.make(plan, "data=1,fsdp=8"))
    made = state.create(definition, tx, 0, ema=False, placed=placed, host=True)
    saver = checkpoint.Checkpointer(tmp_path, every=1)
    saver.save(1, made, cursor={}, config={})
    saver.close()
    found, _ = checkpoint.Checkpointer(tmp_path).restore(made)
    for a, b in zip(jax.tree.leaves(made.opt), jax.tree.leaves(found.opt), strict=True):
        assert a.sharding == b.sharding
        assert a.sharding.memory_kind == ("pinned_host" if a.ndim else "device")
        np.testing.assert_array_equal(a, b)


def test_a_device_without_such_memory_is_refused_in_one_line():
    memories = [types.SimpleNamespace(kind=k) for k in ("unpinned_host", "device")]
    bare = types.SimpleNamespace(platform="abacus", addressable_memories=lambda: memories)
    offload.check("offload: optimizer", jax.devices()[0])
    says = "^offload: optimizer needs memory of kind pinned_host, and abacus has device, unpinned"
    with pytest.raises(ValueError, match=says) as e:
        offload.check("offload: optimizer", bare)
    assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.skipif(
    CHIPS["h100"].missing() is not None,
    reason=f"needs {CHIPS['h100'].missing()}, of the extra 'compile'",
)
def test_compiled_for_gpus_memory_falls_by_what_the_host_keeps():
    """NVIDIA's compiler, for eight H100s that are not here."""
    fleet = chips.parse("h100:8")
    experiment = config.resolve("llama:256x8", ["data.batch=64", "data.seq=1024"])
    model = dataclasses.replace(experiment.model, vocab=1024)
    experiment = dataclasses.replace(experiment, model=model)

    def made(remat):
        sizes = {"data": 1, "fsdp": 8}
        return compiler.compiled(experiment, fleet, plan="fsdp", sizes=sizes, micro=1, remat=remat)

    device, host = made("dots"), made("offload")
    assert device.host_bytes == 0 < host.host_bytes
    fallen = device.memory_per_chip_bytes - host.memory_per_chip_bytes
    assert fallen == pytest.approx(host.host_bytes, rel=0.05)
