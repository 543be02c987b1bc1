"""Domain games against closed forms: values of zero-sum games, known laws, fixed points."""

import json

import numpy as np
import pytest

from sparse_pretrain.games import curves, mixtures

EVEN = np.full(4, 0.25)
# Losses of four domains that fall with the tokens each gets, E + B (weight x N)^-a, and what a
# reference run on even weights reached.
FLOOR, SIZE, POWER, N = (
    np.array([1.0, 1.3, 0.7, 2.0]), np.array([9.0, 14.0, 7.0, 20.0]),
    np.array([0.30, 0.34, 0.28, 0.36]), 1e6,
)  # fmt: skip
BEYOND = np.array([0.15, 0.02, 0.10, 0.05])  # how far the reference is ahead of even weights


def loss(weight):
    return FLOOR + SIZE * (weight * N) ** -POWER


REFERENCE = loss(EVEN) - BEYOND


def equalised(level):
    """The weights at which every domain's excess is `level`, by inverting the law."""
    return ((REFERENCE + level - FLOOR) / SIZE) ** (-1 / POWER) / N


def root(of, low, high):
    """Where a falling function is 0, by halving."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle) > 0 else (low, middle)
    return middle


def play(config, steps, gains, tokens=EVEN * 1024):
    """The state after `steps` rounds of a model that answers weights with losses."""
    state = mixtures.start(EVEN, REFERENCE)
    for _ in range(steps):
        nats = gains(state.weight) * tokens
        state = mixtures.update(config, state, nats, tokens, state.weight)
    return state


def test_doremi_equalises_excess_losses_of_a_known_law():
    """To the level at which the inverted law's weights sum to 1, and to 1e-3 of one another.

    Smoothing holds weights off that point by what its own fixed point says: exp(rate x gain) is
    in proportion to 1 - c / (K weight). With the paper's c of 1e-3 that is 2.3e-3 on this law.
    """
    level = root(lambda c: equalised(c).sum() - 1, 0.0, 1.0)
    wanted = equalised(level)
    assert np.abs(loss(EVEN) - REFERENCE - level).max() > 0.05  # far off at the start
    for smoothing in (1e-3, 1e-4):
        config = mixtures.DoremiConfig(reference="elsewhere", smoothing=smoothing)
        state = play(config, 800, loss)
        excess = loss(state.weight) - REFERENCE
        left = np.log(1 - smoothing / (4 * state.weight)) / config.rate
        np.testing.assert_allclose(excess - excess[0], left - left[0], atol=1e-9)
    np.testing.assert_allclose(excess, level, atol=1e-3)
    assert np.ptp(excess) < 1e-3
    np.testing.assert_allclose(state.weight, wanted, rtol=0.01)
    default = mixtures.DoremiConfig(reference="elsewhere")
    assert (default.rate, default.smoothing) == (1.0, 1e-3)  # the paper's


def test_excess_below_the_reference_counts_nothing():
    config = mixtures.DoremiConfig(reference="elsewhere")
    state = play(config, 50, lambda w: REFERENCE - np.arange(4.0))
    np.testing.assert_allclose(state.weight, EVEN, rtol=1e-12)


def test_hedge_reaches_the_value_of_a_zero_sum_game_within_its_regret():
    """Rock, paper, scissors with stakes 1, 2 and 3: its value is 0 and its solution known.

    The other player answers every weights with its best column, so the mean payoff is at most the
    value, and Hedge's regret of sqrt(T ln K / 2) on gains in [0, 1] bounds it from below.
    """
    stake = np.array([[0.0, -1, 2], [1, 0, -3], [-2, 3, 0]])
    solution = np.array([3, 2, 1]) / 6
    np.testing.assert_allclose(solution @ stake, 0, atol=1e-12)
    gain = (stake + 3) / 6  # in [0, 1], of value 1/2
    rounds = 4000
    weight, mean, paid = np.full(3, 1 / 3), np.zeros(3), 0.0
    for _ in range(rounds):
        column = np.argmin(weight @ gain)
        paid += weight @ gain[:, column]
        mean += weight / rounds
        weight = mixtures.exponentiated(
            weight, gain[:, column], float(np.sqrt(8 * np.log(3) / rounds))
        )
    bound = np.sqrt(np.log(3) / (2 * rounds))
    assert 0.5 - bound <= paid / rounds <= 0.5 + 1e-12
    assert (mean @ gain).min() >= 0.5 - bound  # the mean weights guarantee nearly the value
    assert np.abs(mean - solution).max() < 0.05


def test_exp3_regret_in_a_bandit_of_known_means():
    """Auer et al., theorem 3.1: regret at most (e - 1) g G + K ln K / g for exploration g."""
    rng = np.random.default_rng(0)
    means, K, rounds = np.array([0.2, 0.5, 0.8, 0.4]), 4, 2000
    explore = float(np.sqrt(K * np.log(K) / ((np.e - 1) * 0.8 * rounds)))
    config = mixtures.Exp3Config(scale=1.0, smoothing=explore, rate=explore / K)
    state, earned = mixtures.start(EVEN), 0.0
    for _ in range(rounds):
        arm = rng.choice(K, p=state.weight)
        paid = float(rng.random() < means[arm])
        earned += paid
        drawn = np.eye(K)[arm]
        state = mixtures.update(config, state, drawn * paid, drawn, state.weight)
    regret = means.max() * rounds - earned
    bound = (np.e - 1) * explore * means.max() * rounds + K * np.log(K) / explore
    noise = 3 * np.sqrt(0.25 * rounds)
    assert regret < bound + noise
    assert state.weight.argmax() == 2
    # an estimate is right in the mean over draws, also of arms that are hardly drawn
    weight, mean = np.array([0.01, 0.09, 0.6, 0.3]), np.zeros(4)
    for arm, drawn in enumerate(np.eye(4)):
        after = mixtures.update(config, mixtures.start(EVEN), drawn * means, drawn, weight)
        mean += weight[arm] * after.score
    np.testing.assert_allclose(mean, means, rtol=1e-12)


@pytest.mark.parametrize(("floor", "size", "power"), [(1.5, 30.0, 0.4), (0.0, 9.0, 0.1)])
def test_a_law_is_found_again(floor, size, power):
    n = np.geomspace(1e5, 1e7, 40)
    found = curves.law(n, floor + size * n**-power, np.ones(40))
    np.testing.assert_allclose(found, (floor, size, power), rtol=1e-6, atol=1e-9)
    # of an exponent between two of the grid: the speed at the end, which is what is used
    _, b, a = curves.law(n, floor + size * n ** -(power + 0.004), np.ones(40))
    speed = (power + 0.004) * size * n[-1] ** -(power + 0.004)
    assert a * b * n[-1] ** -a == pytest.approx(speed, rel=0.02)
    assert curves.law(n, np.linspace(1, 2, 40), np.ones(40))[1] == 0  # a rising curve is flat


def test_ado_prefers_by_the_speed_of_known_laws():
    """Noiseless laws of the run's tokens: weights end at prior x share^credit x a (L - E)."""
    per_step, steps = 1024.0, 1200
    config = mixtures.AdoConfig(first=50, every=25, pace=0.2, smoothing=1e-6)
    state, n = mixtures.start(EVEN), 0.0
    for _ in range(steps):
        n += per_step
        tokens = state.weight * per_step
        nats = (FLOOR + SIZE * n**-POWER) * tokens
        state = mixtures.update(config, state, nats, tokens, state.weight)
    speed = POWER * SIZE * n**-POWER
    wanted = speed**2 / (speed**2).sum()  # share ~ share^(1/2) x speed: share ~ speed^2
    np.testing.assert_allclose(state.weight, wanted, rtol=0.15)
    assert len(state.curve) <= curves.POINTS
    np.testing.assert_allclose(
        state.curve[:, 5:].sum() + 50 * per_step, steps * per_step, rtol=1e-12
    )


@pytest.mark.parametrize("kind", sorted(set(mixtures.TABLE) - {"none"}))
def test_every_kind(kind):
    """Weights stay weights, a domain without text keeps what is known, states survive JSON."""
    more = {"reference": "elsewhere"} if kind == "doremi" else {}
    more |= {"first": 3, "every": 2} if kind == "ado" else {}
    config = mixtures.TABLE[kind].Config(**more)
    rng = np.random.default_rng(0)
    state = mixtures.start(mixtures.weights(config, ("a", "b", "c", "d")), REFERENCE)
    decided = []
    for step in range(40):
        tokens = rng.integers(1, 50, 4).astype(np.float64)
        tokens[rng.integers(4)] = 0
        tokens[3] *= step > 5  # not seen at first
        worth = np.sin(step + np.arange(4))  # read by doge alone
        nats = tokens * rng.uniform(1, 3, 4)
        state = mixtures.update(config, state, nats, tokens, state.weight, worth)
        decided.append(state.weight)
        again = mixtures.from_plain(json.loads(json.dumps(mixtures.to_plain(state))))
        for field, a, b in zip(mixtures.State._fields, state, again, strict=True):
            np.testing.assert_array_equal(a, b, field)
        assert np.isfinite(state.weight).all()
        assert state.weight.sum() == pytest.approx(1, abs=1e-12)
        if kind != "fixed":
            assert state.weight.min() >= 0.999 * config.smoothing / 4
    np.testing.assert_allclose(state.mean, np.mean(decided, axis=0), rtol=1e-12)
    assert (np.ptp(decided, axis=0).max() > 1e-3) == (kind != "fixed")


def test_errors():
    for text, message in [
        ("a=0.5,b=0.4", "weights: must sum to 1, 'a=0.5,b=0.4' sums to 0.9"),
        ("a=half", "weights: 'a=half' is not DOMAIN=WEIGHT with a weight in [0, 1]"),
        ("a=0.5,a=0.5", "weights: 'a' is named twice"),
        ("a=-1,b=2", "weights: 'a=-1' is not DOMAIN=WEIGHT with a weight in [0, 1]"),
    ]:
        with pytest.raises(ValueError) as e:
            mixtures.FixedConfig(weights=text)
        assert str(e.value) == message
    with pytest.raises(ValueError, match="weights: the text has no domain 'c'; known are a, b"):
        mixtures.weights(mixtures.FixedConfig(weights="a=0.5,c=0.5"), ("a", "b"))
    with pytest.raises(ValueError, match="weights: domain 'b' has none, which no hedge can raise"):
        mixtures.weights(mixtures.HedgeConfig(weights="a=1"), ("a", "b"))
    with pytest.raises(ValueError, match="reference: needs the workdir"):
        mixtures.DoremiConfig()
    fixed = mixtures.weights(mixtures.FixedConfig(weights="b=0.25,a=0.75"), ("a", "b", "c"))
    np.testing.assert_array_equal(fixed, [0.75, 0.25, 0])


def test_doge_follows_credit_and_only_where_it_was_measured():
    """Two measured steps of four: weights are the start's times exp(rate x sum of gains)."""
    config = mixtures.DogeConfig(rate=0.5, smoothing=1e-12)
    state = mixtures.start(EVEN)
    worth = [np.array([3.0, -6.0, 0.0, 1.5]), np.array([1e-9, 0.0, np.nan, -2e-9])]
    for told in (worth[0], None, np.full(4, np.nan), worth[1]):
        state = mixtures.update(config, state, np.ones(4), np.ones(4), EVEN, told)
    # the second time the third domain was not there, and keeps its gain of the first: 0
    gains = np.array([0.5, -1.0, 0.0, 0.25]) + np.array([0.5, 0.0, 0.0, -1.0])
    wanted = np.exp(0.5 * gains)
    np.testing.assert_allclose(state.weight, wanted / wanted.sum(), rtol=1e-9)
    assert state.updates == 4
