"""The training loss of one batch, from hidden states, without the logits."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_pretrain import shapes
from sparse_pretrain.model import lm, mtp
from sparse_pretrain.sharding import ops


def token_losses(
    model: lm.LM, hidden: Float[Array, "B L D"], batch: shapes.Batch
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """(weighted sum of nats + z-loss [], nats per token [B, L])."""
    c = model.config
    head, layout = model.head_weight(hidden.dtype)
    return ops.cross_entropy(
        hidden,
        head,
        batch.targets,
        batch.weights,
        z_loss=c.z_loss,
        softcap=c.softcap or None,
        head_layout=layout,
    )


def loss_sums(
    definition, params, prices, batch: shapes.Batch, weight, parts: int, domains: int = 0
):
    """This (micro-)batch's share of the loss over the whole batch, and what to report.

    `weight` is the whole batch's total weight and `parts` the number of micro-batches, so that
    shares add up to the large batch's loss. With a number of `domains` their sums are reported.
    Source: MTP's share 2412.19437, equations 24 and 25: every depth over all targets of the batch.
    """
    model = definition.merge(params, prices)
    hidden, aux = model(batch, train=True)
    loss, report = head_sums(model, hidden, aux.ahead, batch, weight, domains)
    return loss + (aux.balance + aux.own) / parts, report | aux_sums(model.config, aux, parts)


def head_sums(model: lm.LM, hidden, ahead, batch: shapes.Batch, weight, domains: int = 0):
    """The share of the loss that is taken on targets, and what to report of it.

    Shapes: hidden, and each of `ahead`, [B, L, D]; what is reported of domains [2, domains]: nats
    and targets.
    """
    total, nats = token_losses(model, hidden, batch)
    loss, told = total / weight, []
    for depth, further in enumerate(ahead, 1):
        goal = mtp.targets(batch, depth)
        total, each = token_losses(model, further, goal)
        loss = loss + model.config.mtp.weight / len(ahead) * total / weight
        told.append((jnp.sum(each * goal.weights), jnp.sum(goal.weights)))
    report: dict = {"nats": jnp.sum(nats * batch.weights)}
    if domains:
        names = jnp.arange(domains, dtype=batch.domains.dtype)[None, None, :]
        mine = (batch.domains[..., None] == names).astype(jnp.float32)
        sums = jnp.stack([nats * batch.weights, batch.weights])
        report["domains"] = jnp.einsum("cbl,blk->ck", sums, mine, precision="highest")
    if told:
        report["mtp"] = tuple(jnp.stack(sums) for sums in zip(*told, strict=True))
    return loss, report


def aux_sums(config: lm.Config, aux: shapes.Aux, parts: int) -> dict:
    """What to report of the layers; `aux` of one of `parts` micro-batches, or summed over all."""
    report = {"load": aux.load, "market": aux.market}
    return report | ({"indexer_loss": aux.own / parts} if lm.trains_own(config) else {})
