"""Environment variables in settings: `${oc.env:NAME}` is used as its value, and recorded as it is written.

OmegaConf is imported only where it resolves something, since `make test-gpu` trains on machines without it.
"""

import os
import re
from typing import TYPE_CHECKING, Any, cast

from configs.visible import hide

if TYPE_CHECKING:
    from omegaconf import DictConfig

VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
"""An interpolation of an environment variable, and its name."""
VALUES = {"variables": "values"}
"""Context of a dump that has the values of environment variables, for hashes; others have their names."""
_KEPT = "\ue000"
"""Stands for `${` in front of a variable while other interpolations are resolved."""


def resolve_others(tree: "DictConfig") -> Any:
    """Resolve all interpolations of a file but those of environment variables. Raises OmegaConfBaseException."""
    from omegaconf import OmegaConf

    kept = _replaced(OmegaConf.to_container(tree), r"\$\{(?=oc\.(?:env:|decode:\$\{oc\.env:))", _KEPT)
    data = OmegaConf.to_container(OmegaConf.create(kept), resolve=True, throw_on_missing=True)
    return _replaced(data, _KEPT, "${")


def _replaced(node: Any, pattern: str, text: str) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, pattern, text) for key, value in cast(dict[Any, Any], node).items()}
    if isinstance(node, list):
        return [_replaced(value, pattern, text) for value in cast(list[Any], node)]
    return re.sub(pattern, text, node) if isinstance(node, str) else node


def has_variable(node: Any) -> bool:
    """Return whether a value, or one below it, is written with an environment variable."""
    return isinstance(node, str | list | dict) and VARIABLE.search(str(cast(Any, node))) is not None


def from_environment(node: Any) -> Any:
    """Resolve the environment variables in a value and below it; from now on `visible` writes their names. Raises
    ValueError for one that is not set and has no default."""
    if isinstance(node, dict):
        return {key: from_environment(value) for key, value in cast(dict[Any, Any], node).items()}
    if isinstance(node, list):
        return [from_environment(value) for value in cast(list[Any], node)]
    if not has_variable(node):
        return node
    for name in VARIABLE.findall(node):
        hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create({"value": node}), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{node}: {str(error).splitlines()[0]}; set the variable, or give a default after it"
        ) from error
    return resolved["value"]


def variables_of(record: str) -> dict[str, str]:
    """Return the environment variables that recorded settings are written with, where they are set."""
    return {name: os.environ[name] for name in VARIABLE.findall(record) if name in os.environ}
