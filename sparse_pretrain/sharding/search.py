"""Placements for a schedule that is to come: copies where a linear program can use them.

EPLB evens the loads it has seen, for copies that share evenly. Where tokens are split per batch,
what counts is whether the loads to come can be evened over the copies: their devices have to reach
one another. Host code in numpy.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from sparse_pretrain.sharding import schedule

ROUNDS, FUTURES, SWEEPS = 600, 32, 40  # fewer futures fit themselves: see placement_grid
LEAST_CHANGE = 0.05  # of an expert's load between windows, where less was seen


def futures(
    seen_WxE: Num[np.ndarray, "W E"], count: int = FUTURES, *, seed: int = 0
) -> Float[np.ndarray, "K E"]:
    """Loads that may come after those seen: their mean, each expert changed as much as they were.

    The change is lognormal; its size is what the two halves of the window differ by, times sqrt(2)
    for twice the time, and no less than LEAST_CHANGE.
    """
    rng = np.random.default_rng(seed)
    mean = seen_WxE.mean(0)
    half = len(seen_WxE) // 2
    size = LEAST_CHANGE
    if half:
        early, late = seen_WxE[:half].mean(0), seen_WxE[-half:].mean(0)
        both = (early > 0) & (late > 0)
        weight = np.where(both, mean, 0.0)
        if weight.any():
            change = np.log(late, where=both, out=np.zeros(len(mean)))
            change -= np.log(early, where=both, out=np.zeros(len(mean)))
            size = max(size, float(np.sqrt(2 * np.average(change**2, weights=weight))))
    load = mean * np.exp(size * rng.normal(size=(count, len(mean))))
    load += 1e-9 + 1e-3 * mean.mean()  # an expert without tokens may get some
    return load / load.sum(1, keepdims=True)


def balanced(
    load_KxE: Float[np.ndarray, "K E"],
    holds: Int[np.ndarray, "E D"],
    price_KxD: Float[np.ndarray, "K D"],
    sweeps: int = SWEEPS,
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K D"], Float[np.ndarray, "K D"]]:
    """(max over mean, loads of devices, prices) when copies share by the prices of their devices.

    A copy takes its expert's tokens in proportion to exp(-price); a price moves with the load of
    its device. This is dual ascent on the linear program of `schedule`, smoothed by entropy: the
    first result is never below its optimum.
    Shapes: K samples of loads at once.
    """
    devices = holds.shape[1]
    here = (holds > 0).astype(np.float64)
    several = here.sum(1) > 1
    unit = devices / load_KxE.sum(1, keepdims=True)
    fixed = (load_KxE[:, ~several] @ here[~several]) * unit
    split, copies = load_KxE[:, several] * unit, here[several]
    best, best_load = np.full(len(load_KxE), np.inf), fixed
    best_price = price_KxD
    for sweep in range(sweeps):
        weight = np.exp(-price_KxD)
        load = fixed + weight * ((split / (weight @ copies.T)) @ copies)
        top = load.max(1)
        if (top < best).any():
            better = (top < best)[:, None]
            best = np.minimum(best, top)
            best_load = np.where(better, load, best_load)
            best_price = np.where(better, price_KxD, best_price)
        price_KxD = price_KxD + (load - 1) / (1 + 0.1 * sweep)
        price_KxD = price_KxD - price_KxD.mean(1, keepdims=True)
    return best, best_load, best_price


def improve(
    phy2log: Int[np.ndarray, " R"],
    load_KxE: Float[np.ndarray, "K E"],
    devices: int,
    *,
    nodes: int = 1,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Int[np.ndarray, " R"]:
    """A placement that evens the loads of all samples better, by local search from a given one.

    A step swaps two experts, or turns a copy into one of another expert, between a device that is
    full in some sample and one that is not, on the same node. It is kept when the mean over samples
    of `balanced` falls. Seeded: the same arguments give the same placement.
    Errors: ValueError when slots do not divide by devices.
    """
    rng = np.random.default_rng(seed)
    experts = load_KxE.shape[1]
    slots = phy2log.reshape(devices, -1).copy()
    holds = schedule.held(phy2log, experts, devices)
    node = np.arange(devices) * nodes // devices
    typical = load_KxE.mean(0) + 1e-12  # a share, so that nothing has no weight
    best, load, price = balanced(load_KxE, holds, np.zeros((len(load_KxE), devices)), 4 * SWEEPS)
    for _ in range(rounds):
        if best.mean() < 1.0005:
            break
        sample = int(rng.integers(len(load)))
        hot = int(np.argmax(load[sample] + 0.02 * rng.random(devices)))
        near = (node == node[hot]) & (np.arange(devices) != hot)
        if not near.any():
            break
        cold = int(np.argmin(np.where(near, load[sample] + 0.1 * rng.random(devices), np.inf)))
        change = _propose(rng, slots, holds, hot, cold, typical)
        if change is None:
            continue
        for device, place, expert in change:
            holds[slots[device, place], device] -= 1
            holds[expert, device] += 1
        got = balanced(load_KxE, holds, price)
        if got[0].mean() < best.mean() - 1e-6:
            best, load, price = got
            for device, place, expert in change:
                slots[device, place] = expert
        else:
            for device, place, expert in change:
                holds[slots[device, place], device] += 1
                holds[expert, device] -= 1
    return slots.ravel()


def _propose(rng, slots, holds, hot, cold, typical):
    """[(device, place, expert)] that relieve `hot`, or None where nothing fits."""
    given = [p for p, e in enumerate(slots[hot]) if not holds[e, cold]]
    if not given:
        return None
    weight = typical[slots[hot, given]]
    place = given[int(rng.choice(len(given), p=weight / weight.sum()))]
    expert = slots[hot, place]
    if rng.random() < 0.5:  # a further copy, in the place of one that is not the last
        spare = [p for p, e in enumerate(slots[cold]) if holds[e].sum() > 1]
        if spare:
            return [(cold, int(rng.choice(spare)), expert)]
    taken = [
        p for p, e in enumerate(slots[cold]) if not holds[e, hot] and typical[e] < typical[expert]
    ]
    if not taken:
        return None
    other = int(rng.choice(taken))
    return [(cold, other, expert), (hot, place, slots[cold, other])]
