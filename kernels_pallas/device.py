"""What machine this is: platform and device kind, read when asked and never at import."""

from __future__ import annotations

import functools

import jax


def platform() -> str:
    """Return the platform that un-annotated arrays land on: 'cpu', 'gpu' or 'tpu'.

    A default device set with `jax.default_device` counts.
    """
    default = jax.config.jax_default_device
    if default is not None:
        return default if isinstance(default, str) else default.platform
    return jax.default_backend()


def kind() -> str:
    """Return the default device's kind as a file name, such as 'nvidia_h200' or 'cpu'."""
    return jax.devices()[0].device_kind.lower().replace(" ", "_")


@functools.cache
def jax_version() -> tuple[int, ...]:
    """Return JAX's version as numbers, for compiler facts that hold from one release on."""
    return tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())
