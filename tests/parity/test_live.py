"""The same comparison with Hugging Face's model in this process, where it can be had."""

import numpy as np
import pytest

from tests.parity.cases import CASES

pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
pytestmark = pytest.mark.filterwarnings("default")  # their warnings are not ours to fix


@pytest.mark.parametrize("seed", [100])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_hugging_face(name, seed):
    from sparse_pretrain.interop import huggingface
    from tests.parity import hf, ours

    model, tokens = hf.draw(CASES[name], seed)
    _, masks_with_zero = hf.mask_matters(model, tokens)
    if masks_with_zero:
        pytest.skip("this transformers masks dropped groups with 0, where DeepSeek masks with -inf")
    weights = {k: v.detach().numpy() for k, v in hf.weights(model).items()}
    config = ours.model_config(CASES[name])
    params, prices = huggingface.from_hf(config, weights)
    found = ours.differences(ours.run(config, params, prices, tokens), hf.run(model, tokens))
    assert {k: v for k, v in found.items() if v > ours.TOLERANCE} == {}


@pytest.mark.parametrize("name", CASES)
def test_exported_config_and_weights_run_in_hugging_face(name):
    """Our own init, exported: their logits equal ours, nothing is missing and nothing left over."""
    import jax
    import torch
    import transformers

    from sparse_pretrain.interop import huggingface
    from sparse_pretrain.model import lm
    from tests.parity import hf, ours

    config = ours.model_config(CASES[name])
    params, prices = jax.jit(lm.define(config).init)(jax.random.key(7))
    rng = np.random.default_rng(7)
    prices = jax.tree.map(lambda x: rng.normal(-0.3, 0.3, x.shape).astype(np.float32), prices)
    fields = huggingface.to_hf_config(config, max_positions=64)
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **fields, attn_implementation="eager", experts_implementation="eager", use_cache=False
        )
    )
    exported = huggingface.to_hf(config, params, prices, fused=True)
    if config.tied:
        exported["lm_head.weight"] = exported["model.embed_tokens.weight"]
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in exported.items()})
    tokens = rng.integers(0, config.vocab, (2, 33), dtype=np.int32)
    result = hf.run(theirs, tokens)
    if result["margin"] < hf.MARGIN:
        pytest.skip(f"a near tie in the routing: {result['margin']:.1e}")
    found = ours.relative(ours.run(config, params, prices, tokens)["logits"], result["logits"])
    assert found < ours.TOLERANCE
