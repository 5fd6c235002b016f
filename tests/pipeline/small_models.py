"""Checkpoints of tiny random models of each family, with weights large enough that a wrong one shows."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from pipeline.models.mtp import MtpLayer
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.fill import fill
from pipeline.weights.load import unfilled_with_mtp
from pipeline.weights.reader import CheckpointReader
from pipeline.weights.reward_model import new_score_model, save_score_model

IDS = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALLEST = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes of models whose weights alone matter, not what they say."""
DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROOT = Path(__file__).parents[2]


def small_config(family: str) -> PreTrainedConfig:
    match family:
        case "deepseek_v3":
            config = DeepseekV3Config.from_json_file(str(ROOT / "configs" / "models" / "tiny.json"))
            config.update(IDS)
            return config
        case "llama":
            return LlamaConfig(**DENSE, **IDS, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**DENSE, **IDS, head_dim=16, tie_word_embeddings=False)
    raise ValueError(family)


FAMILIES = ("deepseek_v3", "llama", "qwen3")


def small_causal_lm(family: str, folder: Path) -> Path:
    """A checkpoint of a language model and the byte tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(family), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small_reward_model(causal_lm: Path, folder: Path) -> Path:
    """A reward model on a checkpoint with the byte tokenizer, whose head is large enough that a wrong score shows."""
    model = new_score_model(causal_lm, "float32", seed=0)
    with torch.no_grad():
        model.score.weight.mul_(20)
    return save_score_model(model, byte_tokenizer(), folder)


def load_with_mtp(folder: Path, depth: int) -> tuple[PreTrainedModel, list[MtpLayer]]:
    """A DeepSeek-V3 and its modules for multi-token prediction, with their values, in float32."""
    model, modules = unfilled_with_mtp(folder, "float32", depth)
    layers: Any = model.base_model.layers
    layers.extend(modules)
    fill(model, CheckpointReader(folder), torch.device("cpu"))
    del layers[-depth:]
    return model, modules
