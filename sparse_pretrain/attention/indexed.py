"""What attentions with a lightning indexer share: its sizes, and when it chooses and learns."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_pretrain import spec

MODES = ("sparse", "warmup", "dense")


def rotated(config, part: str, whole: str) -> None:
    """Require that `part` of the dims of `whole` can be rotated."""
    size, limit = getattr(config, part), getattr(config, whole)
    spec.require(
        size % 2 == 0 and 0 <= size <= limit,
        f"{part}: must be even and from 0 to {whole} {limit}, got {size}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexed(spec.Config):
    """An indexer chooses the best `top` of what a query may read.

    `mode`: sparse reads the chosen and trains the indexer on them; warmup reads all and trains the
    indexer on all; dense reads all and leaves the indexer alone.
    """

    MOST: ClassVar[int] = 2**16

    top: int = 128
    index_heads: int = 4
    index_dim: int = 32
    index_rope_dim: int = 16
    mode: str = "sparse"

    def check_indexer(self) -> None:
        """Raise ValueError for sizes that no indexer has."""
        sizes = ("top", "index_heads", "index_dim")
        spec.positive(self, *sizes)
        spec.at_most(self, self.MOST, *sizes)
        rotated(self, "index_rope_dim", "index_dim")
        spec.require(self.mode in MODES, f"mode: {self.mode!r} is not one of {', '.join(MODES)}")

    @property
    def index_scale(self) -> float:
        """What every score of the indexer is multiplied by."""
        return (self.index_dim * self.index_heads) ** -0.5


def best(
    q_BxJxD: Float[Array, "B J D"],
    w_BxJ: Float[Array, "B J"],
    keys_BxSxD: Float[Array, "B S D"],
    seen_BxS: Bool[Array, "B S"],
    *,
    top: int,
) -> Bool[Array, "B S"]:
    """Which of the cached keys that one query sees it reads: those of the `top` highest scores."""
    q, w, keys = (t.astype(jnp.float32) for t in (q_BxJxD, w_BxJ, keys_BxSxD))
    score = jnp.einsum("bj,bjs->bs", w, jax.nn.relu(jnp.einsum("bjd,bsd->bjs", q, keys)))
    _, at = jax.lax.top_k(jnp.where(seen_BxS, score, -jnp.inf), top)
    chosen = jnp.zeros(score.shape, bool).at[jnp.arange(len(at))[:, None], at].set(True)
    return seen_BxS & chosen
