"""Load a YAML file with overrides into a validated configuration, with the origin of each value."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from configs.base import UNKNOWN_KEY, Settings, item_of, problems, unknown_key
from configs.environment import resolve_others
from configs.keys import chosen_models, home_of, misspells, unknown_in_tree, unknown_keys

NUMBER_LIKE = re.compile(r"[-+]?\.?[0-9]")
CERTAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
"""Numbers that every version of YAML and Python reads alike."""
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")

SECRET_VARIABLE = re.compile(r"oc\.env:\s*(\w*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)\w*)", re.IGNORECASE)
"""The name of an environment variable that is likely to hold a key, in an interpolation."""

RECIPES = Path(__file__).parent / "recipes"

_S = TypeVar("_S", bound=Settings)


@dataclass(frozen=True, slots=True)
class LoadedConfig(Generic[_S]):
    """A configuration, and the origin of each leaf by dotted key: `default`, the file's name, or `override`."""

    config: _S
    origins: dict[str, str]


def load_config(path: str, overrides: Sequence[str], model: type[_S]) -> LoadedConfig[_S]:
    """Read the file at `path`, or the shipped recipe of that name, apply `key=value` overrides, and validate.

    Keys are dotted (`stages.grpo.steps=3`, `rewards.0.weight=0.5`), values are YAML, and an override replaces the whole
    value. `${key}` takes the value of another key, counted from the root.

    Raises ValueError, one line for each problem: a missing file, invalid YAML, a value that YAML reads otherwise than
    it looks (`010`, `1:30`, `on`), a key from the environment (`${oc.env:API_KEY}`), an unknown key, a wrong type, an
    impossible combination, an interpolation that does not resolve, an override of an unknown key.

    Example:
        recipe = load_config("demo", ["seed=3"], Recipe).config
    """
    file = find_config(path)
    tree = read_yaml(file)
    overridden = {_override(tree, override, model): override for override in overrides}
    for key, value in leaves(OmegaConf.to_container(tree)):
        if found := SECRET_VARIABLE.search(str(value)):
            raise ValueError(
                f"{file}: {key}: the value of {found[1]} would be recorded with the run; give a setting the name of a "
                "variable instead, as in api_key_env of a judge"
            )
    try:
        data = cast(dict[str, Any], resolve_others(tree))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: {error.full_key}: {reason}; ${{...}} names a key from the root") from error
    _check_type(data, model, file)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        others = [problem for problem in problems(error, data) if not problem[1].startswith(UNKNOWN_KEY)]
        found = [*unknown_keys(data, model), *others]
        lines = [f"  {key}: {message}{_blame(key, overridden)}" for key, message in found]
        raise ValueError("\n".join([f"{file}: not a valid configuration", *lines])) from error
    in_file = {key for key, _ in leaves(data)}
    origins = {
        key: "override" if _covering(key, overridden) else file.name if key in in_file else "default"
        for key, _ in leaves(config.model_dump())
    }
    return LoadedConfig(config, origins)


def find_config(path: str) -> Path:
    """Return the file at `path`, or the shipped recipe of that name. Raises ValueError naming the shipped ones."""
    for file in (Path(path), RECIPES / f"{path}.yaml"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))) or "(none)"
    raise ValueError(f"no configuration '{path}': neither a file nor a shipped recipe; shipped recipes: {shipped}")


def read_yaml(file: Path) -> DictConfig:
    """Parse a file without resolving its interpolations. Raises ValueError unless it is a YAML mapping in UTF-8."""
    try:
        tree = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{file}: holds a list; a configuration is a mapping of keys to values")
    misread = list(_misread(file.read_text(encoding="utf-8")))
    if misread:
        raise ValueError("\n".join([f"{file}: values that YAML does not read as they look", *misread]))
    return tree


def _misread(text: str, prefix: str = "") -> Iterator[str]:
    """Yield a line for each unquoted value or key that YAML reads otherwise than it looks.

    YAML 1.1 reads `010` as 8, `1:30` as 90, `on` as true and `.5e3` as text. A value like a number is fine
    if Python reads the same number (`1_000`, `0x10`, `1e5`), or if both read text.
    """
    node_ids: set[int] = set()  # an alias is the same node as its anchor, and would be reported twice
    queue: list[tuple[str, Any]] = [(prefix, cast(Any, yaml).compose(text, Loader=yaml.SafeLoader))]
    while queue:
        key, node = queue.pop(0)
        if node is None or id(node) in node_ids:
            continue
        node_ids.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for name, value in cast(list[tuple[Any, Any]], node.value):
                below = f"{key}.{name.value}" if key else str(name.value)
                queue += [(below, name), (below, value)]
        elif isinstance(node, yaml.SequenceNode):
            queue += [(f"{key}.{index}", entry) for index, entry in enumerate(cast(list[Any], node.value))]
        elif node.style is None and (reading := _misreading(node.value)) is not None:
            yield f"  {key}: {node.value} {reading}"


def _misreading(plain: str) -> str | None:
    """Describe how YAML misreads an unquoted scalar, with the remedy; None where it reads as it looks."""
    if plain.lower() in ("yes", "no", "on", "off"):
        return "is read as true or false; write one of those, or put it in quotes"
    if plain == "None":
        return "is text; write null, or put it in quotes"
    if not NUMBER_LIKE.match(plain) or CERTAIN.fullmatch(plain):
        return None
    value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={plain}"])))["value"]
    if LEADING_ZERO.fullmatch(plain):
        return "has a leading zero; write the number without it, or put it in quotes"
    if value == _python_number(plain) or (isinstance(value, str) and _python_number(plain) is None):
        return None
    return f"is read as {value!r}; write a plain decimal number, or put it in quotes"


def _python_number(text: str) -> int | float | None:
    for read_as in (lambda: int(text, 0), lambda: float(text)):
        try:
            return read_as()
        except ValueError:
            continue
    return None


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in `data` without keys below it; a list of plain values is one leaf."""
    if isinstance(data, dict) and data:
        items = [(str(key), value) for key, value in cast(dict[Any, Any], data).items()]
    elif isinstance(data, list) and any(isinstance(entry, dict) for entry in cast(list[Any], data)):
        items = [(str(index), entry) for index, entry in enumerate(cast(list[Any], data))]
    else:
        yield prefix.removesuffix("."), data
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}{key}.")


def _check_type(data: dict[str, Any], model: type[Settings], file: Path) -> None:
    """Raise ValueError for a stage in place of a recipe, a recipe in place of a stage, or a stage of another type."""
    actual = data.get("type")
    target = get_args(model.model_fields["type"].annotation)[0] if "type" in model.model_fields else None
    if actual != target:
        kinds = (f"a stage of type '{name}'" if name else "a recipe, without 'type'," for name in (actual, target))
        raise ValueError(f"{file}: {' where '.join(kinds)} is wanted")


def _override(tree: DictConfig, override: str, model: type[Settings]) -> str:
    """Apply `override` to `tree`; return its key with dots only."""
    key, equals, raw = override.partition("=")
    parts = key.replace("[", ".").replace("]", "").split(".")
    if not equals or "" in parts:
        raise ValueError(f"override '{override}': write key=value, with the key dotted, as in trainer.num_ranks=2")
    try:
        _check_known(parts, model, OmegaConf.to_container(tree))
        misread = list(_misread(raw, ".".join(parts)))
        if misread:
            raise ValueError(misread[0].strip())
        # from_dotlist is the public way to parse one value by OmegaConf's YAML rules, which read 1e-5 as a number.
        value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"])))["value"]
        OmegaConf.update(tree, ".".join(parts), value, merge=False)
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"override '{override}': {str(error).splitlines()[0]}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"override '{override}': the value is not valid YAML; quote it") from error
    return ".".join(parts)


def _check_known(parts: list[str], model: type[Settings], data: Any) -> None:
    """Raise ValueError for the first of `parts` that is neither a field of the models nor an entry of the file."""
    annotations: list[Any] = [model]
    node, home = data, None
    for depth, part in enumerate(parts):
        if isinstance(node, str):  # an interpolation: OmegaConf would write into the key that it points at
            raise ValueError(f"'{part}' stands below the value '{node}'; override that value or its source")
        models = chosen_models(annotations, cast(dict[str, Any], node) if isinstance(node, dict) else {})
        home = home or home_of(models, "".join(f"{above}." for above in parts[:depth]))
        fields = [field for below in models for field in _fields(below)]
        entries = [item_of(annotation) for annotation in annotations if item_of(annotation) is not None]
        if fields:
            keys = sorted({name for name, _ in fields})
            annotations = [annotation for name, annotation in fields if name == part]
        elif entries and Any not in entries:
            keys = _entry_keys(node)
            annotations = entries
        else:
            return
        if part not in keys:
            if not fields:
                raise ValueError(unknown_key(part, keys))
            whole = part if misspells(part, keys) else ".".join(parts[depth:])
            raise ValueError(unknown_in_tree(whole, keys, ".".join(parts), home))
        node = _entry(node, part)


def _fields(model: type[Settings]) -> list[tuple[str, Any]]:
    return [(name, field.annotation) for name, field in model.model_fields.items()]


def _entry_keys(node: Any) -> list[str]:
    """List the keys of a dict or the indices of a list; nothing for other values."""
    if isinstance(node, dict):
        return [str(key) for key in cast(dict[Any, Any], node)]
    return [str(index) for index in range(len(cast(list[Any], node)))] if isinstance(node, list) else []


def _entry(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return cast(list[Any], node)[int(key)]
    return cast(dict[str, Any], node).get(key) if isinstance(node, dict) else None


def _covering(key: str, overridden: dict[str, str]) -> list[str]:
    """List the overrides that set `key`, a key above it, or a key below it."""
    return [
        text for other, text in overridden.items() if f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.")
    ]


def _blame(key: str, overridden: dict[str, str]) -> str:
    covering = _covering(key, overridden)
    return f" [override {', '.join(covering)}]" if covering else ""
