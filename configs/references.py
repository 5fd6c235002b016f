"""References between the stages of a recipe: `stage:NAME` stands for the result of an earlier stage.

Any text value of a stage may be a reference: the path of a model or data set, an argument of a reward. The recorded
configuration keeps the reference; the one that runs has the folder in its place.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from configs.base import Settings, walk

PREFIX = "stage:"

_S = TypeVar("_S", bound=Settings)


def references(config: Settings) -> dict[str, str]:
    """Map the dotted key of each reference in `config` to the stage that it names."""
    return {
        key: value.removeprefix(PREFIX)
        for key, value in walk(config)
        if isinstance(value, str) and value.startswith(PREFIX)
    }


def resolve_references(config: _S, folder_of: Callable[[str], Path]) -> _S:
    """Replace every `stage:NAME` in `config` by the folder `folder_of(NAME)`."""
    return type(config).model_validate(_resolve(config.model_dump(), folder_of))


def _resolve(node: Any, folder_of: Callable[[str], Path]) -> Any:
    if isinstance(node, dict):
        return {key: _resolve(value, folder_of) for key, value in cast(dict[Any, Any], node).items()}
    if isinstance(node, list):
        return [_resolve(value, folder_of) for value in cast(list[Any], node)]
    if isinstance(node, str) and node.startswith(PREFIX):
        return str(folder_of(node.removeprefix(PREFIX)))
    return node
