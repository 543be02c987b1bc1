"""A state as flat dicts of arrays by path, as orbax stores it, and back.

One dict per top-level field, so a resumed run needs no Python class of the run that wrote it and a
new run can take the weights alone.
"""

import contextlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_pretrain.checkpoint.files import CheckpointError, damaged, orbax, path_of

VERSION = 1


def read_meta(path: Path) -> dict[str, Any]:
    """The plain data in a checkpoint folder.

    Errors: CheckpointError naming the path when it is missing or damaged.
    """
    try:
        # The file itself: orbax's own reader opens every array first.
        meta = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        version = meta["version"]
    except Exception as e:
        raise damaged(path, e) from None
    if version != VERSION:
        raise CheckpointError(f"{path}: written in format {version}, this program reads {VERSION}")
    return meta


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def flatten(state: Any) -> dict[str, dict[str, Any]]:
    """Top-level field -> leaf path -> leaf."""
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        groups.setdefault(_name(path[:1]), {})[_name(path)] = leaf
    return groups


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def raw(x: Any) -> jax.Array:
    """A leaf as orbax stores it: keys as their bits, what the host may still change copied."""
    x = x if isinstance(x, jax.Array) else jnp.array(x)
    return jax.random.key_data(x) if _is_key(x) else x


def describe(x: Any) -> list[Any]:
    """[dtype, shape] of a leaf as plain data, and for keys the generator they are of."""
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    impl = [str(jax.random.key_impl(x))] if _is_key(x) else []
    return [str(x.dtype), list(x.shape), *impl]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding to restore a leaf with; orbax warns when it has to guess them."""
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if _is_key(x):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(*sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _match(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """CheckpointError naming the first leaf that the checkpoint lacks or holds otherwise."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{path}: holds no {name}, which has shape {leaf.shape} here")
        dtype, shape, *_ = saved[name]
        if tuple(shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(shape)} there and {tuple(leaf.shape)} here"
            )
        if dtype != str(leaf.dtype):
            raise CheckpointError(f"{path}: {name} is {dtype} there and {leaf.dtype} here")


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keeps a failed restore to its one error.

    When an array cannot be read, orbax closes its event loop while others are being read, and each
    of those would print a traceback later, from a thread nobody can catch it in, or log one as a
    task that nobody asked for its result. So hook and filter are taken away only after a success.
    """
    before, log = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(unraisable):
        closed = "Event loop is closed" in str(unraisable.exc_value)
        if not closed and not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    sys.unraisablehook = hook
    log.addFilter(_asked_for)
    yield
    log.removeFilter(_asked_for)
    sys.unraisablehook = before


def _asked_for(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def load(path: Path, meta: Mapping[str, Any], template: Any, *, partial: bool) -> Any:
    """The template's leaves from a checkpoint; with `partial` its other fields may be left there.

    Errors: CheckpointError when the leaves do not match or cannot be read.
    """
    template = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), template)
    groups = flatten(template)
    wanted = {n: x for leaves in groups.values() for n, x in leaves.items()}
    saved = meta["leaves"]
    if partial:
        fields = {n.split(".", 1)[0] for n in wanted}
        saved = {n: v for n, v in saved.items() if n.split(".", 1)[0] in fields}
    _match(path, saved, wanted)
    extra = sorted(set(saved) - set(wanted))
    if extra:
        shape = tuple(saved[extra[0]][1])
        raise CheckpointError(f"{path}: {extra[0]} of shape {shape} there has no place here")
    abstract = {k: {n: _abstract(x) for n, x in v.items()} for k, v in groups.items() if v}
    arrays: dict[str, jax.Array] = {}
    with _hushed():
        for field, leaves in abstract.items():
            try:
                # Field by field: when one of several fails, orbax never awaits the others.
                arrays |= orbax().load_checkpointables(path, {field: leaves})[field]
            except Exception as e:
                raise damaged(path, e) from None

    def place(where, leaf):
        name = _name(where)
        if not _is_key(leaf):
            return arrays[name]
        return jax.random.wrap_key_data(arrays[name], impl=saved[name][2])

    return jax.tree_util.tree_map_with_path(place, template)


def init_from(
    workdir: str | Path,
    params: Any,
    prices: Any,
    step: int | None = None,
    *,
    averaged: bool = False,
) -> tuple[Any, Any]:
    """(params, prices) of another run, which a new run starts from or a command reads.

    Shapes: `params` and `prices` are templates, arrays or ShapeDtypeStructs; optimizer, step, keys
    and cursor stay in the checkpoint. `averaged` takes the moving average where the run kept one.
    Errors: CheckpointError naming the first parameter that does not match, with both shapes.
    """
    path = path_of(workdir, step)
    meta = read_meta(path)
    kept = averaged and any(name.startswith("ema.") for name in meta["leaves"])
    field = "ema" if kept else "params"
    loaded = load(path, meta, {field: params, "router": prices}, partial=True)
    return loaded[field], loaded["router"]
