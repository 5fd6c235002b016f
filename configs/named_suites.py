"""Lists of suites by name, which a configuration refers to by one word."""

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from configs.base import neighbour, unknown_key
from configs.load import read_yaml

SUITE_LISTS = Path(__file__).parent / "suite_lists"
_KEYS = ["list", "only", "data", "judge"]


def expand_suites(value: Any) -> Any:
    """Replace the name of a list, or a mapping with the key `list`, by the list's suites. Other values stay.

    Beside `list`, a mapping may have `only`, the names of the suites to take; `data`, the folder of files that a list
    reads; and `judge`, arguments of every reward `judge` in it. Raises ValueError for an unknown name.

    Example:
        expand_suites({"list": "deepseek_v2_chat", "only": ["humaneval"]})  # {"humaneval": {"type": "human_eval", ...}}
    """
    if isinstance(value, str):
        value = {"list": value}
    if not isinstance(value, dict) or not isinstance(cast(dict[str, Any], value).get("list"), str):
        return cast(Any, value)
    given = cast(dict[str, Any], value)
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"beside 'list': {unknown_key(key, _KEYS)}")
    names = [file.stem for file in SUITE_LISTS.glob("*.yaml")]
    if given["list"] not in names:
        raise ValueError(f"no list of suites '{given['list']}'; {neighbour(given['list'], names)}")
    tree = read_yaml(SUITE_LISTS / f"{given['list']}.yaml")
    settings = {key: given[key] for key in ("data", "judge") if key in given}
    merged = OmegaConf.merge(tree, {"here": str(SUITE_LISTS)} | settings)
    content = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, merged), resolve=True))
    suites = {name: _with_judge(suite, content["judge"]) for name, suite in content["suites"].items()}
    for name in given.get("only", []):
        if name not in suites:
            raise ValueError(f"only: list '{given['list']}' has no suite '{name}'; {neighbour(name, list(suites))}")
    return {name: suite for name, suite in suites.items() if name in given.get("only", suites)}


def _with_judge(node: Any, judge: dict[str, Any]) -> Any:
    """Give every reward `judge` below `node` the arguments in `judge`, unless it sets them itself."""
    if isinstance(node, list):
        return [_with_judge(part, judge) for part in cast(list[Any], node)]
    if not isinstance(node, dict):
        return node
    filled = {key: _with_judge(part, judge) for key, part in cast(dict[str, Any], node).items()}
    return filled | {"args": judge | filled.get("args", {})} if filled.get("name") == "judge" else filled
