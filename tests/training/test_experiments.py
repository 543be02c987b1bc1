"""Every experiment that ships is built at its full size, without numbers: its step is traced."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sparse_pretrain import config, optim, shapes
from sparse_pretrain.model import engram, lm
from sparse_pretrain.planning import flops
from sparse_pretrain.training import state, step

FOLDER = config.experiment_dirs()[0]
NAMES = sorted(
    file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.py")
    if "def get_config" in file.read_text() and file.parent.name != "benchmarks")
CHEAP = ("nanogpt_char", "recall", "llama")  # the others take up to eight seconds each to trace


def _batch(section, memory):
    shape = (section.batch, section.seq)
    fields = dict.fromkeys(shapes.FIELDS, jnp.int32) | {"weights": jnp.float32}
    made = {f: jax.ShapeDtypeStruct(shape, d) for f, d in fields.items()}
    if memory.layers:
        made["memory"] = jax.ShapeDtypeStruct((*shape, memory.carried), jnp.int32)
    return shapes.Batch(**made)


@pytest.mark.parametrize(
    "name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_step_at_full_size(name):
    """What comes out is the state that went in, one loss, and the load of every expert."""
    experiment = config.resolve(name)
    model = experiment.model
    model = dataclasses.replace(model, vocab=model.vocab or 4096)
    definition = lm.define(model)
    rate = lambda count: jnp.float32(experiment.optim.lr)  # noqa: E731
    tx = optim.TABLE[experiment.optim.KIND].build(experiment.optim, definition.dims, rate)
    like = state.abstract(definition, tx, ema=experiment.ema > 0)
    run = step.make_train_step(definition, model, tx, schedule=rate, ema=experiment.ema,
                               accumulate=experiment.accumulate)
    out, told = jax.eval_shape(run, like, _batch(experiment.data, model.memory))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(out)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(like)]
    assert told["loss"].shape == ()
    experts = sum(s.ffn.experts for s in model.layer_list if s.ffn.KIND == "moe")
    assert sum(x.size for x in jax.tree.leaves(told.get("load", {}))) == experts
    held = sum(x.size for x in jax.tree.leaves(like.params))
    _, unused = engram.looked_up(model.memory)
    assert held - unused == flops.parameters(model).total
