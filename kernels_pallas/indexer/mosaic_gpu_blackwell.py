"""The indexer's scores on Blackwell's tensor cores: bfloat16, added up in float32.

All but the products is Hopper's (mosaic_gpu.py): 128 keys are multiplied at once, into tensor
memory, and one warpgroup takes their scores from there while the next keys' products run.
"""

from __future__ import annotations

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import blackwell
from kernels_pallas.hopper import X
from kernels_pallas.indexer import gpu_plan, mosaic_gpu, xla

_LAYOUT = plgpu.Layout.TCGEN05


def _run(fill, issue, write, *, k_smem, q_smem, columns, tmem, full, free):
    sums = blackwell.Sums(tmem, full, free, columns)

    def product(turn, slot, keys):
        place = sums.acquire(turn)
        plgpu.tcgen05_mma(place, k_smem.at[0, keys], q_smem.at[slot].transpose((1, 0)),
                          accumulate=False)
        sums.complete(turn)

    def take(turn, slot, keys):
        del slot, keys
        place = sums.wait(turn)
        return lambda columns: plgpu.async_load_tmem(place.at[:, columns], layout=_LAYOUT)

    def store():
        # what a product read is done with when its sums are taken, so that only who takes them
        # lets memory be filled anew
        write(0, take, sums.release)
        plgpu.wait_smem_to_gmem(0)

    # with 56 registers a thread that loads spilled one where keys have strides
    blackwell.by_role(fill, lambda: issue(product), store, registers=(104, 152, 232))


PRODUCTS = mosaic_gpu.Products(_LAYOUT, writers=1, rows=X, at_once=gpu_plan.COLUMNS // 4,
                               memory=blackwell.places, run=_run)
index_select = xla.selecting(functools.partial(mosaic_gpu.scores, how=PRODUCTS), gpu_plan.SCORES)
