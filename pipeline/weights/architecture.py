"""Find the file of a model architecture."""

from pathlib import Path

import configs


def architecture_file(config_json: str) -> Path:
    """Return the path `config_json` if it ends in .json, else the shipped architecture of that name.

    Raises ValueError when there is no such file.

    Example: `architecture_file("tiny")`
    """
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
