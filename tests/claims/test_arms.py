"""What trains the small models of claims: the search for a rate, and GPT-2's side."""

import jax
import numpy as np
import pytest

from sparse_pretrain.claims import arms, bench, gpt2
from sparse_pretrain.shapes import Batch

SIZES = {"vocab": 11, "length": 8, "width": 8, "layers": 2}


class Fake:
    """An arm whose loss is the distance of log2(rate) from `best`."""

    def __init__(self, label, best):
        self.label, self.best, self.asked = label, best, []

    def run(self, place, seed, *, rate):
        del place
        self.asked.append((seed, rate))
        return {"loss": abs(np.log2(rate) - self.best)}


def test_the_search_goes_on_until_every_best_rate_is_inside(tmp_path):
    a, b = Fake("a", 3), Fake("b", 0)
    best, swept, inside = arms.tuned(bench.Bench(tmp_path), [a, b], [(0.5, 1.0, 2.0)] * 2)
    assert (best, inside) == ([8.0, 1.0], True)
    assert list(swept["a"]) == ["0.5", "1", "2", "4", "8", "16"]
    assert len(swept["b"]) == len(swept["a"])  # the same number of trials
    assert {seed for seed, _ in a.asked} == {100}


def test_the_search_gives_up_and_says_so(tmp_path):
    best, swept, inside = arms.tuned(
        bench.Bench(tmp_path), [Fake("a", -9)], [(0.5, 1.0, 2.0)], most=2
    )
    assert (best, inside, len(swept["a"])) == ([0.125], False, 5)


def test_gpt2_has_the_released_number_of_parameters():
    shape = jax.eval_shape(
        lambda key: gpt2.init(key, vocab=50257, length=1024, width=768, layers=12),
        jax.random.key(0),
    )
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shape)) == 124_439_808


def test_gpt2_does_not_look_ahead():
    params = gpt2.init(jax.random.key(0), **SIZES)
    params = jax.tree.map(lambda x: 10.0 * x, params)
    tokens = np.arange(8, dtype=np.int32)[None]
    later = tokens.copy()
    later[0, 5:] = 0
    a, b = (gpt2.logits(params, t, 2) for t in (tokens, later))
    np.testing.assert_allclose(a[:, :5], b[:, :5], rtol=1e-6)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_gpt2_rate_rises_and_falls_to_a_tenth():
    shares = [gpt2.cosine(n, 100) for n in range(1, 101)]
    assert shares[0] == 0.2
    assert max(shares) == shares[4] == 1.0
    assert shares[-1] == pytest.approx(0.1)
    assert sorted(shares[4:], reverse=True) == shares[4:]


def test_gpt2_learns_a_constant_and_is_kept(tmp_path):
    ones = np.ones((2, 8), np.int32)
    batch = Batch(ones, ones, ones, ones, ones.astype(np.float32), ones, ones)

    def train(seed):
        del seed
        while True:
            yield batch

    facts = {"source": "ones", "seq": 8, "batch": 2}
    task = arms.Task(name="ones", vocab=11, train=train, heldout=lambda: [batch], facts=facts)
    arm = gpt2.Arm("g", task, steps=40, width=8, layers=1, heads=2)
    place = bench.Bench(tmp_path, say=lambda _: None)
    found = arm.run(place, 0, rate=0.1)
    assert found["losses"][0] == pytest.approx(np.log(11), rel=0.1)
    assert found["loss"] < 0.1
    assert arm.run(place, 0, rate=0.1) == found
    # 24 D^2 a layer, 2 D V for the head, and the causal half of the scores and their mix
    forward = 24 * 8**2 + 2 * 8 * 11 + 2 * 2 * 8 * 4.5
    assert arm.flops == 40 * 16 * 3 * forward
