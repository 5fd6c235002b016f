"""Families of models as tiny random ones, each with what makes it itself: windows, groups, latent attention, states."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", MIXTURE),
    "Qwen3-Next": ("qwen3_next", MIXTURE | LINEAR | {"shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("qwen3_5_text", LINEAR),
    "Mistral": ("mistral", {"sliding_window": 64}),
    "Mixtral": ("mixtral", MIXTURE),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", WINDOWED),
    "Gemma 3": ("gemma3_text", WINDOWED),
    "Phi-2": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOWED),
    "OLMoE": ("olmoe", MIXTURE),
    "GLM-4": ("glm4", {}),
    "GLM-4-MoE": ("glm4_moe", MIXTURE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "DeepSeek-V2": ("deepseek_v2", LATENT | {"topk_method": "group_limited_greedy", "num_hidden_layers": 3}),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        LATENT | {"num_hidden_layers": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "DeepSeek-V3.2": ("deepseek_v32", LATENT | {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 32}),
    "gpt-oss": ("gpt_oss", MIXTURE | WINDOWED),
    "Granite": ("granite", {"logits_scaling": 8.0}),
    "Granite-MoE": ("granitemoe", MIXTURE),
    "SmolLM3": ("smollm3", {}),
    "MiniCPM3": ("minicpm3", LATENT),
    "Command R": ("cohere", {}),
    "EXAONE 4": ("exaone4", {}),
    "Seed-OSS": ("seed_oss", {}),
    "Falcon-H1": (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "LFM2": ("lfm2", {"full_attn_idxs": [1]}),
    "Mamba": ("mamba", {"state_size": 16}),
    "Mamba 2": ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}),
    "RWKV": ("rwkv", {"attention_hidden_size": 64}),
    "Nemotron": ("nemotron", {}),
    "GPT-2": ("gpt2", {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}),
    "BLOOM": ("bloom", {"n_head": 2, "n_layer": 2}),
}
"""Name of the family -> `transformers`' model type and the settings that differ from BASE."""

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""What GPT-2's published configurations leave at 0.1."""


def random_model(
    family: str, *, scored: bool = False, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A model of that family with weights large enough that every part of it shows."""
    model_type, own = FAMILIES[family]
    extra = {"num_labels": 1} if scored else {}
    config = CONFIG_MAPPING[model_type](**(BASE | NO_DROPOUT | own | extra | settings))
    kind = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
