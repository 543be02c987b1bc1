"""Others' attention kernels behind our signature: what they refuse, and that masks carry over.

cuDNN itself needs a GPU; here the same call runs through its XLA form. Splash is interpreted.
"""

import functools

import jax
import numpy as np
import pytest

from kernels_pallas import device, numerics
from kernels_pallas.chips import CHIPS
from kernels_pallas.flash import explain, flash, peers, specs

TPU = device.Target("tpu", "interpreted", interpret=object())


def compare(attend, spec):
    """Values and gradients against the reference in float64."""
    arguments, keywords = spec.arguments()
    if spec.sinks:
        arguments = (*arguments, keywords.pop("sinks_H"))
    arguments = tuple(a.astype("float32") for a in arguments)

    def named(attend):
        def call(q, k, v, *sinks):
            more = {"sinks_H": sinks[0]} if sinks else {}
            return attend(q, k, v, **keywords, **more)

        return call

    o, pull = jax.vjp(named(attend), *arguments)
    d = jax.tree.map(lambda x: numerics.uniform_like(x, seed=3 + x.ndim), o)
    got = (*jax.tree.leaves(o), *pull(d))
    with jax.enable_x64(True):
        wide = tuple(np.asarray(a, np.float64) for a in arguments)
        o, pull = jax.vjp(named(functools.partial(flash, implementation="reference")), *wide)
        d = jax.tree.map(lambda x: np.asarray(x, np.float64), d)
        want = (*jax.tree.leaves(o), *pull(d))
    assert numerics.report(got, want, floor=0.1) is None


CUDNN = {
    "causal": specs.Spec(L=40, H=4, K=2, Dk=16, Dv=16),
    "window": specs.Spec(L=40, H=4, K=2, Dk=16, Dv=16, window=7),
    "full": specs.Spec(L=24, S=40, Dk=16, Dv=16, causal=False),
}


@pytest.mark.parametrize("name", CUDNN)
def test_cudnns_arguments_mean_what_ours_do(name):
    compare(functools.partial(peers.cudnn, implementation="xla"), CUDNN[name])


SPLASH = {
    "window": specs.Spec(B=1, L=128, S=256, H=2, K=1, Dk=16, Dv=16, window=100, softcap=2.0),
    "padded": specs.Spec(B=2, L=128, H=2, K=2, Dk=24, Dv=16, segments="padded"),
    "sinks": specs.Spec(B=2, L=128, H=4, K=2, Dk=16, Dv=16, window=40, sinks=True,
                        segments="packed"),
    "lse": specs.Spec(B=1, L=128, S=256, H=2, K=1, Dk=16, Dv=16, window=100, softcap=2.0, lse=True),
    "lse_of_sinks": specs.Spec(B=2, L=128, H=2, K=1, Dk=16, Dv=24, sinks=True, segments="padded",
                               lse=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLASH)
def test_splash(name):
    if SPLASH[name].lse and device.jax_version() < (0, 12):
        pytest.skip("splash's log-sum-exp needs jax 0.12")
    with device.assume(TPU):
        compare(functools.partial(flash, implementation="splash"), SPLASH[name])


REFUSED = [
    ("cudnn", "v6e", {}, "needs an NVIDIA GPU"),
    ("cudnn", "h200", {"dtype": "float32"}, "q is float32"),
    ("cudnn", "h200", {"Dk": 48}, "Dk is 48 and Dv 32"),
    ("cudnn", "h200", {"S": 80}, "needs L = S, got 64 and 80"),
    ("cudnn", "h200", {"segments": "packed"}, "no segments_q"),
    ("cudnn", "h200", {"lse": True}, "no return_lse"),
    ("splash", "h200", {}, "needs a TPU"),
    ("splash", "v6e", {"L": 64}, "got 64 and 64"),
    ("splash", "v6e", {"L": 256, "S": 128}, "L is 256 and S 128"),
    ("splash", "v6e", {"L": 128, "S": 128, "stride": 4, "span": 4}, "no stride"),
]


@pytest.mark.parametrize(("backend", "chip", "changes", "reason"), REFUSED)
def test_what_they_do_not_do_is_refused(backend, chip, changes, reason, monkeypatch):
    monkeypatch.setattr(peers, "_has_cudnn", lambda: True)
    spec = specs.Spec(**{"dtype": "bfloat16"} | changes)
    arguments, keywords = spec.arguments()
    with device.assume(CHIPS[chip].target):
        assert reason in explain(*arguments, **keywords)[backend]
        plain, more = specs.Spec(L=128, dtype="bfloat16").arguments()
        served = explain(*plain, **more)
        assert served["cudnn" if chip == "h200" else "splash"] is None
        assert next(iter(served)) == "xla"  # they are never taken unasked
        assert served["xla"] is None


@pytest.mark.parametrize("first", [0, 1, 64])
def test_a_part_of_a_row_is_refused(first):
    arguments, keywords = specs.Spec(L=128, dtype="bfloat16").arguments()
    with device.assume(CHIPS["v6e"].target):
        verdict = explain(*arguments, first=first, **keywords)["splash"]
    assert verdict == "splash has no first"


def test_cudnn_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(peers, "_has_cudnn", lambda: False)
    arguments, keywords = specs.Spec(dtype="bfloat16").arguments()
    with device.assume(CHIPS["h200"].target):
        assert explain(*arguments, **keywords)["cudnn"] == "cuDNN is not installed"
