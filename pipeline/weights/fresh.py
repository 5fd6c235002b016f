"""Create a checkpoint with random weights."""

import json
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import pipeline.weights.load  # noqa: F401  silences save_pretrained's progress bar
from pipeline.disk.files import new_folder
from pipeline.models.mtp import Mtp, mtp_as_layers, new_mtp_layers
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.architecture import architecture_file


def create_model(config_json: str, seed: int, out: Path) -> Path:
    """Write a checkpoint with random float32 weights and the byte tokenizer to `out`, and return `out`.

    `config_json` is a `transformers` config.json or the name of a shipped one; the same file and seed give the same
    weights. A DeepSeek-V3 gets as many MTP modules as its `num_nextn_predict_layers`. `vocab_size` defaults to the
    tokenizer's; the ids of the special tokens are always the tokenizer's. Raises ValueError when the file is missing,
    is no architecture, or has too small a vocabulary.

    Example: `create_model("tiny", seed=0, out=Path("models/tiny"))`
    """
    file = architecture_file(config_json)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"init_config='{file}' is not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"init_config='{file}' must be a JSON object with a 'model_type' that transformers knows")
    tokenizer = byte_tokenizer()
    settings.setdefault("vocab_size", len(tokenizer))
    if settings["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"init_config='{file}': vocab_size={settings['vocab_size']} is smaller than the byte tokenizer's "
            f"{len(tokenizer)}; raise it or leave it out"
        )
    settings |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        depth = config.num_nextn_predict_layers if config.model_type == "deepseek_v3" else 0
        mtp = Mtp(model, new_mtp_layers(model, depth), detached=True) if depth else None
    with mtp_as_layers(mtp, model):
        state = {name: tensor.clone() if mtp else tensor for name, tensor in model.state_dict().items()}
    with new_folder(out) as partial:
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
    return out
