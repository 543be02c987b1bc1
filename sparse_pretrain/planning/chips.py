"""What a chip can do at best: bfloat16 matmul rates, published or measured."""

import functools
import time

import jax
import jax.numpy as jnp

# dense bfloat16 FLOP/s from the vendors' data sheets, by a part of jax's device_kind
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


@functools.cache
def peak_flops() -> tuple[float, str]:
    """(FLOP/s of all local devices together, where the number comes from)."""
    device = jax.devices()[0]
    for name, rate in PEAK_BF16.items():
        if name.lower() in device.device_kind.lower():
            return rate * jax.device_count(), f"{name} data sheet, bfloat16 dense"
    return _measure(), "measured bfloat16 matmul"


def _measure(size: int = 1024, seconds: float = 0.15) -> float:
    """Best rate of a square bfloat16 matmul on the default device; simulated devices share it."""
    x = jnp.ones((size, size), jnp.bfloat16)
    step = jax.jit(lambda a: a @ a)
    jax.block_until_ready(step(x))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(step(x))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
