"""Chips that kernels are compiled for, described well enough to compile without having one."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from kernels_pallas.device import Target

EXTRA = "compile"  # in pyproject.toml: the compilers of all the chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it: of a chip with two devices, one of them.

    Units: FLOP/s of dense bfloat16 products, bytes/s and bytes of device memory.
    """

    name: str
    target: Target
    peak: float
    bandwidth: float
    memory: float
    topology: str
    l2: int = 0
    clock_ghz: float = 0.0

    def missing(self) -> str | None:
        """Return None, or which package the compiler of this chip needs."""
        if self.target.platform == "tpu":
            found = importlib.util.find_spec("libtpu")
            return None if found else "libtpu"
        for package in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"):
            try:
                found = importlib.util.find_spec(package)
            except ModuleNotFoundError:  # its parent package
                found = None
            if found is None:
                return "jax-cuda13-plugin and jax-cuda13-pjrt"
        return None

    def devices(self, topology: str = "") -> list[Any]:
        """Return devices of this chip that programs can be compiled for and never run on.

        `topology` is another than the chip's own: TPUs' name and grid, or partitions x nodes x
        devices of a node.
        """
        from jax.experimental import topologies

        if self.target.platform == "tpu":
            return list(topologies.get_topology_desc(
                platform="tpu", topology_name=topology or self.topology).devices)
        return list(topologies.get_topology_desc(
            platform="cuda", topology_name=self.name, target_config=self._config(),
            topology=topology or self.topology).devices)

    def _config(self) -> str:
        """XLA's GpuTargetConfigProto in text form."""
        assert self.target.capability is not None
        major, minor = self.target.capability
        info: dict[str, Any] = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32,
            "shared_memory_per_block": 49152, "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448, "threads_per_core_limit": 2048,
            "core_count": self.target.cores, "fpus_per_core": 128,
            "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535, "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2, "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": int(self.memory), "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        return (f"gpu_device_info {{ cuda_compute_capability {{ major: {major} minor: {minor} }} "
                f'{fields} }} platform_name: "CUDA" '
                "dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 } "
                f'device_description_str: "{self.target.kind}"')


def _gpu(name, kind, capability, cores, peak, bandwidth, memory, l2, clock_ghz):
    return Chip(name, Target("gpu", kind, capability, cores), peak, bandwidth, memory, "1x1x1",
                l2, clock_ghz)


# Vendors' data sheets, SXM boards; a TPU v7x chip has two devices, with half of it each.
_CHIPS = (
    _gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 989e12, 3.35e12, 80e9, 50 << 20, 1.98),
    _gpu("h200", "NVIDIA H200", (9, 0), 132, 989e12, 4.8e12, 141e9, 50 << 20, 1.98),
    _gpu("b200", "NVIDIA B200", (10, 0), 148, 2250e12, 8e12, 180e9, 126 << 20, 1.965),
    Chip("v5p", Target("tpu", "TPU v5"), 459e12, 2.765e12, 95e9, "v5p:2x2x1"),
    Chip("v6e", Target("tpu", "TPU v6 lite"), 918e12, 1.64e12, 32e9, "v6e:2x2"),
    Chip("tpu7x", Target("tpu", "TPU7x"), 1153.5e12, 3.69e12, 96e9, "tpu7x:2x2x1"),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
