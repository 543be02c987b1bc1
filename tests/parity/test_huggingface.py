"""What the door to Hugging Face takes, gives and refuses; no peer needed."""

import dataclasses

import jax
import numpy as np
import pytest

from sparse_pretrain.attention import full
from sparse_pretrain.interop import huggingface
from sparse_pretrain.model import lm, mtp
from tests.parity import ours
from tests.parity.cases import CASES

MOE = CASES["moe"]


@pytest.fixture
def held():
    config = ours.model_config(MOE)
    params, prices = huggingface.from_hf(config, ours.golden("moe")[2])
    return config, huggingface.to_hf(config, params, prices)


@pytest.mark.parametrize("name", CASES)
def test_config_survives_the_round_trip(name):
    config = huggingface.from_hf_config(CASES[name])
    fields = huggingface.to_hf_config(config, max_positions=64)
    assert huggingface.from_hf_config(fields) == config
    unused = {"moe_intermediate_size", "n_routed_experts", "n_shared_experts", "topk_group"}
    unused |= {"num_experts_per_tok", "n_group", "intermediate_size"}
    for key, value in CASES[name].items():
        if key not in unused:
            assert fields[key] == value, key


def test_deepseek_v3_itself_is_671b_parameters():
    """The released config.json, in transformers 4's form but unquantised; 37B active."""
    config = huggingface.from_hf_config(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }
    )
    shapes = jax.tree.leaves(lm.define(config).shapes)
    assert sum(np.prod(x.shape, dtype=np.int64) for x in shapes) / 1e9 == pytest.approx(671.0, 1e-3)
    assert config.blocks["moe"].attention.rope.factor == 40


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("num_key_value_heads", 1),
        ("scoring_func", "softmax"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("kv_lora_rank", None),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_config_we_cannot_run_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        huggingface.from_hf_config({**MOE, field: value})


def test_yarn_with_two_mscales_is_refused():
    rope = {**CASES["mla_yarn"]["rope_parameters"], "mscale": 0.7}
    with pytest.raises(ValueError, match=r"mscale: .* 0\.7 and 1\.0"):
        huggingface.from_hf_config({**CASES["mla_yarn"], "rope_parameters": rope})


def test_models_they_lack_are_not_exported():
    config = ours.model_config(MOE)
    with pytest.raises(ValueError, match=r"^softcap"):
        huggingface.to_hf_config(dataclasses.replace(config, softcap=30.0))
    with pytest.raises(ValueError, match=r"^vocab"):
        huggingface.to_hf_config(dataclasses.replace(config, vocab=0))
    other = dataclasses.replace(config.blocks["moe"], attention=full.Config())
    blocks = {**config.blocks, "moe": other}
    with pytest.raises(ValueError, match=r"attention.kind: .* layer 1 has full"):
        huggingface.to_hf_config(dataclasses.replace(config, blocks=blocks))
    late = dataclasses.replace(config, prefix=("moe",), pattern=("dense",), repeats=2)
    with pytest.raises(ValueError, match=r"^ffn: layer 1"):
        huggingface.to_hf_config(late)


def test_absent_extra_and_misshapen_weights_are_named(held):
    config, weights = held
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(ValueError, match=rf"^{name}: .* does not hold"):
        huggingface.from_hf(config, {k: v for k, v in weights.items() if k != name})
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    with pytest.raises(ValueError, match=rf"^{name}: .* does not hold"):
        huggingface.from_hf(config, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.q_proj.bias"):
        huggingface.from_hf(config, {**weights, "model.layers.0.self_attn.q_proj.bias": 0})
    name = "model.norm.weight"
    with pytest.raises(ValueError, match=r"shape \(32,\), .* \(33,\)"):
        huggingface.from_hf(config, {**weights, name: np.ones(33, np.float32)})


def test_mtp_layers_and_rotary_buffers_are_left_out(held):
    config, weights = held
    more = {"model.layers.3.eh_proj.weight": 0, "model.rotary_emb.inv_freq": 0}
    huggingface.from_hf(config, {**weights, **more})


def test_mtp_layers_come_with_their_halves_in_place_and_share_the_trunks_ends(held):
    """Theirs multiplies [embedding; hidden]: the checkpoint's order, not the paper's."""
    config, weights = held
    config = dataclasses.replace(config, mtp=mtp.Config(depth=1))
    layer, last = "model.layers.3.", "model.layers.2."
    rng = np.random.default_rng(2)
    more = {layer + k.removeprefix(last): v for k, v in weights.items() if k.startswith(last)}
    more |= {
        layer + f"{name}.weight": rng.normal(size=32).astype(np.float32)
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    e, h = rng.normal(size=(2, 32)).astype(np.float32)
    more[layer + "eh_proj.weight"] = join = rng.normal(size=(32, 64)).astype(np.float32)
    more[layer + "embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    more[layer + "shared_head.head.weight"] = weights["lm_head.weight"]
    params, prices = huggingface.from_hf(config, weights | more)
    ours = np.concatenate([h, e]) @ params["mtp_0"]["w_join"]
    np.testing.assert_allclose(ours, join @ np.concatenate([e, h]), rtol=1e-4)
    back = huggingface.to_hf(config, params, prices)
    assert back.keys() == (weights | more).keys()
    for name, value in (weights | more).items():
        np.testing.assert_array_equal(back[name], value)
    assert huggingface.to_hf_config(config)["num_nextn_predict_layers"] == 1
    name = layer + "embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"^{name}: differs from model.embed_tokens"):
        huggingface.from_hf(config, weights | more | {name: 2 * more[name]})
