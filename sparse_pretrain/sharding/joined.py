"""One softmax over keys that are read in several ways, as the model calls it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels_pallas import joined
from kernels_pallas.flash import own
from kernels_pallas.joined import Part
from sparse_pretrain.sharding.each import each_device, first_row

# Logical dims of what the parts are given.
DIMS = {
    "k": "B.K.", "v": "B.K.", "segments_q": "BL", "segments_k": "B.", "sinks_H": "H",
    "ends_BxS": "B.", "ids_q": "BL", "ids_k": "B.", "blocks_BxLxGxN": "BLG.", "starts_BxM": "B.",
    "kv": "B..", "chosen_BxLxN": "BL.",
}  # fmt: skip
HEADS = ("H", "K", "G")


def attend(
    q_BxLxHxD: Any, parts: Sequence[Part], alone: Mapping[str, Callable], goes_round: Callable
) -> tuple[Any, Any]:
    """(o, lse) of one softmax over the keys of all parts, as `kernels_pallas.joined` has it.

    Where a kernel is preferred for one of them, or its keys go round the devices, which
    `goes_round(q, k, v, options)` says, each part is computed by its op in `alone` and all merged.

    Shapes: q [B, L, H, D] -> o [B, L, H, Dv] and lse [B, L, H].
    """
    parts = [_complete(part) for part in parts]
    if not all(_by_xla(q_BxLxHxD, part, goes_round) for part in parts):
        found = _alone(q_BxLxHxD, parts[0], alone)
        for part in parts[1:]:
            found = joined.merge(found, _alone(q_BxLxHxD, part, alone))
        return found

    def local(q, *arrays, axes):
        first = first_row(axes, q.shape[1])
        here = []
        for part, own_arrays in zip(parts, arrays, strict=True):
            if first is not None and part.way in ("flash", "own_block"):
                own_arrays = own_arrays | {"first": first}
            here.append(part._replace(arrays=own_arrays))
        return joined.attend(q, here)

    dims = [tuple(DIMS[n] for n in sorted(part.arrays)) for part in parts]
    args = (q_BxLxHxD, *(part.arrays for part in parts))
    return each_device(local, args, ("BLH.", *dims), ("BLH.", "BLH"), heads=HEADS)


def _complete(part: Part) -> Part:
    arrays = {n: x for n, x in part.arrays.items() if x is not None}
    if "segments_q" in arrays:
        arrays.setdefault("segments_k", arrays["segments_q"])
    return part._replace(arrays=arrays)


def _by_xla(q, part: Part, goes_round) -> bool:
    op = joined.WAYS[part.way].op
    if op is None:
        return True
    keys: tuple[str, ...] = ("k", "v")
    more: tuple[str, ...] = ()
    if part.way == "flash":
        strided = "ends_BxS" in part.arrays or "stride" in part.options
        if not strided and goes_round(q, part.arrays["k"], part.arrays["v"], part.options):
            return False
        more = ("segments_q", "segments_k", "sinks_H", "ends_BxS")
    elif part.way == "block_sparse":
        keys = ("k", "v", "blocks_BxLxGxN", "starts_BxM")
    else:
        keys = ("kv", "chosen_BxLxN")
    arrays = [part.arrays[n] for n in keys]
    options = part.options | {n: part.arrays[n] for n in more if n in part.arrays}
    return op.choose(q, *arrays, **options, return_lse=True).name == "xla"


def _alone(q, part: Part, ops: Mapping[str, Callable]):
    arrays, options = part.arrays, part.options
    if part.way == "flash":
        return ops["flash"](q, **arrays, **options, return_lse=True)
    if part.way == "block_sparse":
        keys = (arrays[n] for n in ("k", "v", "blocks_BxLxGxN", "starts_BxM"))
        return ops["block_sparse"](q, *keys, **options, return_lse=True)
    if part.way == "token_sparse":
        listed = arrays["kv"], arrays["chosen_BxLxN"]
        return ops["token_sparse"](q, *listed, **options, return_lse=True)

    def local(q, k, v, ids_q, ids_k, axes):
        first = first_row(axes, q.shape[1])
        return own.own_block(q, k, v, ids_q, ids_k, first=first, **options)

    names = ("k", "v", "ids_q", "ids_k")
    dims = ("BLH.", *(DIMS[n] for n in names))
    args = (q, *(arrays[n] for n in names))
    return each_device(local, args, dims, ("BLH.", "BLH"), heads=("H", "K"))


