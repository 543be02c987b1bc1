"""Domain games: what share of the training rows each domain of the text gets, decided step by step.

One player chooses the weights of the domains, the other is the model, which trains on rows drawn by
them. After every step the chooser is told each domain's loss and plays again:

    hedge   grows weights by the loss: the adversary of group DRO
    doremi  by max(loss - reference, 0): by what a reference run shows can still be learned
    exp3    by loss / weight of what was drawn: a bandit that knows only what it played
    ado     gives most where a scaling law, fitted as training goes, says the loss falls fastest
    doge    grows weights by the credit of a domain's tokens (games/shapley.py), where measured
    fixed   stays

A solver is a pure function of a State and of one step's sums. Host code in float64: a game is a few
numbers per domain, and its weights decide the data, which is made on the host. Every process is
told the same sums of the whole batch and so decides the same.

Names: K domains, P points of their loss curves.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float64

from sparse_pretrain import sections, spec
from sparse_pretrain.games import curves
from sparse_pretrain.games.typed import named

PerDomain = Float64[np.ndarray, " K"]


class State(NamedTuple):
    """What a game carries from step to step.

    `weight` is the latest decision, `mean` the mean over all of them, `score` what the game
    remembers of a domain (its last gain; for exp3 the sum of its gains; for ado the smoothed
    weights), `tokens` the targets seen, `reference` the losses that doremi compares with, `curve`
    what ado fits: the step's number, then sums of nats and of targets.
    """

    updates: int
    weight: PerDomain
    mean: PerDomain
    prior: PerDomain
    score: PerDomain
    tokens: PerDomain
    reference: PerDomain
    curve: Float64[np.ndarray, "P W"]


def start(weight_K: PerDomain, reference_K: PerDomain | None = None) -> State:
    """The game before its first step."""
    zero, K = np.zeros_like(weight_K), len(weight_K)
    reference = zero if reference_K is None else reference_K
    curve = np.zeros((0, 1 + 2 * K))
    return State(0, weight_K, weight_K, weight_K, zero, zero, reference, curve)


def to_plain(state: State) -> dict[str, Any]:
    """The state as JSON data, which keeps every bit of it."""
    return {name: np.asarray(value).tolist() for name, value in state._asdict().items()}


def from_plain(values: dict[str, Any]) -> State:
    """The state that `to_plain` wrote."""
    arrays = {name: np.asarray(values[name], np.float64) for name in State._fields[1:]}
    curve = arrays.pop("curve").reshape(-1, 1 + 2 * len(values["weight"]))
    return State(**arrays, updates=values["updates"], curve=curve)


# --- the moves


def exponentiated(weight_K: PerDomain, gain_K: PerDomain, rate: float) -> PerDomain:
    """Weights times exp(rate x gain), normalised: one step of Hedge, mirror ascent under entropy.

    Source: Freund and Schapire 1997, for losses; 1911.08731, algorithm 1, for groups.
    """
    with np.errstate(divide="ignore"):  # a weight of 0 stays 0
        logit = np.log(weight_K) + rate * gain_K
    grown = np.exp(logit - logit.max())
    return grown / grown.sum()


def smoothed(weight_K: PerDomain, share: float) -> PerDomain:
    """The weights, a `share` of them dealt out evenly: no domain has less than share / K."""
    return (1 - share) * weight_K + share / len(weight_K)


def _latest(state: State, gain_K: PerDomain) -> PerDomain:
    """Each domain's last known gain; one that no batch has held yet counts as the mean of others.

    Source: the released trainer of 2305.10429 keeps the last score of a domain that a batch lacks.
    """
    known = state.tokens > 0
    gain_K = np.where(np.isnan(gain_K), state.score, gain_K)
    return np.where(known, gain_K, gain_K[known].mean()) if known.any() else gain_K


# --- the kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoConfig(spec.Config):
    """Rows in the order of the whole corpus, whatever their domains."""

    KIND: ClassVar[str] = "none"


class Nothing:
    """No mixture."""

    Config = NoConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedConfig(spec.Config):
    """Rows drawn by the same weights all along.

    `weights` is DOMAIN=WEIGHT,DOMAIN=WEIGHT..; a domain that is not named has none. Empty: even.
    """

    KIND: ClassVar[str] = "fixed"

    weights: str = ""

    def __post_init__(self):
        named(self.weights)


class Fixed:
    """The weights stay."""

    Config = FixedConfig

    @staticmethod
    def play(config: Any, state: State, loss_K, tokens_K, played_K) -> State:
        """The state as it is."""
        return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LearnedConfig(FixedConfig):
    """A game that starts from `weights` and whose decision takes effect `lag` steps later.

    `smoothing` is the share of the rows that is dealt out evenly.
    """

    smoothing: float = 1e-3
    lag: int = 4

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "lag")
        ok = 0 < self.smoothing <= 1
        spec.require(ok, f"smoothing: must be in (0, 1], got {self.smoothing}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HedgeConfig(_LearnedConfig):
    """Group DRO: weights grow with their domain's loss. Units: `rate` per nat and step."""

    KIND: ClassVar[str] = "hedge"

    rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "rate")


class Hedge:
    """Exponentiated gradient on each domain's loss.

    Source: 1911.08731, algorithm 1. Differs: weights draw the rows and do not weigh the loss.
    """

    Config = HedgeConfig

    @staticmethod
    def play(config: Any, state: State, loss_K, tokens_K, played_K) -> State:
        """One step of Hedge, then smoothing."""
        gain = _latest(state, loss_K)
        weight = smoothed(exponentiated(state.weight, gain, config.rate), config.smoothing)
        return state._replace(weight=weight, score=gain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoremiConfig(HedgeConfig):
    """DoReMi: weights grow with what a reference run of the same data shows can be learned yet.

    `reference` is the workdir of that run, finished. Units: `rate` per nat and step.
    """

    KIND: ClassVar[str] = "doremi"

    reference: str = ""
    rate: float = 1.0  # both constants: the paper's released scripts

    def __post_init__(self):
        super().__post_init__()
        spec.require(
            bool(self.reference), "reference: needs the workdir of a finished run to compare with"
        )


class Doremi:
    """Exponentiated gradient on excess losses, clipped at 0.

    Source: 2305.10429, algorithm 1. Differs: weights draw the rows and do not weigh the loss, and
    the reference is a loss per domain, held out, so that a domain's mean is clipped, not a token.
    """

    Config = DoremiConfig

    @staticmethod
    def play(config: Any, state: State, loss_K, tokens_K, played_K) -> State:
        """As Hedge, on the excess."""
        return Hedge.play(
            config, state, np.maximum(loss_K - state.reference, 0.0), tokens_K, played_K
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exp3Config(_LearnedConfig):
    """EXP3: a bandit paid by the loss of what it draws. Units: `scale` nats that pay 1."""

    KIND: ClassVar[str] = "exp3"

    rate: float = 0.01
    scale: float = 10.0
    smoothing: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "rate", "scale")


class Exp3:
    """Exponential weights on importance-weighted gains, and a share of even exploration.

    A domain's gain is its loss in units of `scale`, at most 1, times its share of the step's
    targets over the weight it was drawn by: right in the mean, also for domains not drawn.
    Source: Auer, Cesa-Bianchi, Freund and Schapire 2002, section 3; 2312.02406 for data.
    """

    Config = Exp3Config

    @staticmethod
    def play(config: Any, state: State, loss_K, tokens_K, played_K) -> State:
        """One round, of a batch of draws."""
        paid = np.clip(np.where(tokens_K > 0, loss_K, 0.0) / config.scale, 0.0, 1.0)
        drawn = tokens_K / max(float(tokens_K.sum()), 1.0)
        gain = drawn * paid / np.maximum(played_K, 1e-30)
        score = state.score + gain
        weight = smoothed(exponentiated(state.prior, score, config.rate), config.smoothing)
        return state._replace(weight=weight, score=score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdoConfig(_LearnedConfig):
    """ADO: rows go where a scaling law fitted in the run says that the loss falls fastest.

    Units: `first` updates before the first fit, whose curve is left out of all fits, and `every`
    updates from one fit to the next; `credit` the power of a domain's past share; `pace` the share
    of the new weights in each update.
    """

    KIND: ClassVar[str] = "ado"

    first: int = 100
    every: int = 50
    credit: float = 0.5
    pace: float = 0.1
    smoothing: float = 0.04

    def __post_init__(self):
        super().__post_init__()
        spec.positive(self, "first", "every")
        spec.require(self.credit >= 0, f"credit: must be 0 or more, got {self.credit}")
        spec.require(0 < self.pace <= 1, f"pace: must be in (0, 1], got {self.pace}")


class Ado:
    """Weights ~ prior x (past share)^credit x a (L - E), of each domain's own law L = E + B n^-a.

    The speed -dL/dn is a (L - E) / n, and n, the targets that the run has read, is common to all.
    Source: 2410.11820. Differs: least squares over a grid of exponents and a merged curve in place
    of Huber and L-BFGS; smoothing is even.
    """

    Config = AdoConfig

    @staticmethod
    def play(config: Any, state: State, loss_K, tokens_K, played_K) -> State:
        """Adds a point to the curves; moves towards what their fits prefer."""
        nats = np.where(tokens_K > 0, loss_K * tokens_K, 0.0)
        if state.updates > config.first:
            point = np.concatenate([[state.tokens.sum()], nats, tokens_K])
            state = state._replace(curve=curves.merged(np.concatenate([state.curve, point[None]])))
        if state.updates <= config.first or (state.updates - config.first) % config.every:
            return state
        past = state.score if state.score.any() else state.prior
        wanted = state.prior * past**config.credit * curves.speeds(state.curve)
        if not wanted.sum() > 0:  # nothing falls: nothing to prefer
            return state
        weight = (1 - config.pace) * state.weight + config.pace * wanted / wanted.sum()
        past = (1 - config.pace) * past + config.pace * weight
        return state._replace(weight=smoothed(weight, config.smoothing), score=past)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DogeConfig(HedgeConfig):
    """DoGE: weights grow with what a domain's tokens are worth to the target of `credit`.

    Units: `rate` per measured step, of the domain that is worth most, or does most harm.
    """

    KIND: ClassVar[str] = "doge"


class Doge:
    """Exponentiated gradient on credit per token, over the largest of its size.

    Source: 2310.15393, algorithm 1, with a target of its own as in its section 4.2.
    Differs: there the products of gradients are not scaled, and are taken of a batch per domain.
    """

    Config = DogeConfig

    @staticmethod
    def play(config: Any, state: State, worth_K, tokens_K, played_K) -> State:
        """As Hedge in a step that was measured; else the state as it is."""
        size = np.fmax.reduce(np.abs(worth_K), initial=0.0)  # NaN left out
        if not size > 0:
            return state
        return Hedge.play(config, state, worth_K / size, tokens_K, played_K)


TABLE: dict[str, Any] = {
    "none": Nothing,
    "fixed": Fixed,
    "hedge": Hedge,
    "doremi": Doremi,
    "exp3": Exp3,
    "ado": Ado,
    "doge": Doge,
}


def update(
    config: Any, state: State, nats_K: PerDomain, tokens_K: PerDomain, played_K: PerDomain,
    worth_K: PerDomain | None = None,
) -> State:  # fmt: skip
    """The game after a step whose batch, drawn by the weights `played_K`, had these sums.

    Units: nats and targets per domain, over the whole batch; `worth` credit per target, NaN or None
    where it was not measured.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        loss_K = np.where(tokens_K > 0, nats_K / tokens_K, np.nan)
    state = state._replace(updates=state.updates + 1, tokens=state.tokens + tokens_K)
    told_K = loss_K
    if config.KIND == "doge":
        told_K = np.full_like(loss_K, np.nan) if worth_K is None else worth_K
    state = TABLE[config.KIND].play(config, state, told_K, tokens_K, played_K)
    return state._replace(mean=state.mean + (state.weight - state.mean) / state.updates)


# --- weights that someone typed


def weights(config: Any, domains: tuple[str, ...]) -> PerDomain:
    """The weights that a game of these domains starts from.

    Errors: ValueError naming the domain that there is not, or that a learned mixture gives nothing.
    """
    K, given = len(domains), named(config.weights)
    for name in given:
        near = sections.nearest(name, domains)
        spec.require(name in domains, f"weights: the text has no domain {name!r}; {near}")
    if not given:
        return np.full(K, 1 / K)
    found = np.array([given.get(name, 0.0) for name in domains])
    for name, weight in zip(domains, found, strict=True):
        spec.require(
            bool(weight) or config.KIND == "fixed",
            f"weights: domain {name!r} has none, which no {config.KIND} can raise; name all of "
            f"{', '.join(domains)} or none",
        )
    return found / found.sum()
