"""The tiny Hugging Face DeepSeek-V3 models that ours is held against; standard library only."""

_SHARED = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

CASES = {
    "mla_q_latent": {
        **_SHARED,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": 12,
        "tie_word_embeddings": True,
    },
    "mla_yarn": {
        **_SHARED,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "moe": {
        **_SHARED,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "moe_groups": {
        **_SHARED,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 12,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
}

ROWS, LENGTH = 2, 33  # 32 predicted tokens a row
