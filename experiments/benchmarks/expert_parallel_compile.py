"""Expert parallel compiled for chips that are not here: does ragged all-to-all survive?

Question: do both exchanges, forward and backward, compile for TPU and for NVIDIA Hopper, and does
          the ragged one keep `ragged-all-to-all` in the compiled program?
Command:  python3 experiments/benchmarks/expert_parallel_compile.py
Needs:    python3 -m pip install libtpu, and for CUDA, without a driver:
          pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc absl-py
Cost:     40 seconds.
Measured: jax 0.12.0.1, 8 devices, 64 experts of 512 x 256, top 6 of 8,192 tokens:
          chip       exchange  seconds  ragged-all-to-all  temporaries, MB
          v5p:2x2x2  padded    7.3      0                  60.8
          v5p:2x2x2  ragged    8.6      36                 99.4
          H100 x 8   padded    7.7      0                  95.4
          H100 x 8   ragged    8.1      27                 81.2
Learned:  both compile everywhere. On TPU the ragged form costs 40 MB of temporaries more.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_pretrain.routing import expert_parallel, experts

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "H100" runtime_version { major: 13 }
"""
CHIPS = {
    "v5p:2x2x2": {"platform": "tpu", "topology_name": "v5p:2x2x2"},
    "H100 x 8": {
        "platform": "cuda",
        "topology_name": "h100",
        "target_config": H100,
        "topology": "1x1x8",
    },
}
EXPERTS, WIDTH, HIDDEN, TOKENS, SEATS = 64, 512, 256, 8192, 6


def compile_for(options: dict, *, ragged: bool):
    """The compiled gradient of one mixture over 8 devices, abstract inputs only."""
    devices = np.array(topologies.get_topology_desc(**options).devices).reshape(-1)[:8]
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("expert")

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rows))

    up, down = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    weights = experts.Weights(*(array(s, jnp.bfloat16) for s in (up, up, down)))
    x = array((TOKENS, WIDTH), jnp.bfloat16)
    expert, share = (array((TOKENS, SEATS), d) for d in (jnp.int32, jnp.float32))
    exchange = functools.partial(expert_parallel.exchanged, axis="expert", ragged=ragged)
    run = jax.shard_map(
        exchange, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False
    )

    def value(weights, x, share, expert):
        return jnp.sum(run(weights, x, expert, share).astype(jnp.float32))

    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))
    return gradient.lower(weights, x, share, expert).compile()


def main() -> None:
    """Prints a row per chip and exchange."""
    jax.config.update("jax_platforms", "cpu")
    print(f"{'chip':10s} {'exchange':9s} seconds  ragged-all-to-all  temporaries, MB")
    for chip, options in CHIPS.items():
        for ragged in (False, True):
            began = time.perf_counter()
            try:
                done = compile_for(options, ragged=ragged)
            except Exception as e:  # a wheel is missing, or the compiler refuses
                print(f"{chip:10s} {'ragged' if ragged else 'padded':9s} {str(e).splitlines()[0]}")
                continue
            seconds, count = time.perf_counter() - began, done.as_text().count("ragged-all-to-all")
            size = done.memory_analysis().temp_size_in_bytes / 1e6
            name = "ragged" if ragged else "padded"
            print(f"{chip:10s} {name:9s} {seconds:7.1f}  {count:17d}  {size:15.1f}")


if __name__ == "__main__":
    main()
