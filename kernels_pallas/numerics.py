"""Inputs from a specification, tolerance by dtype, and a report of where two results differ."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# Largest error accepted, relative to the largest magnitude of the wanted array: a few hundred
# roundings for the wide types, and about eight for bfloat16, which rounds its intermediates too.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


_shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let `normal` return zeros, which under `jax.eval_shape` take neither time nor memory."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def normal(shape, dtype=jnp.float32, *, seed, std=1.0):
    """Return seeded normal numbers, rounded to dtype; the same on every platform and release."""
    if _shapes_only.get():
        return jnp.zeros(shape, dtype)
    values = np.random.default_rng(seed).standard_normal(shape) * std
    return _rounded(values, dtype)


def integers(make, shape):
    """Return make() as int32; zeros of this shape where only shapes are wanted."""
    return jnp.zeros(shape, jnp.int32) if _shapes_only.get() else jnp.asarray(make(), jnp.int32)


def _rounded(values, dtype):
    # by numpy: one program for every shape and dtype would be compiled otherwise
    return jnp.asarray(values.astype(np.float32).astype(jnp.dtype(dtype)))


def uniform_like(tree, *, seed):
    """Return arrays like the tree's of seeded numbers in [-1, 1): cotangents for a test."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    values = [_rounded(rng.uniform(-1, 1, x.shape), x.dtype) for x in leaves]
    return treedef.unflatten(values)


def tolerance(dtype) -> float:
    """Return the largest error accepted for a result of dtype, relative to its magnitude."""
    return TOLERANCE[jnp.dtype(dtype).name]


def error(got, want, *, floor=0.0) -> float:
    """Return max |got - want| over max |want|, nan and infinity counting as infinite error.

    A magnitude under `floor` counts as floor, for results that may be zero but for rounding.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: got {got.shape}, want {want.shape}")
    if got.size == 0:
        return 0.0
    worst = np.abs(got - want).max()
    scale = max(np.abs(want).max(), floor)
    if not np.isfinite(worst):
        return float("inf")
    return float(worst / scale) if scale > 0 else float(worst)


def report(got, want, *, dtype=None, factor=1.0, floor=0.0) -> str | None:
    """Return None when the trees agree to the tolerance of dtype, else where and by how much.

    `dtype` is got's own for each leaf when None; `factor` multiplies the tolerance; `floor` is
    the smallest magnitude that errors are held against.
    """
    lines = []
    paths = jax.tree_util.tree_flatten_with_path(got)[0]
    for (path, g), w in zip(paths, jax.tree.leaves(want), strict=True):
        limit = tolerance(dtype or g.dtype) * factor
        found = error(g, w, floor=floor)
        if not found <= limit:
            g64, w64 = np.asarray(g, np.float64), np.asarray(w, np.float64)
            where = np.unravel_index(np.argmax(np.abs(g64 - w64)), g64.shape)
            lines.append(f"{jax.tree_util.keystr(path) or 'result'}{tuple(map(int, where))}: "
                         f"got {g64[where]:.6g}, want {w64[where]:.6g}, "
                         f"relative error {found:.2e} above {limit:.1e}")
    return "; ".join(lines) or None
