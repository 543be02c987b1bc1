"""How long a training step takes, from few constants: a roofline by class of op, the links, the
pipeline's bubble, the experts' imbalance.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from sparse_pretrain.planning import chips, network
from sparse_pretrain.planning.work import Work

PRECISIONS = ("bf16", "fp8")
# read and written by a product, of bfloat16 activations; in fp8 it reads 1 byte (2412.19437, 3.3)
BYTES = {"bf16": 2.0, "fp8": 1.5}


@dataclasses.dataclass(frozen=True)
class Constants:
    """What the model cannot know from a data sheet.

    `products` is the share of the peak that products with weights reach; `traffic` how often each
    number that a product reads or writes crosses the memory's bus, for norms, rotations, sums and
    casts beside it: both fitted to published runs (experiments/benchmarks/published_costs.py).
    The others are taken as they are: `core`, the share of the bfloat16 peak that attention's own
    products reach (FlashAttention 2 and 3, 2307.08691 and 2407.08608: 0.33 to 0.65 on H100);
    `overlap`, the share of computing behind which communication can hide: all of it, which the fit
    takes for granted too (DualPipe, 2412.19437 section 3.2.1: near-full overlap); `imbalance`, the
    fullest expert device's load over the mean within a batch, assumed.
    """

    products: float = 0.496
    traffic: float = 10.57
    core: float = 0.5
    overlap: float = 1.0
    imbalance: float = 1.1


ACCELERATOR = Constants()
HOST = 25e9  # bytes/s one way between a chip and its host: PCIe 4 x16 at four fifths, assumed
# four of five published runs lie within this factor of a prediction by a fit to the others
SPREAD = 1.34


class Step(NamedTuple):
    """Seconds of one step on every chip, by what they are spent on.

    `exchange` is communication that nothing hides, `bubble` the wait of a pipeline's stages.
    """

    products: float
    attention: float
    traffic: float
    exchange: float
    bubble: float
    optimizer: float
    hidden: float  # communication behind computing; no part of the total

    @property
    def total(self) -> float:
        """Wall seconds."""
        return sum(self) - self.hidden

    @property
    def bound_by(self) -> str:
        """What most of the step is spent on."""
        names = {
            "products": "matrix products",
            "attention": "attention",
            "traffic": "memory traffic between products",
            "exchange": "communication",
            "bubble": "the pipeline's bubble",
            "optimizer": "the optimizer's traffic with its memory",
        }
        return names[max(names, key=lambda field: getattr(self, field))]


def computing(
    work: Work,
    chip: chips.Chip,
    precision: str = "bf16",
    constants: Constants = ACCELERATOR,
    *,
    spread: bool = True,
) -> tuple[float, float, float]:
    """Seconds per token on one chip: products, attention's core, traffic between products.

    In fp8 the head stays in bfloat16, as in 2412.19437 section 3.3. `spread` experts are on
    several devices, of which the fullest is waited for.
    """
    peak = chip.fp8 if precision == "fp8" else chip.bf16
    experts = work.experts * (constants.imbalance if spread else 1.0)
    products = ((work.linear + experts) / peak + work.head / chip.bf16) / constants.products
    core = work.core / (constants.core * chip.bf16)
    return products, core, constants.traffic * BYTES[precision] * work.elements / chip.bandwidth


def step(
    work: Work,
    chip: chips.Chip,
    *,
    tokens: float,
    micro: int,
    messages: list[network.Message],
    sizes: Mapping[str, int],
    state_bytes: float,
    host_bytes: float = 0.0,
    precision: str = "bf16",
    constants: Constants = ACCELERATOR,
    pipeline: str = "1f1b",
    delayed: float = 0.0,
) -> Step:
    """One optimizer step.

    Units: `tokens` of the whole step whose work falls on one chip (of a pipeline's or a tensor
    axis's chips each has its share); `micro` micro-batches; `state_bytes` of parameters, gradients
    and optimizer of one chip, `host_bytes` of which come from its host and go back; `delayed` FLOPs
    per token of the products that the schedule zero_bubble leaves for later.
    """
    spread = sizes.get("expert", 1) > 1
    products, core, traffic = (
        tokens * x for x in computing(work, chip, precision, constants, spread=spread)
    )
    busy = products + core + traffic
    links = sum(network.seconds(m, chip, sizes) for m in messages)
    hidden = min(links, constants.overlap * busy)
    peak = chip.fp8 if precision == "fp8" else chip.bf16
    later = tokens * delayed / peak / constants.products if pipeline == "zero_bubble" else 0.0
    bubble = waits(sizes.get("pipe", 1), micro, busy + links - hidden, later)
    update = 2 * state_bytes / chip.bandwidth  # read and written once
    update += 2 * host_bytes / HOST
    return Step(products, core, traffic, links - hidden, bubble, update, hidden)


def waits(stages: int, micro: int, busy: float, later: float = 0.0) -> float:
    """Seconds that a pipeline's stage waits, in a step in which it is busy for `busy`.

    GPipe and 1F1B wait alike: (S - 1)(F + B) of one micro-batch. ZB-H1 waits (S - 1)(F + B - W), B
    without W, where all W take `later` seconds; with M < S micro-batches there are too few W, and
    S - M more are waited for. As `ticks.Table.seconds`, where W takes no longer than F.
    Source: 2104.04473, section 2.2; 2401.10241, section 2.3.
    """
    filled = (stages - 2 + min(micro, stages)) * later / micro if stages > 1 else 0.0
    return max((stages - 1) * busy / micro - filled, 0.0)
