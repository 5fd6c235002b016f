"""A configuration as YAML that can be run again, each value with where it came from: `alignyard config`."""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from rich.text import Text

from configs.base import Settings
from configs.load import LoadedConfig

COLOURS = {"default": "dim", "override": "bold yellow"}
FROM_FILE = "green"
COMMENT_COLUMN = 56


def annotated_yaml(loaded: LoadedConfig[Settings]) -> Iterator[Text]:
    """The lines, coloured by origin. Their plain text is YAML, with the origins as comments."""
    for line, key in _lines(loaded.config.model_dump(), ""):
        if key in loaded.origins:
            origin = loaded.origins[key]
            yield Text(f"{line:<{COMMENT_COLUMN}}  # {origin}", style=COLOURS.get(origin, FROM_FILE))
        else:
            yield Text(line, style="bold")


def _lines(block: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(line, dotted key) of everything in `block`, the lines of what is nested indented."""
    for name, value in block.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield f"{_scalar(name)}:", key
            yield from ((f"  {line}", inner) for line, inner in _lines(value, f"{key}."))
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield f"{_scalar(name)}:", key
            for index, entry in enumerate(value):
                for place, (line, inner) in enumerate(_lines(entry, f"{key}.{index}.")):
                    yield ("  " if place else "- ") + line, inner
        else:
            yield f"{_scalar(name)}: {_scalar(value)}", key


def _scalar(value: Any) -> str:
    """`value` on one line. A `${` left in it is text by now, and is escaped to stay so."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text and "${" not in text else json.dumps(value).replace("${", r"\\${")
