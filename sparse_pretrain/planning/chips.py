"""What a chip can do at best, and costs: data sheets, or measured on the machine at hand."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp

from sparse_pretrain import sections, spec


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, or the processor of this machine.

    Units: dense FLOP/s in bfloat16 and in 8 bits (0 where there are none), bytes, bytes/s; `inside`
    and `between` bytes/s of one chip, one way, within a node of `node` chips and out of it; watts
    and dollars an hour for one chip, 0 where nobody publishes them. `kinds` are parts of jax's
    device_kind.
    """

    name: str
    kinds: tuple[str, ...]
    bf16: float
    fp8: float
    memory: float
    bandwidth: float
    inside: float
    between: float
    node: int
    watts: float
    price: float
    source: str


_NVIDIA = "NVIDIA's data sheet, dense rates; a 400 Gb/s adapter per chip"
_PRICE = "; price: our assumption, an hour rented in 2025"
_TPU = (
    "Google's documentation of the chip, links as in How to Scale Your Model, table 1; a node is "
    "what its links join; on-demand list price, us-central; watts are not published"
)
_CHIPS = (
    Chip("h100", ("H100",), 989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9, 8, 700, 2.5,
         _NVIDIA + _PRICE),
    Chip("h200", ("H200",), 989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9, 8, 700, 3.0,
         _NVIDIA + _PRICE),
    Chip("h800", ("H800",), 989e12, 1979e12, 80e9, 3.35e12, 200e9, 50e9, 8, 700, 2.0,
         "as H100 with 400 GB/s of NVLink; network and price of 2412.19437, sections 3.1 and 1"),
    Chip("a100", ("A100",), 312e12, 0, 80e9, 2.039e12, 300e9, 25e9, 8, 400, 1.5,
         "NVIDIA's data sheet, 80 GB SXM; a 200 Gb/s adapter per chip" + _PRICE),
    Chip("b200", ("B200",), 2250e12, 4500e12, 180e9, 8e12, 900e9, 50e9, 8, 1000, 5.0,
         _NVIDIA + _PRICE),
    Chip("l40s", ("L40S",), 362e12, 733e12, 48e9, 864e9, 32e9, 12.5e9, 8, 350, 1.0,
         "NVIDIA's data sheet; PCIe 4 x16 inside; 100 Gb/s per chip assumed" + _PRICE),
    Chip("rtx4090", ("RTX 4090",), 165.2e12, 330.3e12, 24e9, 1.008e12, 32e9, 1.25e9, 8, 450, 0.4,
         "NVIDIA's Ada whitepaper, float32 sums; PCIe 4 x16; 10 Gb/s per chip assumed" + _PRICE),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 0, 16e9, 819e9, 180e9, 3.1e9, 256, 0, 1.2,
         _TPU),
    Chip("v5p", ("TPU v5",), 459e12, 0, 95e9, 2.765e12, 540e9, 6.2e9, 8960, 0, 4.2, _TPU),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 0, 32e9, 1.64e12, 360e9, 12.5e9, 256, 0, 2.7,
         _TPU),
    Chip("tpu7x", ("TPU7x",), 2307e12, 4614e12, 192e9, 7.38e12, 600e9, 12.5e9, 9216, 0, 0,
         "Google's documentation of TPU7x; neither watts nor a list price are published"),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in _CHIPS}
HERE = "cpu"
MEASURED = "measured bfloat16 matmul"
MOST = 2**20  # chips that a fleet may have


@dataclasses.dataclass(frozen=True)
class Fleet:
    """So many of one chip; `topology` as the vendor's compiler takes it, of TPUs whose grid was
    given.
    """

    chip: Chip
    count: int
    topology: str = ""


def parse(text: str) -> Fleet:
    """`h800:2048`, `v5p:8x16x16`, `cpu`, and `cpu:8`: simulated devices, which share it.

    Errors: ValueError naming the chip that is not known, or the number that is none.
    """
    name, colon, size = text.strip().lower().partition(":")
    known = (*CHIPS, HERE)
    spec.require(
        name in known,
        f"--chips: unknown chip {name!r}; {sections.nearest(name, known)}, as in h800:2048",
    )
    count = size if colon else "1"
    ok = re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,3}){0,2}", count) is not None
    spec.require(ok, f"--chips: {size!r} is no number of chips, as in h800:2048 or v5p:8x16x16")
    grid = [int(n) for n in count.split("x")]
    tpu = name.startswith(("v", "tpu"))
    spec.require(
        tpu or len(grid) == 1, f"--chips: {name} has no grid {count}; give {math.prod(grid)}"
    )
    total = math.prod(grid)
    spec.require(total <= MOST, f"--chips: at most {MOST} chips, got {total}")
    chip = CHIPS[name] if name in CHIPS else here()
    if name == HERE:
        chip = shared(chip, total)
    return Fleet(chip, total, f"{name}:{count}" if tpu and len(grid) > 1 else "")


def shared(chip: Chip, among: int) -> Chip:
    """What each of so many devices has of a chip that they share."""
    parts = ("bf16", "fp8", "memory", "bandwidth", "inside", "between")
    each = {name: getattr(chip, name) / among for name in parts}
    return dataclasses.replace(chip, **each, node=chip.node * among)


def at_hand() -> Fleet:
    """The devices of all processes, as JAX counts them."""
    chip, devices = here(), jax.devices()
    if chip.name == HERE and devices[0].platform == "cpu":
        chip = shared(chip, len(devices))
    elif chip.name == "tpu7x":  # two of JAX's devices
        chip = shared(chip, 2)
    return Fleet(chip, len(devices))


@functools.cache
def here() -> Chip:
    """The default device of this machine: its row where it has one, else measured."""
    kind = jax.devices()[0].device_kind.lower()
    for chip in _CHIPS:
        if any(part.lower() in kind for part in chip.kinds):
            return chip
    rate, stream = _measure(), _stream()
    return Chip(
        HERE, ("cpu",), rate, 0, _memory(), stream, stream, stream, 1, 0, 0,
        "measured: bfloat16 products of up to 1,024 rows (8,192 on an accelerator) and a sum of "
        "256 MB",
    )  # fmt: skip


@functools.cache
def peak_flops() -> tuple[float, str]:
    """(FLOP/s of all local devices together, where the number comes from)."""
    chip = here()
    if chip.name == HERE:
        return chip.bf16, MEASURED
    devices = 2 if chip.name == "tpu7x" else 1  # JAX's devices of one chip
    return chip.bf16 / devices * jax.device_count(), f"{chip.name} data sheet, bfloat16 dense"


def peak_again() -> float:
    """As `peak_flops`, of a device without a data sheet measured once more: the better of the two.

    A measurement is short, and may fall in a moment in which the machine was busy.
    """
    peak, source = peak_flops()
    return max(peak, _measure()) if source == MEASURED else peak


def _measure(seconds: float = 0.1) -> float:
    """Best rate of square bfloat16 matmuls on the default device; simulated devices share it.

    On a busy CPU the small one is done within a slice of its time, where the large one is cut.
    """
    sizes = (512, 1024) if jax.devices()[0].platform == "cpu" else (4096, 8192)
    step, rates = jax.jit(lambda a: a @ a), []
    for size in sizes:
        rates.append(2 * size**3 / _best(step, jnp.ones((size, size), jnp.bfloat16), seconds))
    return max(rates)


def _stream(size: int = 1 << 26, seconds: float = 0.15) -> float:
    """Bytes per second that a sum of two arrays reads and writes."""
    x = jnp.ones((size,), jnp.float32)
    return 2 * 4 * size / _best(jax.jit(lambda a: a + 1.0), x, seconds)


def _best(step, x, seconds: float) -> float:
    jax.block_until_ready(step(x))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(step(x))
        best = min(best, time.perf_counter() - start)
    return best


def _memory() -> float:
    """Bytes of memory of this device, or of this machine; 8 GB where neither says."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("bytes_limit", 8e9))
    try:
        with open("/proc/meminfo") as lines:
            return 1024.0 * int(next(lines).split()[1])
    except (OSError, ValueError, StopIteration, IndexError):
        return 8e9
