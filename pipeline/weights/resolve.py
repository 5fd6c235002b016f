"""Resolve the model of a configuration to the folder of a checkpoint."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from configs.model import FirstModelConfig, ModelConfig
from pipeline.data.template_files import template_file
from pipeline.weights.architecture import architecture_file

HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def resolve_model(config: ModelConfig | FirstModelConfig, *, workdir: Path) -> Path:
    """Return the folder of the checkpoint that `config` names.

    A model with random weights is created below `workdir` once and reused afterwards. A name that is no folder is
    downloaded from the hub. Raises ValueError when there is no such checkpoint.
    """
    if isinstance(config, FirstModelConfig) and config.init_config is not None:
        content = architecture_file(config.init_config).read_bytes()
        fingerprint = hashlib.sha256(content + str(config.init_seed).encode()).hexdigest()[:12]
        folder = workdir / f"init-{fingerprint}"
        if folder.is_dir():
            return folder
        from pipeline.weights.fresh import create_model  # imports torch, which the other cases don't need

        return create_model(config.init_config, config.init_seed, folder)
    assert config.path is not None, "a model has exactly one origin"
    folder = Path(config.path).expanduser()
    if folder.is_file():
        raise ValueError(f"model.path='{folder}' is a file; give a checkpoint's folder (a GGUF file is imported first)")
    if not folder.is_dir():
        return _download(config.path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path='{config.path}': no checkpoint in '{folder}' (config.json is missing)")
    return folder


def check_template(config: ModelConfig | FirstModelConfig) -> None:
    """Raise ValueError when the chat template of `config` is neither a file nor a shipped template."""
    if config.chat_template is not None:
        template_file(config.chat_template)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model.path='{name}' is neither a folder nor a model on the hub; check the spelling, the network and the "
            f"access token ({error})"
        ) from error
