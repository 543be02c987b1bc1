"""Hugging Face `deepseek_v3` configurations, to and from our model's."""

from collections.abc import Mapping
from typing import Any

from sparse_pretrain import spec
from sparse_pretrain.attention import mla
from sparse_pretrain.model import block, ffn, layers, lm
from sparse_pretrain.routing import moe, sigmoid_bias

MODEL_TYPE = "deepseek_v3"
LATENT_EPS = 1e-6  # Hugging Face builds q_a_layernorm and kv_a_layernorm with their default


def from_hf_config(fields: Mapping[str, Any], **changes: Any) -> lm.Config:
    """The model of a `deepseek_v3` config.json; `changes` are fields of lm.Config, such as dtype.

    Errors: ValueError naming the field whose value we cannot run.
    Differs: what only training needs (the bias's rate, the balance loss) is not in the file and
    takes our defaults; MTP layers are left out unless `changes` have `mtp`.
    """
    get = dict(fields).get
    _only(fields, "model_type", MODEL_TYPE)
    _only(fields, "hidden_act", "silu")
    _only(fields, "attention_bias", False)
    _only(fields, "scoring_func", "sigmoid")
    _only(fields, "topk_method", "noaux_tc")
    _only(fields, "moe_layer_freq", 1)
    _only(fields, "quantization_config", None)
    total = _need(fields, "num_hidden_layers")
    dense = min(_need(fields, "first_k_dense_replace"), total)
    heads = _need(fields, "num_attention_heads")
    _only(fields, "num_key_value_heads", heads)
    attention = mla.Config(
        heads=heads,
        q_rank=get("q_lora_rank") or 0,
        kv_rank=_need(fields, "kv_lora_rank"),
        nope_dim=_need(fields, "qk_nope_head_dim"),
        rope_dim=_need(fields, "qk_rope_head_dim"),
        v_dim=_need(fields, "v_head_dim"),
        norm_eps=LATENT_EPS,
        rope=_rope_from(fields),
    )
    blocks, prefix, pattern, repeats = {}, (), ("dense",), total
    if dense:
        hidden = _need(fields, "intermediate_size")
        blocks["dense"] = block.Config(attention=attention, ffn=ffn.DenseConfig(hidden=hidden))
    if dense < total:
        prefix, pattern, repeats = ("dense",) * dense, ("moe",), total - dense
        router = sigmoid_bias.Config(
            scale=float(get("routed_scaling_factor", 1.0)),
            normalise=bool(get("norm_topk_prob", True)),
            groups=get("n_group") or 1,
            groups_kept=get("topk_group") or 1,
        )
        experts = moe.Config(
            experts=_need(fields, "n_routed_experts"),
            top_k=_need(fields, "num_experts_per_tok"),
            hidden=_need(fields, "moe_intermediate_size"),
            shared=get("n_shared_experts") or 0,
            router=router,
        )
        blocks["moe"] = block.Config(attention=attention, ffn=experts)
    return lm.Config(
        **{
            "width": _need(fields, "hidden_size"),
            "vocab": _need(fields, "vocab_size"),
            "blocks": blocks,
            "prefix": prefix,
            "pattern": pattern,
            "repeats": repeats,
            "tied": bool(get("tie_word_embeddings", False)),
            "norm_eps": float(get("rms_norm_eps", 1e-6)),
        }
        | changes
    )


def to_hf_config(config: lm.Config, *, max_positions: int = 4096) -> dict[str, Any]:
    """The config.json under which Hugging Face runs our model's weights.

    Units: `max_positions` tokens, for models without YaRN, whose reach it is.
    Errors: ValueError naming the field that `deepseek_v3` has no counterpart of.
    """
    spec.require(config.vocab > 0, f"vocab: must be the tokenizer's, got {config.vocab}")
    spec.require(not config.softcap, f"softcap: {MODEL_TYPE} has none, got {config.softcap}")
    memories = config.memory.layers
    spec.require(not memories, f"memory.layers: {MODEL_TYPE} has none, got {memories}")
    sections = config.layer_list
    dense = next((i for i, s in enumerate(sections) if s.ffn.KIND != "dense"), len(sections))
    attention = sections[0].attention
    for i, section in enumerate(sections):
        kind = section.attention.KIND
        spec.require(kind == "mla", f"attention.kind: {MODEL_TYPE} has mla, layer {i} has {kind}")
        spec.require(section.attention == attention, f"attention: layer {i} differs from layer 0")
        spec.require(
            section.ffn == sections[0 if i < dense else dense].ffn,
            f"ffn: layer {i} differs from those before it; {MODEL_TYPE} has equal dense layers "
            "and then equal mixtures of experts",
        )
    same = all(section == sections[-1] for section in config.mtp_list)
    spec.require(same, f"mtp.block: {config.mtp_block!r} is not the last layer's type")
    spec.require(
        not attention.softcap, f"attention.softcap: {MODEL_TYPE} has none, got {attention.softcap}"
    )
    spec.require(
        attention.norm_eps == LATENT_EPS,
        f"attention.norm_eps: {MODEL_TYPE} has {LATENT_EPS}, got {attention.norm_eps}",
    )
    fields = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(sections),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_rank or None,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "rope_interleave": attention.rope.interleaved,
        "rope_parameters": _rope_to(attention.rope),
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "first_k_dense_replace": dense,
        "num_nextn_predict_layers": config.mtp.depth,
    }
    if attention.rope.factor > 1:
        fields["max_position_embeddings"] = int(attention.rope.original * attention.rope.factor)
    if dense:
        fields["intermediate_size"] = sections[0].ffn.hidden
    if dense < len(sections):
        experts = sections[dense].ffn
        router = experts.router
        spec.require(
            not experts.copies, f"ffn.copies: {MODEL_TYPE} has none, got {experts.copies}"
        )
        spec.require(
            router.KIND == sigmoid_bias.Config.KIND,
            f"ffn.router.kind: {MODEL_TYPE} has {sigmoid_bias.Config.KIND}, got {router.KIND}",
        )
        fields |= {
            "n_routed_experts": experts.experts,
            "n_shared_experts": experts.shared,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.hidden,
            "routed_scaling_factor": router.scale,
            "norm_topk_prob": router.normalise,
            "n_group": router.groups,
            "topk_group": router.groups_kept,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
        fields.setdefault("intermediate_size", experts.hidden)  # required, and read by no layer
    return fields


def _rope_from(fields: Mapping[str, Any]) -> layers.RopeConfig:
    """Both forms: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before."""
    given = dict(fields.get("rope_scaling") or {})
    given |= dict(fields.get("rope_parameters") or {})
    theta = float(given.get("rope_theta", fields.get("rope_theta", 10000.0)))
    interleaved = bool(fields.get("rope_interleave", True))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return layers.RopeConfig(theta=theta, interleaved=interleaved)
    spec.require(kind == "yarn", f"rope_parameters.rope_type: default or yarn, got {kind!r}")
    _only(given, "truncate", True)
    _only(given, "attention_factor", None)
    # with two different values cos and sin are scaled too, which only reaches the rotary part
    mscale: Any = given.get("mscale")
    everywhere = given.get("mscale_all_dim")
    spec.require(
        bool(mscale) and mscale == everywhere,
        f"rope_parameters.mscale: must be set and equal mscale_all_dim, got {mscale} and "
        f"{everywhere}",
    )
    return layers.RopeConfig(
        theta=theta,
        interleaved=interleaved,
        factor=float(_need(given, "factor")),
        original=int(_need(given, "original_max_position_embeddings")),
        beta_fast=float(given.get("beta_fast", 32.0)),
        beta_slow=float(given.get("beta_slow", 1.0)),
        mscale=float(mscale),
    )


def _rope_to(rope: layers.RopeConfig) -> dict[str, Any]:
    if rope.factor <= 1:
        return {"rope_type": "default", "rope_theta": rope.theta}
    spec.require(rope.mscale > 0, f"attention.rope.mscale: must be positive, got {rope.mscale}")
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale,
    }


def _need(fields: Mapping[str, Any], name: str) -> Any:
    spec.require(fields.get(name) is not None, f"{name}: required and not given")
    return fields[name]


def _only(fields: Mapping[str, Any], name: str, value: Any) -> None:
    got = fields.get(name, value)
    spec.require(got == value, f"{name}: only {value!r} is supported, got {got!r}")
