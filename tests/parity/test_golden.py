"""Our MLA and MoE against numbers that Hugging Face computed (golden/, made by make_golden.py)."""

import jax
import numpy as np
import pytest

from sparse_pretrain.interop import huggingface
from tests.parity import ours
from tests.parity.cases import CASES


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        *((name, True) for name in CASES),
        # that unrolled layers are scanned ones: tests/model/test_lm.py
        pytest.param("moe", False, marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_equal_hugging_face(name, scan):
    about, tokens, weights, theirs = ours.golden(name)
    assert about["config"] == CASES[name], "cases.py changed: run make_golden.py"
    config = ours.model_config(CASES[name], scan=scan)
    params, prices = huggingface.from_hf(config, weights)
    found = ours.differences(ours.run(config, params, prices, tokens), theirs)
    assert {k: v for k, v in found.items() if v > ours.TOLERANCE} == {}


def test_golden_cases_would_show_the_usual_mistakes():
    """Biases of both signs, some group dropped that a mask of 0 would let in, norms not 1."""
    about, _, weights, _ = ours.golden("moe_groups")
    assert about["mask_matters"] > 0.1
    bias = weights["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.min() < 0 < bias.max()
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            assert np.std(value.astype(np.float32)) > 0.1, name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fused", [True, False])
def test_weights_survive_the_round_trip(name, fused):
    _, _, weights, _ = ours.golden(name)
    config = ours.model_config(CASES[name])
    params, prices = huggingface.from_hf(config, weights)
    back = huggingface.to_hf(config, params, prices, fused=fused)
    if fused:
        assert set(back) == set(weights)
        for key, value in weights.items():
            np.testing.assert_array_equal(back[key], value.astype(np.float32), err_msg=key)
    again = huggingface.from_hf(config, back)
    jax.tree.map(np.testing.assert_array_equal, again, (params, prices))
