"""What tells one program from another."""

import jax
import numpy as np
import pytest

from kernels_pallas import compile as command
from kernels_pallas import device, program
from kernels_pallas.chips import CHIPS

KERNEL = {"h100": """
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
def call(x):
    def body(x, y, held, arrived):
        plgpu.copy_gmem_to_smem(x, held, arrived)
        plgpu.barrier_wait(arrived)
        y[...] = held[...] + N
    memory = dict(held=plgpu.SMEM(x.shape, x.dtype), arrived=plgpu.Barrier())
    return plgpu.kernel(body, out_type=x, scratch_types=memory)(x)
""", "v5p": """
from jax.experimental import pallas as pl
def call(x):
    def body(x, y):
        y[...] = x[...] + N
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
"""}


@pytest.mark.parametrize("chip", KERNEL)
def test_a_program_is_the_same_on_other_lines(chip):
    missing = CHIPS[chip].missing()
    if missing or device.jax_version() < (0, 11):
        pytest.skip(f"needs {missing or 'jax 0.11'}")

    def lowered(n, above):
        names = {"N": n, "jax": jax}
        exec(compile("\n" * above + KERNEL[chip], f"/some/folder{above}/a.py", "exec"), names)
        x = jax.ShapeDtypeStruct((8, 128), np.float32, sharding=command._one(CHIPS[chip]))
        return jax.jit(names["call"]).lower(x)

    one, moved, changed = lowered(1.0, 0), lowered(1.0, 7), lowered(2.0, 0)
    assert one.as_text() != moved.as_text()
    assert program.digest(one) == program.digest(moved) != program.digest(changed)
