"""Multi-token prediction: small modules that predict the tokens after the next one, in training.

Depth k joins the hidden state of position i with the embedding of token i + k and predicts token
i + k + 1, by the main model's embedding and head. Scoring and writing text leave it out.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_pretrain import nn, shapes, spec
from sparse_pretrain.attention import base
from sparse_pretrain.model import block, layers, residual
from sparse_pretrain.routing.base import Report
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(spec.Config):
    """`depth` tokens beyond the next one, 0 for none; `block` names their layers' type.

    The loss gains `weight / depth` times the sum over depths; a phase's `mtp_weight` takes its
    place. `block=""` is the type of the model's last layer.
    """

    depth: int = 0
    weight: float = 0.3  # DeepSeek-V3: 0.3 for the first 10T tokens of 14.8T, then 0.1
    block: str = ""

    def __post_init__(self):
        spec.require(0 <= self.depth <= 16, f"depth: must be 0 to 16, got {self.depth}")
        spec.positive(self, "weight")


class Module(block.Block):
    """One depth: join, a layer as any other, a norm before the shared head.

    Source: 2412.19437, equations 21 to 23; norms and the order of what is joined as there.
    Differs: the hidden state of depth 1 is the main model's after its last norm, as the engines
        that run the released weights hand it on.
    """

    def __init__(
        self,
        config: block.Config,
        width: int,
        keys: nn.Keys,
        *,
        eps: float,
        out_gain: float,
        streams: spec.Config = residual.PLAIN,
    ):
        super().__init__(config, width, keys, eps=eps, out_gain=out_gain, streams=streams)
        self.streams = streams
        self.norm_hidden = layers.RMSNorm(width, keys, eps=eps)
        self.norm_embedding = layers.RMSNorm(width, keys, eps=eps)
        self.w_join = nn.param(keys, (2 * width, width), ("2D", "D"), std=(2 * width) ** -0.5)
        self.norm = layers.RMSNorm(width, keys, eps=eps)
        self.end = residual.end(streams, width, keys, eps=eps)

    def ahead(
        self,
        hidden: Float[Array, "B L D"],
        embedding: Float[Array, "B L D"],
        context: base.Context,
    ) -> tuple[Float[Array, "B L D"], Report, Float[Array, ""]]:
        """As the layer itself, of [norm(hidden); norm(embedding)]; before the last norm."""
        both = jnp.concatenate([self.norm_hidden(hidden), self.norm_embedding(embedding)], -1)
        x = residual.spread(self.streams, ops.linear(both, nn.read(self.w_join, both.dtype)))
        x, report, own = self(x, context)
        return (x if self.end is None else self.end(x)), report, own


def later(x: Array, by: int) -> Array:
    """The entry `by` positions on in the row, the last ones zero. Shapes: [B, L, ...], alike."""
    return jnp.pad(x[:, by:], ((0, 0), (0, by), *((0, 0),) * (x.ndim - 2)))


def known(segments_BxL: Int[AnyArray, "B L"], by: int) -> Bool[Array, "B L"]:
    """Where the token `by` positions on belongs to the same document in the same row."""
    segments = jnp.asarray(segments_BxL)
    return (segments != 0) & (later(segments, by) == segments)


def targets(batch: shapes.Batch, depth: int) -> shapes.Batch:
    """The batch with the targets of this depth; past a document's end they have no weight."""
    weights = later(jnp.asarray(batch.weights), depth)
    return batch._replace(
        targets=later(jnp.asarray(batch.targets), depth),
        weights=jnp.where(known(batch.segments, depth), weights, 0.0),
    )


def work(width: int, vocab: int) -> float:
    """Forward FLOPs per token of a depth besides its layer: the join and the head."""
    return 4.0 * width * width + 2.0 * width * vocab
