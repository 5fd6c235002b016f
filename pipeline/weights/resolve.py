"""Resolve the model of a configuration to the folder of a checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from configs.base import Settings
from configs.lora import LoraConfig
from configs.model import FirstModelConfig, ModelConfig
from pipeline.data.template_files import template_file
from pipeline.disk.remote import fetch_checkpoint, is_address
from pipeline.weights.architecture import architecture_file
from rollout.checkpoint import is_in_fp8, resolve_dtype

_S = TypeVar("_S", bound=Settings)
ADAPTER_CONFIG, ADAPTER_FOLDER = "adapter_config.json", "adapter"
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def resolve_model(config: ModelConfig | FirstModelConfig, *, workdir: Path, copy_fp8: bool = False) -> Path:
    """Return the folder of the checkpoint that `config` names.

    A model with random weights is created below `workdir` once and reused afterwards. So is, with `copy_fp8`, a copy in
    bfloat16 of a checkpoint in FP8, for engines that receive weights. A name that is no folder is downloaded from the
    hub. Raises ValueError when there is no such checkpoint.
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
    folder = _checkpoint_folder(config.path)
    if not (copy_fp8 and is_in_fp8(folder)):
        return folder
    copy = workdir / f"from-fp8-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if copy.is_dir():
        return copy
    from pipeline.weights.export import export_checkpoint  # imports torch

    return export_checkpoint(folder, copy)


def with_dtypes(config: _S) -> _S:
    """Replace `dtype: auto` of every model in `config` by the precision of its checkpoint. Raises ValueError when there
    is no such checkpoint, it is in another precision than is trained, or other settings don't fit its precision."""
    settings = config.model_dump()
    resolved = _resolve_dtypes(settings)
    return config if resolved == settings else type(config).model_validate(resolved)


def _resolve_dtypes(node: Any) -> Any:
    if isinstance(node, list):
        return [_resolve_dtypes(value) for value in node]
    if not isinstance(node, dict):
        return node
    resolved = {key: _resolve_dtypes(value) for key, value in node.items()}
    if node.get("dtype") == "auto":
        path = node.get("path")  # a new model has none
        resolved["dtype"] = resolve_dtype("auto", _checkpoint_folder(path)) if path else "float32"
    return resolved


def check_template(config: ModelConfig | FirstModelConfig) -> None:
    """Raise ValueError when the chat template of `config` is neither a file nor a shipped template."""
    if config.chat_template is not None:
        template_file(config.chat_template)


def check_adapters(lora: LoraConfig | None) -> None:
    """Raise ValueError for adapters to start from that are not there, or differ from `lora` in kind, rank or scale."""
    if lora is None or lora.start is None:
        return
    file = adapter_folder(lora) / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    for key, own in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        if config.get(key) != own:
            raise ValueError(f"'{file}' has {key}={config.get(key)}, and lora sets {own}; set it as in the file")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"'{file}' has {key}={config[key]}, which is not supported; start from other adapters")


def adapter_folder(lora: LoraConfig) -> Path:
    """Return the folder of the adapters that `lora.start` names: itself, or that in a checkpoint's folder."""
    start = Path(lora.start or "").expanduser()
    for folder in (start, start / ADAPTER_FOLDER):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise ValueError(f"lora.start='{start}' has no adapters ({ADAPTER_CONFIG} is missing); give their folder")


def _checkpoint_folder(path: str) -> Path:
    if is_address(path):
        return fetch_checkpoint(path)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"model.path='{folder}' is a file; give a checkpoint's folder (a GGUF file is imported first)")
    if not folder.is_dir():
        return _download(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path='{path}': no checkpoint in '{folder}' (config.json is missing)")
    return folder


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model.path='{name}' is neither a folder nor a model on the hub; check the spelling, the network and the "
            f"access token ({error})"
        ) from error
