"""What the TPU kernels over listed tokens can do, and how they cut a call.

Used by token_sparse and by the indexer's divergence over listed keys. A step of a kernel has eight
queries and some of their tokens, and multiplies query by query: tokens are along lanes in the
scores, heads along sublanes, so that what belongs to a token is a row of numbers.

Tokens are gathered by XLA before a kernel. A kernel could only fetch them by a copy of its own for
each row: by arithmetic, at some 25 cycles of the scalar unit to start a copy, the 2,048 tokens of a
query take about 30 us of a v5p, and their products with 16 heads of DeepSeek's latent (71 MFLOP)
0.16 us.
"""

from __future__ import annotations

import dataclasses

from kernels_pallas import blocks, device
from kernels_pallas.tpu import LANES, VMEM, sublanes, whole

QUERIES = 8  # of a step: the rows of a tile of 32-bit numbers
_TOKENS = (512, 256, 128)  # of a list in a step
# Tokens gathered at once: bounds the memory of keys and of their gradients by query.
GATHERED = 1 << 18
# A row that lists nothing, and the largest score that counts as nothing.
NOTHING, EMPTY = -1e30, -1e29


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing. `n` are the tokens of a step, 0 where none were chosen."""

    op: str
    scale: float
    v_dim: int
    B: int
    L: int
    S: int
    H: int
    N: int
    Dk: int
    itemsize: int
    n: int = 0

    @property
    def D(self) -> int:
        """Width in memory."""
        return whole(self.Dk, LANES)

    @property
    def V(self) -> int:
        """Width of values in memory."""
        return whole(self.v_dim, LANES)

    @property
    def R(self) -> int:
        """Rows of a query in memory, of which heads are the first."""
        return whole(self.H, sublanes(self.itemsize))

    @property
    def steps(self) -> int:
        """Steps of a list."""
        return -(-self.N // self.n)

    @property
    def listed(self) -> int:
        """Tokens of a list in memory."""
        return self.steps * self.n

    @property
    def tokens(self) -> int:
        """Tokens of the batch; this number of one stands for none."""
        return self.B * self.S

    @property
    def chunk(self) -> int:
        """Queries in one call of a kernel, of all rows of the batch end to end."""
        chunks = max(-(-self.B * self.L * self.listed // GATHERED), 1)
        return whole(-(-self.B * self.L // chunks), QUERIES)

    def sized(self, kernel: str) -> Plan:
        """Return the plan with the tokens of a step of one kernel: tuned ones, or fewest steps."""
        every = options(kernel, self)

        def cost(n):  # what is multiplied, and an estimate of what a step costs beside
            return whole(self.N, n) * (1 + LANES / n)

        workload = {"kernel": kernel, "R": self.R, "N": self.N, "D": self.D, "V": self.V,
                    "itemsize": self.itemsize}
        found = blocks.choose(self.op, "mosaic_tpu", workload, {"n": min(every, key=cost)},
                              [{"n": n} for n in every])
        return dataclasses.replace(self, n=found["n"])


def fast_bytes(kernel: str, plan: Plan, n: int) -> int:
    """Return the fast memory of a kernel: operands and results twice, sums, and scores' stages."""
    row, key = plan.R * plan.itemsize, n * plan.itemsize
    column = plan.R * LANES * 4  # a number for each row fills the lanes
    stages = 4 * plan.R * n * 4
    twice, once = {
        "forward": (row * (plan.D + plan.V) + key * plan.D + column, plan.R * plan.V * 4
                    + 2 * column),
        "backward": (row * (2 * plan.D + plan.V) + 2 * key * plan.D + 2 * column,
                     plan.R * plan.D * 4),
        "numbers": (row * plan.D + key * plan.D + column, 0),
        "slopes": (row * 2 * plan.D + 2 * key * plan.D + plan.R * plan.D * 4,
                   plan.R * plan.D * 4),
    }[kernel]
    return QUERIES * (2 * (twice + 8 * n) + once) + 2 * stages + 2 * n * plan.D * 4


def options(kernel: str, plan: Plan) -> list[int]:
    """Return how many tokens a step of a kernel may have, none where nothing fits."""
    return [n for n in _TOKENS if n < plan.N + LANES and fast_bytes(kernel, plan, n) <= VMEM]


def plan_of(op: str, q, kv, chosen, *, v_dim: int, scale: float) -> Plan:
    """Return the plan of a call."""
    (B, L, H, Dk), S, N = q.shape, kv.shape[1], chosen.shape[2]
    return Plan(op, float(scale), v_dim, B, L, S, H, N, Dk, q.dtype.itemsize)


def lacks(q, plan: Plan, kernels: tuple[str, ...]) -> str | None:
    """Return None, or why these kernels cannot run a call."""
    if reason := device.lacks_tpu(q=q):
        return reason
    for kernel in kernels:
        least = fast_bytes(kernel, plan, _TOKENS[-1])
        if least > VMEM:
            return (f"needs at most {VMEM} bytes of fast memory, {plan.H} heads of {plan.Dk} take "
                    f"{least}")
    return None


def supports(q, kv, chosen, *, v_dim, scale, unique=False, return_lse=False) -> str | None:
    """Return None, or why the TPU kernels cannot run this call of token_sparse."""
    del unique, return_lse
    plan = plan_of("token_sparse", q, kv, chosen, v_dim=v_dim, scale=scale)
    return lacks(q, plan, ("forward", "backward"))


def supports_mass(q, kv, chosen, lse, *, scale) -> str | None:
    """Return None, or why they cannot run token_mass."""
    del lse
    return lacks(q, plan_of("token_mass", q, kv, chosen, v_dim=1, scale=scale), ("numbers",))
