"""The torch side of the length benchmark: scaled_dot_product_attention of one precision.

Run by attention_length.py, with an interpreter that has torch; speaks JSON over its pipe.
"""

import sys

import peers_common as common

common.use_threads(int(sys.argv[1]))  # before torch is imported

import length_common as sizes  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(int(sys.argv[1]))


def build(request):
    """Causal attention of our heads, each with keys of its own, which torch is fastest with."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request["precision"]]
    shape = (1, sizes.HEADS, request["length"], sizes.HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    dy = torch.randn(shape, dtype=dtype)

    def attend():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward():
        with torch.no_grad():
            attend()

    programs = {
        "forward": forward,
        "both": lambda: torch.autograd.grad(attend(), (q, k, v), dy),
    }
    small = torch.randn((256, 256), dtype=dtype)
    for _ in range(3):  # wakes the threads, outside of any peak
        small = small @ small * 0.01
    reply = sizes.first_turns(programs) | {"versions": {"torch": torch.__version__}}
    return reply, lambda request: sizes.turn(programs[request["turn"]], request["calls"])


if __name__ == "__main__":
    common.serve(build)
