"""Models by name: the folder of a checkpoint, made or fetched where it isn't there, and the file of an architecture."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import configs
from configs.model import FirstModelConfig, ModelConfig

HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def resolve_model(config: ModelConfig | FirstModelConfig, *, workdir: Path) -> Path:
    """The folder of the checkpoint that `config` names.

    A fresh model is made below `workdir` once and found there again; a name that is no folder is fetched from the hub.
    Raises ValueError when there is none.
    """
    if isinstance(config, FirstModelConfig) and config.init_config is not None:
        content = architecture_file(config.init_config).read_bytes()
        made_from = hashlib.sha256(content + str(config.init_seed).encode()).hexdigest()[:12]
        folder = workdir / f"init-{made_from}"
        if folder.is_dir():
            return folder
        from pipeline.weights.fresh import create_model  # with torch, which nothing else needs that asks for a folder

        return create_model(config.init_config, config.init_seed, folder)
    assert config.path is not None, "a model has exactly one origin"
    folder = Path(config.path).expanduser()
    if folder.is_file():
        raise ValueError(f"model.path='{folder}' is a file; give a checkpoint's folder (a GGUF file is imported first)")
    if folder.is_dir():
        return _checked(folder, f"model.path='{config.path}'")
    return _from_hub(config.path)


def check_template(config: ModelConfig | FirstModelConfig) -> None:
    """Raise ValueError where the chat template that `config` names is neither a file nor shipped."""
    if config.chat_template is not None:
        template_file(config.chat_template)


def template_file(chat_template: str) -> Path:
    """The file that `chat_template` means: itself where it is one, else the shipped template of that name. Raises
    ValueError naming the shipped ones."""
    folder = Path(configs.__file__).parent / "templates"
    for file in (Path(chat_template).expanduser(), folder / f"{chat_template}.jinja"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
    raise ValueError(
        f"model.chat_template='{chat_template}': no such file; give a file with a Jinja chat template, or the name of "
        f"a shipped one: {shipped}"
    )


def _checked(folder: Path, setting: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{setting}: no checkpoint in '{folder}' (config.json is missing)")
    return folder


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model.path='{name}' is neither a folder nor a model that the hub gives; check the spelling, the network "
            f"and the access token ({error})"
        ) from error


def architecture_file(config_json: str) -> Path:
    """The file that `config_json` means: itself when it ends in .json, else the shipped one of that name."""
    if config_json.endswith(".json"):
        file = Path(config_json).expanduser()
        if not file.is_file():
            raise ValueError(f"init_config='{config_json}': no such file")
        return file
    folder = Path(configs.__file__).parent / "models"
    shipped = sorted(file.stem for file in folder.glob("*.json"))
    if config_json not in shipped:
        raise ValueError(f"init_config='{config_json}': give a .json file or the name of a shipped one: {shipped}")
    return folder / f"{config_json}.json"
