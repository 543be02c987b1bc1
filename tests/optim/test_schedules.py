"""Schedules against their closed forms, in tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_pretrain.optim import schedules

TOTAL, STEP = 100_000, 1_000  # 100 steps


def rates(**kwargs):
    config = schedules.Config(**kwargs)
    f = schedules.make(config, peak=2e-3, total_tokens=TOTAL, tokens_per_step=STEP)
    return np.asarray(jax.vmap(f)(jnp.arange(101))) / 2e-3


@pytest.mark.parametrize("warmup", [10_000, 0.1])
@pytest.mark.parametrize("decay", [20_000, 0.2])
@pytest.mark.parametrize("shape", schedules.SHAPES)
def test_wsd(warmup, decay, shape):
    got = rates(kind="wsd", warmup=warmup, decay=decay, shape=shape, final=0.1)
    falling = {
        "linear": lambda d: 1 - d,
        "1-sqrt": lambda d: 1 - math.sqrt(d),
        "cosine": lambda d: (1 + math.cos(math.pi * d)) / 2,
    }[shape]
    for n in range(101):
        if n < 10:
            want = (n + 1) / 10
        elif n <= 80:
            want = 1.0
        else:
            want = 0.1 + 0.9 * falling((n - 80) / 20)
        assert got[n] == pytest.approx(want, abs=2e-6), n


def test_cosine():
    got = rates(kind="cosine", warmup=0.2, final=0.1)
    for n in range(20, 101):
        want = 0.1 + 0.45 * (1 + math.cos(math.pi * (n - 20) / 80))
        assert got[n] == pytest.approx(want, abs=2e-6)
    assert got[19] == 1.0


def test_constant_ignores_decay():
    np.testing.assert_array_equal(rates(kind="constant", warmup=0, decay=0.9), 1.0)


def test_no_warmup_starts_at_the_peak_and_no_decay_ends_there():
    np.testing.assert_array_equal(rates(kind="wsd", warmup=0, decay=0), 1.0)


def test_the_last_step_still_learns():
    got = rates(kind="wsd", warmup=0, decay=0.5, shape="linear", final=0.0)
    assert got[99] == pytest.approx(1 / 50, rel=1e-5)
    assert got[100] == 0.0


def test_steps_beyond_float32_tokens_stay_exact():
    config = schedules.Config(kind="wsd", warmup=0, decay=0.5, shape="linear")
    f = schedules.make(config, peak=1.0, total_tokens=8 * 10**12, tokens_per_step=4 * 10**6)
    assert float(f(jnp.int32(1_500_001))) == pytest.approx(1 - 500_001 / 1e6, abs=1e-7)


def test_refuses_warmup_and_decay_longer_than_the_run():
    config = schedules.Config(warmup=60_000, decay=0.5)
    with pytest.raises(ValueError, match=r"60000.*50000.*100000"):
        schedules.make(config, peak=1.0, total_tokens=TOTAL, tokens_per_step=STEP)


def test_refuses_fewer_tokens_than_a_step():
    config = schedules.Config(warmup=500)
    with pytest.raises(ValueError, match=r"warmup: 500 tokens.*1000"):
        schedules.make(config, peak=1.0, total_tokens=TOTAL, tokens_per_step=STEP)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "step"),
        ("shape", "quadratic"),
        ("warmup", -1.0),
        ("decay", math.nan),
        ("final", 1.5),
    ],
)
def test_refuses_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        schedules.Config(**{field: value})
