"""What every router returns, and the pieces routers share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import device
from sparse_pretrain import spec
from sparse_pretrain.games import prices
from sparse_pretrain.shapes import AnyArray
from sparse_pretrain.sharding import ops


class Assignment(NamedTuple):
    """Which experts each token buys, and at what weight.

    Shapes: expert, weight [T, C]; balance [] is the router's own loss, already weighted.
    A pair whose expert is E (one past the last) is not dispatched: padding, or dropped.
    `market` holds what a market of experts reports: `price` [E] it routed by, `proposal` [E] for
    the next prices, `objective` [] of the dual per token, and `gap` [] to a balanced assignment
    where nothing is trained; or nothing.
    """

    expert: Int[Array, "T C"]
    weight: Float[Array, "T C"]
    balance: Float[Array, ""]
    market: dict[str, Array] = {}  # noqa: RUF012 (nobody writes to it)


class Report(NamedTuple):
    """What a feed-forward layer tells besides its output.

    Shapes: load [E] pairs per expert, [0] without experts; balance []; market as `market_sums`.
    """

    load: Float[Array, " E"]
    balance: Float[Array, ""]
    market: dict[str, Array]


SCORES = ("sigmoid", "softmax", "sqrt_softplus")


def check_score(kind: str) -> None:
    """Errors: ValueError when there is no such score."""
    spec.require(kind in SCORES, f"score: {kind!r} is not one of {', '.join(SCORES)}")


def logits(x_BxLxD: Float[Array, "B L D"], w_DxE: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """The gate's product in float32, tokens in one dim."""
    logits_BxLxE = ops.linear(x_BxLxD.astype(jnp.float32), w_DxE)
    return logits_BxLxE.reshape(-1, logits_BxLxE.shape[-1])


def score(kind: str, logits_TxE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Scores from logits: DeepSeek-V3's sigmoid, Switch's softmax, DeepSeek-V4's sqrt-softplus."""
    if kind == "softmax":
        return jax.nn.softmax(logits_TxE, axis=1)
    if kind == "sigmoid":
        return jax.nn.sigmoid(logits_TxE)
    # softplus is 0 in float32 far below zero, where the root has no slope: keep it off that edge
    return jnp.sqrt(jax.nn.softplus(logits_TxE) + 1e-12)


def assign(
    expert_TxC: Int[Array, "T C"],
    score_TxE: Float[Array, "T E"],
    valid_BxL: Bool[AnyArray, "B L"],
    config: Any,
    top_k: int,
    **market: Array,
) -> Assignment:
    """The assignment of these experts: weights from scores, no pair for padding, sequence balance.

    `config` has `normalise`, `scale` and `balance`. Experts numbered E are no pair.
    """
    B, L = valid_BxL.shape
    E = score_TxE.shape[1]
    live = expert_TxC < E
    taken = per_token(take_seats, (B, L), score_TxE, jnp.where(live, expert_TxC, 0))
    weight = jnp.where(live, taken, 0)
    if config.normalise:
        weight = weight / (jnp.sum(weight, axis=1, keepdims=True) + 1e-20)
    balance = jnp.zeros((), jnp.float32)
    if config.balance:
        column = jnp.arange(E, dtype=expert_TxC.dtype)
        chosen = jnp.any(expert_TxC[:, :, None] == column[None, None, :], axis=1)
        balance = config.balance * sequence_balance(
            score_TxE.reshape(B, L, E),
            chosen.reshape(B, L, E).astype(jnp.float32),
            jnp.asarray(valid_BxL).astype(jnp.float32),
            top_k,
        )
    expert_TxC = jnp.where(jnp.reshape(jnp.asarray(valid_BxL), (-1, 1)), expert_TxC, E)
    market = {k: jax.lax.stop_gradient(v) for k, v in market.items()}
    return Assignment(expert_TxC, weight * config.scale, balance, market)


def dual_of_choice(
    score_TxE: Float[Array, "T E"],
    price_E: Float[Array, " E"],
    expert_TxC: Int[Array, "T C"],
    valid_T: Bool[Array, " T"],
) -> Float[Array, ""]:
    """`games.prices.dual` where every token's experts are its C highest score - price: no sort."""
    T = expert_TxC.shape[0]
    worth = per_token(take_seats, (T, 1), score_TxE - price_E[None, :], expert_TxC)
    tokens = jnp.maximum(jnp.sum(valid_T, dtype=jnp.float32), 1.0)
    rent = jnp.sum(price_E) * (expert_TxC.shape[1] / score_TxE.shape[1])
    return jnp.sum(jnp.where(valid_T, jnp.sum(worth, axis=1), 0.0)) / tokens + rent


def duality_gap(
    score_TxE: Float[Array, "T E"],
    price_E: Float[Array, " E"],
    expert_TxC: Int[Array, "T C"],
    valid_T: Bool[Array, " T"],
) -> Float[Array, ""]:
    """How far prices are from proving the best balanced assignment: dual less primal, per token.

    The primal is what tokens get that find a seat at these prices, every expert taking its best
    ones; those turned away count 0, which is below any seat's score. An upper bound on the true gap
    where the turned away can still be seated.
    """
    E, k = score_TxE.shape[1], expert_TxC.shape[1]
    live = jnp.where(valid_T[:, None], expert_TxC, E)
    gain = take_seats(score_TxE, expert_TxC)
    kept = within_capacity(live, gain, E, prices.seats(valid_T, k, E))
    tokens = jnp.maximum(jnp.sum(valid_T, dtype=jnp.float32), 1.0)
    primal = jnp.sum(jnp.where(kept < E, gain, 0.0)) / tokens
    return dual_of_choice(score_TxE, price_E, expert_TxC, valid_T) - primal


def of_tokens(
    proposal_E: Float[Array, " E"], price_E: Float[Array, " E"], valid_T: Bool[Array, " T"]
) -> Float[Array, " E"]:
    """The proposed prices; those in force where there is no token to read any from.

    Such is a batch of padding at the end of the data.
    """
    return jnp.where(jnp.any(valid_T), proposal_E, price_E)


def market_sums(market: dict[str, Array], valid_BxL: Bool[AnyArray, "B L"]) -> dict[str, Array]:
    """An assignment's market times its tokens, and how many those are, so that parts add up."""
    if not market:
        return {}
    count = jnp.sum(jnp.asarray(valid_BxL), dtype=jnp.float32)
    # padding alone counts for next to nothing, but is still told of where there is nothing else
    count = jnp.maximum(count, 1e-6)
    return {"tokens": count} | {name: count * value for name, value in market.items()}


def market_means(sums: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """The means over all tokens of what `market_sums` of one or more parts add up to.

    Shapes: tokens [] or [N], of N layers; each of the others begins with the same dims.
    """
    if not sums:
        return {}
    count = sums["tokens"]
    return {
        name: value / jnp.reshape(count, count.shape + (1,) * (value.ndim - count.ndim))
        for name, value in sums.items()
        if name != "tokens"
    }


def buy_above(
    score_TxE: Float[Array, "T E"], price_E: Float[Array, " E"], seats: int
) -> Int[Array, "T C"]:
    """Every expert with score above its price, the `seats` highest scores where there are more."""
    E = score_TxE.shape[1]
    wanted = score_TxE > price_E[None, :]
    expert = top_k(jnp.where(wanted, score_TxE, -jnp.inf), seats)
    taken = jnp.take_along_axis(wanted, expert, axis=1)
    return jnp.where(taken, expert, E)


def within_capacity(
    expert_TxC: Int[Array, "T C"],
    weight_TxC: Float[Array, "T C"],
    experts: int,
    seats: int | Int[Array, ""],
) -> Int[Array, "T C"]:
    """The experts with pairs past an expert's `seats` dropped, lowest weights first.

    Source: batch prioritised routing, V-MoE 2106.05974 section 4.1.
    """
    pairs = expert_TxC.size
    expert, weight = expert_TxC.reshape(-1), weight_TxC.reshape(-1)
    number = jnp.arange(pairs, dtype=jnp.int32)
    ranked = jax.lax.sort((expert, -weight, number), num_keys=3)
    starts = jnp.searchsorted(ranked[0], jnp.arange(experts + 1, dtype=expert.dtype))
    place = number - starts.astype(jnp.int32)[jnp.minimum(ranked[0], experts)]
    kept = jnp.where(place < seats, ranked[0], experts)
    out = jnp.zeros((pairs,), expert.dtype).at[ranked[2]].set(kept, unique_indices=True)
    return out.reshape(expert_TxC.shape)


def check_groups(config: Any, experts: int, top_k: int) -> None:
    """Errors: ValueError when experts, `config`'s groups and top_k do not fit together."""
    spec.require(
        experts % config.groups == 0,
        f"router.groups: experts {experts} is not a multiple of groups {config.groups}",
    )
    reachable = experts // config.groups * config.groups_kept
    spec.require(
        top_k <= reachable, f"top_k: {top_k} exceeds the {reachable} experts a token can reach"
    )


def best_groups(
    score_TxE: Float[Array, "T E"], groups: int, kept: int, best: int
) -> Float[Array, "T E"]:
    """The scores, -inf outside the `kept` groups with the highest sum of their `best` scores.

    Source: DeepSeek-V2's device-limited routing (2405.04434 section 2.2.2) ranks groups by their
    highest score, V3's by the sum of two (2412.19437 section 2.1.2).
    """
    if groups == 1:
        return score_TxE
    grouped = score_TxE.reshape(score_TxE.shape[0], groups, -1)
    rank = jax.lax.top_k(grouped, min(best, grouped.shape[-1]))[0].sum(-1)
    chosen = top_k(rank, kept)
    allowed = jnp.any(chosen[:, :, None] == jnp.arange(groups)[None, None, :], axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(score_TxE.shape)


def per_token(function: Callable, rows: tuple[int, ...], *parts_TxN: Array) -> Array:
    """`function` of tokens, [T, N] each -> [T, C], on the devices that have the tokens.

    `rows` are B and L of the T tokens. The compiler's partitioner would gather the scores of all
    devices for a sort or a pick: 13 GB on each of 2,048 chips for a layer of DeepSeek-V3.
    """

    def local(*parts, axes):
        del axes
        out = function(*(part.reshape(-1, part.shape[-1]) for part in parts))
        return out.reshape(*parts[0].shape[:2], -1)

    whole = [part.reshape(*rows, -1) for part in parts_TxN]
    found = ops.each_device(local, whole, ("BL.",) * len(whole), "BL.")
    return found.reshape(parts_TxN[0].shape[0], -1)


def top_k(score_TxE: Float[Array, "T E"], k: int) -> Int[Array, "T C"]:
    """The k highest experts of each token, best first, the lower number among equals; [T, C] int32.

    On CPU the maximum is taken k times: `jax.lax.top_k` runs on one core there and takes 3 times as
    long (2048 tokens, top 3 of 16 or top 8 of 64).
    """
    if device.platform() != "cpu":
        return jax.lax.top_k(score_TxE, k)[1].astype(jnp.int32)
    experts = score_TxE.shape[1]
    column = jnp.arange(experts, dtype=jnp.int32)[None, :]
    # -inf marks experts out of reach, so those already taken need a mark of their own
    free = jnp.ones(score_TxE.shape, bool)
    chosen = []
    for _ in range(k):
        open_score = jnp.where(free, score_TxE, -jnp.inf)
        best = free & (open_score == jnp.max(open_score, axis=1, keepdims=True))
        chosen.append(jnp.min(jnp.where(best, column, experts), axis=1))
        free = free & (column != chosen[-1][:, None])
    return jnp.stack(chosen, axis=1)


@jax.custom_vjp
def take_seats(
    score_TxE: Float[Array, "T E"], expert_TxC: Int[Array, "T C"]
) -> Float[Array, "T C"]:
    """score[t, expert[t, c]], with a gradient free of scatters, which are serial on CPU."""
    return jnp.take_along_axis(score_TxE, expert_TxC, axis=1)


def _take_forward(score, expert):
    # a zero-width slice carries E and the dtype to the backward pass without keeping the scores
    return take_seats(score, expert), (expert, jnp.zeros((0, score.shape[1]), score.dtype))


def _take_backward(residuals, d_seat):
    expert, shape = residuals
    column = jnp.arange(shape.shape[1], dtype=expert.dtype)[None, :]
    total = jnp.zeros((expert.shape[0], shape.shape[1]), d_seat.dtype)
    for c in range(expert.shape[1]):
        total = total + jnp.where(expert[:, c, None] == column, d_seat[:, c, None], 0)
    return total, None


take_seats.defvjp(_take_forward, _take_backward)


def mixed(x):
    """uint32 to uint32, every bit of the input changing half of the output's.

    Source: the finaliser "lowbias32", C. Wellons 2018.
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def drawn(tokens_BxL: Int[AnyArray, "B L"], share: float) -> Bool[Array, ""]:
    """True for a `share` of all batches, by a hash of the batch's own tokens."""
    tokens = jnp.reshape(jnp.asarray(tokens_BxL), (-1,)).astype(jnp.uint32)
    place = jnp.arange(tokens.shape[0], dtype=jnp.uint32)
    total = jnp.sum(mixed(tokens ^ mixed(place + jnp.uint32(1))), dtype=jnp.uint32)
    return mixed(total) < jnp.uint32(min(int(share * 2**32), 2**32 - 1))


def count_load(expert_TxC: Int[Array, "T C"], experts: int) -> Float[Array, " E"]:
    """Pairs per expert, float32; pairs of expert E are not counted."""
    column = jnp.arange(experts, dtype=expert_TxC.dtype)
    total = jnp.zeros((experts,), jnp.float32)
    for c in range(expert_TxC.shape[1]):
        hit = expert_TxC[:, c, None] == column[None, :]
        total = total + jnp.sum(hit, axis=0, dtype=jnp.float32)
    return total


def sequence_balance(
    score_BxLxE: Float[Array, "B L E"],
    chosen_BxLxE: Float[Array, "B L E"],
    valid_BxL: Float[Array, "B L"],
    top_k: int,
) -> Float[Array, ""]:
    """sum_i f_i P_i, mean over sequences: 1 when each sequence spreads evenly.

    f_i is the share of the sequence's pairs on expert i times E, P_i its mean normalised score.
    Source: 2412.19437 equations 17 to 20.
    """
    experts = score_BxLxE.shape[-1]
    tokens = jnp.maximum(jnp.sum(valid_BxL, axis=1), 1)[:, None]
    share = score_BxLxE / (jnp.sum(score_BxLxE, axis=-1, keepdims=True) + 1e-20)
    mean_share = jnp.sum(share * valid_BxL[:, :, None], axis=1) / tokens
    frequency = jnp.sum(chosen_BxLxE * valid_BxL[:, :, None], axis=1) / tokens
    frequency = jax.lax.stop_gradient(frequency) * (experts / top_k)
    per_sequence = jnp.sum(frequency * mean_share, axis=-1)
    # rows of padding count as 0, so that the mean over micro-batches is the mean over the batch
    return jnp.mean(per_sequence)
