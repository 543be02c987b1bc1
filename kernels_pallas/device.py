"""What machine this is: platform and device kind, read when asked and never at import."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that kernels are chosen and compiled for.

    `capability` is a GPU's (major, minor), `cores` its multiprocessors or a TPU chip's cores;
    `interpret` are Pallas's parameters of interpretation, None for kernels that are compiled.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None
    cores: int = 1
    interpret: Any = None


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def assume(target: Target) -> Iterator[Target]:
    """Choose kernels for this device whatever machine this is: to compile or interpret them.

    JAX knows nothing of it: what was traced before, by `jax.jit` too, keeps its choices, so trace
    a function made inside.
    """
    token = _assumed.set(target)
    try:
        yield target
    finally:
        _assumed.reset(token)


def assumed() -> bool:
    """Return whether kernels are chosen for another device than this machine's."""
    return _assumed.get() is not None


def target() -> Target:
    """Return the assumed device, or what is known of the default one."""
    other = _assumed.get()
    if other is not None:
        return other
    name = platform()
    if name == "tpu":
        return Target(name, kind=jax.devices("tpu")[0].device_kind)
    return _gpu() if name == "gpu" else Target(name, kind=name)


@functools.cache
def _gpu() -> Target:
    gpu = jax.devices("gpu")[0]
    version = getattr(gpu, "compute_capability", None)  # '9.0'; AMD's have names
    capability = None
    if version and version.replace(".", "").isdigit():
        major, minor = version.split(".")
        capability = (int(major), int(minor))
    return Target("gpu", gpu.device_kind, capability, int(getattr(gpu, "core_count", 1)))


def platform() -> str:
    """Return the platform that un-annotated arrays land on: 'cpu', 'gpu' or 'tpu'.

    A default device set with `jax.default_device` counts, and one assumed before it.
    """
    other = _assumed.get()
    if other is not None:
        return other.platform
    default = jax.config.jax_default_device
    if default is not None:
        return default if isinstance(default, str) else default.platform
    return jax.default_backend()


def _other_dtype(known: tuple[str, ...], arrays: dict[str, Any]) -> str | None:
    """Say which array is of none of these dtypes."""
    for name, x in arrays.items():
        if x.dtype.name not in known:
            return f"needs {' or '.join(known)}, {name} is {x.dtype}"
    return None


def lacks_hopper(*dtypes: str, **arrays: Any) -> str | None:
    """Return None, or why kernels for Hopper's tensor cores cannot run on the device.

    Each of the arrays has to be of one of these dtypes, bfloat16 when none is named.
    """
    at = target()
    if at.platform != "gpu":
        return f"needs an NVIDIA GPU, the device is {at.kind or at.platform}"
    if at.capability is None or at.capability[0] != 9:
        return f"needs Hopper's tensor cores (9.0), the device {at.kind} is {at.capability}"
    if jax_version() < (0, 11):
        # the oldest that they were compiled with
        return f"needs jax 0.11, this is {jax.__version__}"
    return _other_dtype(dtypes or ("bfloat16",), arrays)


def lacks_tpu(**arrays: Any) -> str | None:
    """Return None, or why kernels for a TPU cannot run on the device: bfloat16 and float32 can."""
    at = target()
    if at.platform != "tpu":
        return f"needs a TPU, the device is {at.kind or at.platform}"
    return _other_dtype(("bfloat16", "float32"), arrays)


def kind() -> str:
    """Return the device's kind as a file name, such as 'nvidia_h200', 'cpu' or 'cpu_amx'."""
    here = target()
    if here.platform == "cpu" and has_amx():
        return "cpu_amx"
    return re.sub(r"[^a-z0-9]+", "_", (here.kind or here.platform).lower()).strip("_")


@functools.cache
def jax_version() -> tuple[int, ...]:
    """Return JAX's version as numbers, for compiler facts that hold from one release on."""
    return tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())


@functools.cache
def has_amx() -> bool:
    """Return whether this processor has AMX's bfloat16 matrix units; False where it does not say.

    Without them (AVX-512 only, or ARM) a product costs relatively more and a copy relatively less.
    """
    try:
        with open("/proc/cpuinfo") as lines:
            return any("amx_bf16" in line for line in lines if line.startswith("flags"))
    except OSError:
        return False


def keep_memory() -> bool:
    """Make the C library keep freed memory for this process; True where that could be done.

    Call it once, before JAX runs anything. XLA:CPU takes its scratch memory from malloc for every
    step; glibc hands large blocks back to the system at once, so each step begins with a page
    fault per 4 kB. Measured: attention forward and backward over 16 x 256 tokens, 33 to 41 ms of
    processor time before and 25 to 27 after, with a seventh of the page faults. The quickstart at
    16,384 tokens a step, whose scratch is 1.5 GB: 367,000 page faults a step where blocks over 1 GB
    are mapped by themselves, none as here; the process is then 3.7 GB large and not 2.3.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # not glibc
    # malloc.h. One arena: the threads' own arenas would map each large block afresh. What is above
    # an eighth of the memory is mapped by itself: among small blocks it may need twice its room.
    trim_threshold, mmap_threshold, mmap_max, arena_max, never = -1, -3, -4, -8, -1
    try:
        eighth = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    except (OSError, ValueError):
        eighth = 0
    large = min(max(eighth, 2**30), 2**31 - 1)
    kept = mallopt(trim_threshold, never) == 1 and mallopt(arena_max, 1) == 1
    # older ones refuse a threshold above 32 MB
    return kept and (mallopt(mmap_threshold, large) == 1 or mallopt(mmap_max, 0) == 1)
