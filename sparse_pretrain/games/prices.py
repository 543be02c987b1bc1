"""Expert markets: the price at which an expert's demand meets its seats.

The market (techniques: assignment LP): tokens i pay price_j for expert j and buy the k experts with
the highest score_ij - price_j; expert j has c = m k / n seats for m tokens and n experts.

    primal  max sum_ij s_ij x_ij,  sum_j x_ij = k,  sum_i x_ij = c,  0 <= x <= 1
    dual    min over prices of  sum_i (sum of the k largest s_i - price) + c sum_j price_j

A router's bias is minus the price. Solvers that look at loads (`sign`, `proportional`) take one
step down the dual per optimizer step; solvers that look at scores (`quantile`, `bip`, `sinkhorn`
here, `auction` beside) return prices for the scores they are given. All are pure functions, outside
the gradient, and blind to rows that `valid` leaves out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sign(
    bias_E: Float[Array, "*N E"], load_E: Float[Array, "*N E"], rate: float
) -> Float[Array, "*N E"]:
    """bias + rate * sign(mean load - load), with the mean of the moves taken out.

    Shapes: [E] or stacked [N, E]. Source: 2408.15664 algorithm 1.
    Differs: moves are centred, so the mean bias does not drift; top-k is blind to a common shift.
    """
    move = jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
    return bias_E + rate * (move - jnp.mean(move, axis=-1, keepdims=True))


def proportional(
    bias_E: Float[Array, "*N E"], load_E: Float[Array, "*N E"], rate: float
) -> Float[Array, "*N E"]:
    """bias + rate * (1 - load / mean load): gradient descent on the dual.

    Shapes: [E] or stacked [N, E]. Source: 2408.15664 section 4.3.
    Differs: loads count relative to their mean, so that one rate serves any batch size.
    """
    mean = jnp.maximum(jnp.mean(load_E, axis=-1, keepdims=True), 1e-9)
    move = 1 - load_E / mean
    return bias_E + rate * (move - jnp.mean(move, axis=-1, keepdims=True))


def max_violation(load_E: Float[Array, "*N E"]) -> Float[Array, "*N"]:
    """MaxVio: how far the busiest expert is above the mean load, as a share of the mean.

    Source: 2408.15664 equation 4.
    """
    mean = jnp.mean(load_E, axis=-1)
    return jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1


def seats(valid_T: Bool[Array, " T"], top_k: int, experts: int) -> Int[Array, ""]:
    """Whole seats of an expert: valid tokens x k / experts, rounded down."""
    return (jnp.sum(valid_T, dtype=jnp.int32) * top_k) // experts


def _ordered_bits(x):
    """float32 as uint32 whose order is the numbers' order."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 becomes 0
    negative = bits >> jnp.uint32(31) == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(0x80000000))


def _from_ordered_bits(key):
    positive = key >> jnp.uint32(31) == 1
    bits = jnp.where(positive, key & jnp.uint32(0x7FFFFFFF), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def nth_largest(score_TxE: Float[Array, "T E"], rank: Int[Array, ""]) -> Float[Array, " E"]:
    """The rank-th largest of every column, exactly; rank 1 is the maximum, [E] float32.

    Built bit by bit from the top in 32 counting passes, which run on all cores and need no sorted
    copy; sorting 8192 x 64 scores takes 10 times as long on CPU. `rank` may be traced.
    """
    key_TxE = _ordered_bits(score_TxE.astype(jnp.float32))

    def body(i, found_E):
        bit = jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32))
        trial_E = found_E | bit
        above = jnp.sum(key_TxE >= trial_E[None, :], axis=0, dtype=jnp.int32)
        return jnp.where(above >= rank, trial_E, found_E)

    start = jnp.zeros(score_TxE.shape[1:], jnp.uint32)
    return _from_ordered_bits(jax.lax.fori_loop(0, 32, body, start))


def _next_best(value_TxE: Float[Array, "T E"], top_k: int) -> Float[Array, " T"]:
    """The (k+1)-th largest of every row."""
    assert top_k < value_TxE.shape[1], (top_k, value_TxE.shape)
    return jax.lax.top_k(value_TxE, top_k + 1)[0][:, top_k]


def centred(price_E: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
    """Prices with mean 0; choices and the dual objective are blind to a common shift."""
    return price_E - jnp.mean(price_E, axis=-1, keepdims=True)


def quantile(
    score_TxE: Float[Array, "T E"],
    price_E: Float[Array, " E"],
    top_k: int,
    valid_T: Bool[Array, " T"],
) -> Float[Array, " E"]:
    """Prices after one exact coordinate step: first every token's dual, then every expert's.

    alpha_i is token i's (k+1)-th largest s - price, and the new price_j the (c+1)-th largest
    s_ij - alpha_i over tokens, each the exact minimiser of the dual with the others held.
    Source: Quantile Balancing, kexue.fm/archives/11619.
    """
    alpha_T = _next_best(score_TxE - price_E[None, :], top_k)
    rank = seats(valid_T, top_k, score_TxE.shape[1]) + 1
    demand = jnp.where(valid_T[:, None], score_TxE - alpha_T[:, None], -jnp.inf)
    # with no valid token there is no demand to read a price from
    return jnp.where(jnp.any(valid_T), centred(nth_largest(demand, rank)), price_E)


def threshold(
    score_TxE: Float[Array, "T E"], top_k: int, valid_T: Bool[Array, " T"]
) -> Float[Array, " E"]:
    """The (1 - k/n)-quantile of every expert's scores: the price at which a share k/n wants it.

    For markets in which a token buys every expert with score above price, however many those are.
    Source: dynamic k, kexue.fm/archives/11626. Not centred: here the level of prices matters.
    """
    rank = seats(valid_T, top_k, score_TxE.shape[1]) + 1
    return nth_largest(jnp.where(valid_T[:, None], score_TxE, -jnp.inf), rank)


def bip(
    score_TxE: Float[Array, "T E"],
    price_E: Float[Array, " E"],
    top_k: int,
    valid_T: Bool[Array, " T"],
    iterations: int = 4,
) -> Float[Array, " E"]:
    """Prices that nearly balance this very batch: T rounds of coordinate steps with duals >= 0.

    Scores must not be negative, as no router's are: below 0 a token would rather buy nothing.
    Source: BIP-Based Balancing, 2502.15451, algorithm 1.
    """
    rank = seats(valid_T, top_k, score_TxE.shape[1]) + 1

    def body(_, price):
        alpha = jnp.maximum(_next_best(score_TxE - price[None, :], top_k), 0)
        demand = jnp.where(valid_T[:, None], score_TxE - alpha[:, None], -jnp.inf)
        return jnp.maximum(nth_largest(demand, rank), 0)

    return jax.lax.fori_loop(0, iterations, body, price_E)


def sinkhorn(
    score_TxE: Float[Array, "T E"],
    top_k: int,
    valid_T: Bool[Array, " T"],
    temperature: float = 0.05,
    iterations: int = 8,
) -> Float[Array, " E"]:
    """Prices of the market softened by an entropy: tau log of the column scalings, centred.

    exp(s / tau) is scaled until rows sum to k and columns to the seats; the order of a row of the
    scaled plan is the order of s - price, so the plan is never kept.
    A plan's entry may exceed 1, which no token can use: for k > 1 loads are only roughly even.
    Source: S-BASE, 2202.01169 section 3.2.1, for k = 1. Differs: works on logarithms.
    """
    x = score_TxE.astype(jnp.float32) / temperature
    log_rows = jnp.where(valid_T, jnp.log(jnp.float32(top_k)), -jnp.inf)
    count = jnp.sum(valid_T, dtype=jnp.float32) * (top_k / score_TxE.shape[1])
    log_seats = jnp.log(jnp.maximum(count, 1e-9))

    def body(_, u_E):
        v_T = log_rows - jax.nn.logsumexp(x - u_E[None, :], axis=1)
        return jax.nn.logsumexp(x + v_T[:, None], axis=0) - log_seats

    u_E = jax.lax.fori_loop(0, iterations, body, jnp.zeros(x.shape[1:], jnp.float32))
    finite = jnp.any(valid_T)
    return jnp.where(finite, temperature * centred(jnp.where(finite, u_E, 0.0)), 0.0)


def dual(
    score_TxE: Float[Array, "T E"],
    price_E: Float[Array, " E"],
    top_k: int,
    valid_T: Bool[Array, " T"],
) -> Float[Array, ""]:
    """The dual objective per valid token: never below the best balanced assignment's score.

    Seats are counted in fractions, m k / n, so that the bound is tight where that is whole.
    """
    best = jnp.sum(jax.lax.top_k(score_TxE - price_E[None, :], top_k)[0], axis=1)
    tokens = jnp.maximum(jnp.sum(valid_T, dtype=jnp.float32), 1.0)
    rent = jnp.sum(price_E) * (top_k / score_TxE.shape[1])
    return jnp.sum(jnp.where(valid_T, best, 0.0)) / tokens + rent
