"""Checkpoints: exact round trips, what is kept, and what a crash or a full disk leaves."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_pretrain import checkpoint, optim
from sparse_pretrain.checkpoint import state as state_files

CONFIG = {"name": "a", "seed": 1, "model": {"width": 8, "pattern": [1, 2]}}


class State(NamedTuple):
    step: Any
    params: Any
    opt: Any
    router: Any
    game: Any
    key: Any


DIMS = {"embed": ("V", "D"), "layers": {"w": ("N", "D", "F"), "scale": ("N", "D")}}
SIZES = {"V": 11, "D": 6, "F": 5, "N": 2}


def make(rng, step=0, kind="muon"):
    fill = lambda d: jnp.asarray(rng.normal(size=[SIZES[i] for i in d]), jnp.float32)  # noqa: E731
    params = optim.groups.map_dims(fill, DIMS)
    entry = optim.TABLE[kind]
    rule = entry.build(entry.Config(), DIMS, lambda n: jnp.float32(0.1))
    opt = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), jax.jit(rule.init)(params))
    prices = {"moe": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)}
    key = jax.random.fold_in(jax.random.key(3), step)
    return State(jnp.int32(step), params, opt, prices, {}, key)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save(saver, state, **kwargs):
    kwargs = {"cursor": {"n": int(state.step)}, "config": CONFIG, **kwargs}
    return saver.save(int(state.step), state, **kwargs)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_round_trip_to_the_bit(tmp_path, rng, kind):
    state = make(rng, 7, kind)
    cursor = {"rows": [1, 2.5, None], "carry": {"ids": []}, "float": 0.1 + 0.2, "big": 2**53 + 1}
    with checkpoint.Checkpointer(tmp_path, every=7) as saver:
        assert save(saver, state, cursor=cursor, commit="abc")
        assert not save(saver, state)  # this step is there
    again = checkpoint.Checkpointer(tmp_path, every=7)
    assert again.latest() == 7
    got, back = again.restore(jax.tree.map(lambda x: x, state))
    same(got, state)
    assert back == cursor
    abstract, _ = again.restore(jax.eval_shape(lambda: make(np.random.default_rng(1), 0, kind)))
    same(abstract, state)
    meta = again.meta(7)
    assert (meta["commit"], meta["config"], meta["step"]) == ("abc", CONFIG, 7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.bool_, jnp.uint32])
def test_dtypes(tmp_path, dtype):
    state = {"params": {"a.b": jnp.arange(6).reshape(2, 3).astype(dtype), "n": np.int32(4)}}
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state, cursor={}, config={})
    got, _ = saver.restore(state)
    np.testing.assert_array_equal(got["params"]["a.b"], state["params"]["a.b"])
    assert got["params"]["a.b"].dtype == dtype
    assert int(got["params"]["n"]) == 4


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_draw_on(tmp_path, impl):
    state = {"key": jax.random.key(5, impl=impl), "keys": jax.random.split(jax.random.key(1), 3)}
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state, cursor={}, config={})
    got, _ = saver.restore(state)
    same(got, state)
    np.testing.assert_array_equal(
        jax.random.normal(got["key"], (4,)), jax.random.normal(state["key"], (4,))
    )


def test_donated_state_is_safe_while_it_is_written(tmp_path, rng):
    """The loop's next step reuses the buffers that the save is still reading."""
    x = jnp.asarray(rng.normal(size=(64, 1 << 14)), jnp.float32)  # 4 MB
    state = {"params": {f"w{i}": x + i for i in range(8)}}
    expected = jax.tree.map(lambda a: np.array(a, copy=True), state)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 0.5 - 1, s), donate_argnums=0)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state, cursor={}, config={})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
    got, _ = saver.restore(state)
    same(got, jax.tree.map(jnp.asarray, expected))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, rng):
    state = make(rng, kind="adamw")
    rule = optim.AdamW.build(optim.AdamW.Config(), DIMS, lambda n: 0.1 / (n + 1.0))

    @jax.jit
    def step(s):
        noise = jax.random.fold_in(s.key, s.step)
        grads = jax.tree.map(lambda p: p + jax.random.normal(noise, p.shape), s.params)
        updates, opt = rule.update(grads, s.opt, s.params)
        return s._replace(step=s.step + 1, params=optax.apply_updates(s.params, updates), opt=opt)

    step = jax.jit(step, donate_argnums=0)
    straight = jax.tree.map(jnp.copy, state)
    for _ in range(6):
        straight = step(straight)
    half = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        half = step(half)
    with checkpoint.Checkpointer(tmp_path) as saver:
        save(saver, half)
        half = step(half)  # the interrupted run went on a little
    resumed, _ = checkpoint.Checkpointer(tmp_path).restore(state)
    for _ in range(3):
        resumed = step(resumed)
    same(resumed, straight)


def test_keeps_the_newest_and_the_best(tmp_path, rng):
    scores = {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan"), 6: 1.9}
    with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
        for n, score in scores.items():
            save(saver, make(rng, n), metrics=score and {"bits_per_byte": score})
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert saver.best() == 2
    # A later process knows the scores of checkpoints it did not write.
    with checkpoint.Checkpointer(tmp_path, keep=1) as later:
        assert later.best() == 2
        save(later, make(rng, 7), metrics={"bits_per_byte": 1.0})
    assert checkpoint.steps(tmp_path) == [7]
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == ["00000007"]


def test_without_best_only_the_newest_stay(tmp_path, rng):
    with checkpoint.Checkpointer(tmp_path, keep=1, best=False) as saver:
        for n, score in {1: 1.0, 2: 2.0}.items():
            save(saver, make(rng, n), metrics={"bits_per_byte": score})
    assert checkpoint.steps(tmp_path) == [2]


def test_due():
    assert [n for n in range(10) if checkpoint.Checkpointer("x", every=3).due(n)] == [3, 6, 9]
    assert not any(checkpoint.Checkpointer("x").due(n) for n in range(10))


CHILD = """
    import os, signal, sys
    import jax, jax.numpy as jnp
    from sparse_pretrain import checkpoint
    saver = checkpoint.Checkpointer(sys.argv[1], keep=1)
    state = lambda n: {"params": {"w": jnp.full((1 << 20,), n, jnp.float32)}}
    saver.save(1, state(1), cursor={"n": 1}, config={})
    saver.wait()
    saver.save(2, state(2), cursor={"n": 2}, config={})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
        timeout=120,
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert checkpoint.steps(tmp_path) == [1]
    saver = checkpoint.Checkpointer(tmp_path, keep=1)
    template = {"params": {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}}
    got, cursor = saver.restore(template)
    assert cursor == {"n": 1}
    np.testing.assert_array_equal(got["params"]["w"], 1.0)
    # The next run writes the same step where the killed one left half of it.
    with saver:
        saver.save(2, got, cursor={"n": 2}, config={})
    assert [p.name for p in checkpoint.folder(tmp_path).iterdir()] == ["00000002"]


def tree_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_disk_too_small(tmp_path, rng, monkeypatch):
    with checkpoint.Checkpointer(tmp_path) as saver:
        save(saver, make(rng, 1))
    before = tree_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(checkpoint.CheckpointError) as e:
        save(saver, make(rng, 2))
    assert str(checkpoint.folder(tmp_path) / "00000002") in str(e.value)
    assert "No space left on device" in str(e.value)
    assert "\n" not in str(e.value)
    assert tree_of(tmp_path) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a disk needs root")
def test_disk_fills_while_writing(tmp_path, rng, monkeypatch):
    """A real 1 MB disk, with the check before writing switched off."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        saver = checkpoint.Checkpointer(tmp_path)
        save(saver, make(rng, 1))
        saver.wait()
        before = tree_of(tmp_path)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**40))
        noise = jnp.asarray(rng.normal(size=1 << 20), jnp.float32)

        def write():
            saver.save(2, {"params": {"w": noise}}, cursor={}, config={})
            saver.wait()

        with pytest.raises(checkpoint.CheckpointError, match="No space left on device") as e:
            write()
        assert "00000002" in str(e.value)
        assert "\n" not in str(e.value)
        assert tree_of(tmp_path) == before
        save(saver, make(rng, 3))  # and the run can go on once there is room
        saver.close()
        assert saver.latest() == 3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)


def test_errors_name_what_does_not_fit(tmp_path, rng):
    state = make(rng, 1)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints: no checkpoint here"):
        checkpoint.Checkpointer(tmp_path).restore(state)
    with checkpoint.Checkpointer(tmp_path) as saver:
        save(saver, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint at step 5.*\[1\]"):
        saver.restore(state, step=5)
    wide = state._replace(params={**state.params, "embed": jnp.zeros((12, 6))})
    with pytest.raises(checkpoint.CheckpointError, match=r"params\.embed .*\(11, 6\).*\(12, 6\)"):
        saver.restore(wide)
    half = state._replace(params={**state.params, "embed": jnp.zeros((11, 6), jnp.bfloat16)})
    with pytest.raises(checkpoint.CheckpointError, match=r"params\.embed is float32.*bfloat16"):
        saver.restore(half)
    more = state._replace(params={**state.params, "new": jnp.zeros(3)})
    with pytest.raises(checkpoint.CheckpointError, match=r"holds no params\.new"):
        saver.restore(more)
    less = state._replace(params={"layers": state.params["layers"]})
    with pytest.raises(checkpoint.CheckpointError, match=r"params\.embed of shape \(11, 6\)"):
        saver.restore(less)


@pytest.mark.parametrize("damage", ["meta", "data", "empty"])
def test_damaged(tmp_path, rng, damage):
    state = make(rng, 1)
    with checkpoint.Checkpointer(tmp_path) as saver:
        save(saver, state)
        save(saver, make(rng, 2))
    folder = checkpoint.folder(tmp_path) / "00000002"
    if damage == "meta":
        (folder / "_CHECKPOINT_METADATA").write_text("{")
    elif damage == "data":
        for file in folder.glob("params/**/d/*"):
            file.write_bytes(file.read_bytes()[:10])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"00000002: checkpoint is damaged") as e:
        checkpoint.Checkpointer(tmp_path).restore(state)
    assert "\n" not in str(e.value)
    same(checkpoint.Checkpointer(tmp_path).restore(state, step=1)[0], state)


def test_what_a_failed_restore_leaves_behind_prints_nothing(monkeypatch, caplog):
    """Orbax's other reads end after the error was told: as coroutines, and as tasks in a log."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    async def read():
        raise OSError("another array of the same checkpoint")

    async def reads():
        task = asyncio.ensure_future(read())
        task.add_done_callback(lambda _: None)
        await asyncio.sleep(0)

    with contextlib.suppress(OSError), state_files._hushed():
        raise OSError("the first array")
    left = read()
    sys.unraisablehook(types.SimpleNamespace(object=left, exc_value=OSError("late")))
    left.close()
    asyncio.run(reads())
    gc.collect()
    assert (told, caplog.records) == ([], [])
    other = types.SimpleNamespace(object=None, exc_value=OSError("of something else"))
    sys.unraisablehook(other)
    assert told == [other]


def test_init_from_takes_weights_only(tmp_path, rng):
    state = make(rng, 3, "adamw")
    with checkpoint.Checkpointer(tmp_path) as saver:
        save(saver, state)
    fresh = make(np.random.default_rng(9), 0, "muon")
    params, prices = checkpoint.init_from(tmp_path, fresh.params, fresh.router)
    same(params, state.params)
    same(prices, state.router)
    wrong = {**fresh.params, "embed": jnp.zeros((20, 6))}
    with pytest.raises(checkpoint.CheckpointError, match=r"params\.embed .*\(11, 6\).*\(20, 6\)"):
        checkpoint.init_from(tmp_path, wrong, fresh.router)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint here"):
        checkpoint.init_from(tmp_path / "elsewhere", fresh.params, fresh.router)


def test_init_from_the_average(tmp_path, rng):
    params = {"w": jnp.asarray(rng.normal(size=(3,)), jnp.float32)}
    average = {"w": params["w"] + 1}
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, {"params": params, "ema": average, "router": {}}, cursor={}, config={})
    same(checkpoint.init_from(tmp_path, params, {})[0], params)
    same(checkpoint.init_from(tmp_path, params, {}, averaged=True)[0], average)


SHARDED = """
    import sys
    import jax, jax.numpy as jnp
    from sparse_pretrain import checkpoint
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",))
    there = jax.NamedSharding(mesh, jax.P("data"))
    w = jax.device_put(jnp.arange(32.0).reshape(8, 4), there)
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), there)
    state = {"params": {"w": w}, "keys": keys}
    saver = checkpoint.Checkpointer(sys.argv[1])
    saver.save(1, state, cursor={}, config={})
    saver.close()
    got, _ = saver.restore(state)
    assert got["params"]["w"].sharding == there and got["keys"].sharding == there
"""


def test_restores_on_another_number_of_devices(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED), str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
        timeout=120,
    )
    keys = jax.random.split(jax.random.key(0), 8)
    template = {"params": {"w": jnp.zeros((8, 4))}, "keys": keys}
    got, _ = checkpoint.Checkpointer(tmp_path).restore(template)
    np.testing.assert_array_equal(got["params"]["w"], np.arange(32.0).reshape(8, 4))
    np.testing.assert_array_equal(jax.random.key_data(got["keys"]), jax.random.key_data(keys))


def test_importing_leaves_orbax_for_later():
    code = "import sparse_pretrain.checkpoint, sys; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cursor_must_be_plain(tmp_path, rng):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(checkpoint.Checkpointer(tmp_path), make(rng, 1), cursor={"n": object()})
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("keep", 0)])
def test_refuses_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        checkpoint.Config(**{field: value})
