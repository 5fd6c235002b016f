"""`stage:NAME`: how one stage of a recipe takes what another one made.

Any text value of a stage may be a reference: a model's path, a data set's, an argument of a reward. What is recorded of
a stage keeps the reference; what runs has the folder in its place.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from configs.base import Settings, walk

PREFIX = "stage:"

S = TypeVar("S", bound=Settings)


def references(config: Settings) -> dict[str, str]:
    """By dotted key the name of the stage that each reference of `config` points at."""
    return {
        key: value.removeprefix(PREFIX)
        for key, value in walk(config)
        if isinstance(value, str) and value.startswith(PREFIX)
    }


def resolved(config: S, folder_of: Callable[[str], Path]) -> S:
    """`config` with the folder `folder_of(NAME)` in the place of every `stage:NAME`."""
    return type(config).model_validate(_replaced(config.model_dump(), folder_of))


def _replaced(node: Any, folder_of: Callable[[str], Path]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, folder_of) for key, value in cast(dict[Any, Any], node).items()}
    if isinstance(node, list):
        return [_replaced(value, folder_of) for value in cast(list[Any], node)]
    if isinstance(node, str) and node.startswith(PREFIX):
        return str(folder_of(node.removeprefix(PREFIX)))
    return node
