"""From a YAML file and overrides to a validated configuration that knows where each of its values came from."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from configs.base import Settings, item_of, models_in, problems, unknown_key

NUMBER_LIKE = re.compile(r"[-+]?\.?[0-9]")
CERTAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
"""Numbers that all versions of YAML and Python read alike."""
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")

RECIPES = Path(__file__).parent / "recipes"

_S = TypeVar("_S", bound=Settings)


@dataclass(frozen=True, slots=True)
class LoadedConfig(Generic[_S]):
    """A configuration, and by dotted key of each of its leaves the origin: `default`, a file's name, or `override`."""

    config: _S
    origins: dict[str, str]


def load_config(path: str, overrides: Sequence[str], model: type[_S]) -> LoadedConfig[_S]:
    """Reads the file at `path`, or the shipped recipe of that name, applies `key=value` overrides, and validates.

    Keys are dotted (`stages.grpo.steps=3`, `rewards.0.weight=0.5`), values are YAML, and an override replaces what
    stood there. `${key}` takes another key's value, counted from the root.

    Raises ValueError, one line per problem, for a file that is missing or not YAML, a value that YAML reads otherwise
    than it looks (`010`, `1:30`, `on`), an unknown key, a wrong type, an impossible combination, an interpolation that
    does not resolve, and an override of a key that does not exist.
    """
    file = find_config(path)
    tree = read_yaml(file)
    overridden = {_override(tree, override, model): override for override in overrides}
    try:
        data = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: {error.full_key}: {reason}; ${{...}} names a key from the root") from error
    _check_type(data, model, file)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        lines = [f"  {key}: {message}{_blame(key, overridden)}" for key, message in problems(error, data)]
        raise ValueError("\n".join([f"{file}: not a valid configuration", *lines])) from error
    given = {key for key, _ in leaves(data)}
    origins = {
        key: "override" if _covering(key, overridden) else file.name if key in given else "default"
        for key, _ in leaves(config.model_dump())
    }
    return LoadedConfig(config, origins)


def find_config(path: str) -> Path:
    """The file at `path`, or the shipped recipe of that name. Raises ValueError naming the shipped ones."""
    for file in (Path(path), RECIPES / f"{path}.yaml"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))) or "(none)"
    raise ValueError(f"no configuration '{path}': neither a file nor a shipped recipe; shipped recipes: {shipped}")


def read_yaml(file: Path) -> DictConfig:
    """The file's YAML with its interpolations unresolved. Raises ValueError where it is not a mapping in UTF-8."""
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
    """One line for each unquoted value or key of a YAML text that reads otherwise than it looks.

    YAML 1.1 takes `010` for 8, `1:30` for 90, `on` for true and `.5e3` for text. A value that
    Python reads as the same number is right (`1_000`, `0x10`, `1e5`), and so is one that neither takes for a number.
    """
    seen: set[int] = set()  # an alias is the very node that it repeats, so it would be reported twice
    waiting: list[tuple[str, Any]] = [(prefix, cast(Any, yaml).compose(text, Loader=yaml.SafeLoader))]
    while waiting:
        key, node = waiting.pop(0)
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for name, value in cast(list[tuple[Any, Any]], node.value):
                below = f"{key}.{name.value}" if key else str(name.value)
                waiting += [(below, name), (below, value)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(f"{key}.{place}", entry) for place, entry in enumerate(cast(list[Any], node.value))]
        elif node.style is None and (reading := _otherwise(node.value)) is not None:
            yield f"  {key}: {node.value} {reading}"


def _otherwise(plain: str) -> str | None:
    """The way in which an unquoted scalar reads otherwise than it looks, with the remedy; None where it does not."""
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
    """(dotted key, value) of everything in `data` that has no key below it; a list of plain values is one leaf."""
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
    """Raises ValueError where a stage is given for a recipe, a recipe for a stage, or one stage for another."""
    declared = data.get("type")
    wanted = get_args(model.model_fields["type"].annotation)[0] if "type" in model.model_fields else None
    if declared != wanted:
        given, asked = (
            f"a stage of type '{kind}'" if kind else "a recipe, without 'type'," for kind in (declared, wanted)
        )
        raise ValueError(f"{file}: {given} where {asked} is wanted")


def _override(tree: DictConfig, override: str, model: type[Settings]) -> str:
    """Sets what `override` says in `tree`; returns its key with dots only."""
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
    """Raises ValueError for the first of `parts` that names no field of the models and no entry of the file."""
    annotations: list[Any] = [model]
    node = data
    for part in parts:
        if isinstance(node, str):  # an interpolation: OmegaConf would write into the key it points at
            raise ValueError(f"'{part}' stands below the value '{node}'; override that value, or what it points at")
        fields = [field for annotation in annotations for below in models_in(annotation) for field in _fields(below)]
        entries = [item_of(annotation) for annotation in annotations if item_of(annotation) is not None]
        if fields:
            known = sorted({name for name, _ in fields})
            annotations = [annotation for name, annotation in fields if name == part]
        elif entries and Any not in entries:
            known = _keys(node)
            annotations = entries
        else:
            return
        if part not in known:
            raise ValueError(unknown_key(part, known))
        node = _below(node, part)


def _fields(model: type[Settings]) -> list[tuple[str, Any]]:
    return [(name, field.annotation) for name, field in model.model_fields.items()]


def _keys(node: Any) -> list[str]:
    """The keys of a dict, the indices of a list, nothing for anything else."""
    if isinstance(node, dict):
        return [str(key) for key in cast(dict[Any, Any], node)]
    return [str(index) for index in range(len(cast(list[Any], node)))] if isinstance(node, list) else []


def _below(node: Any, part: str) -> Any:
    """What stands below `part`, None where the file says nothing of it."""
    if isinstance(node, list):
        return cast(list[Any], node)[int(part)]
    return cast(dict[str, Any], node).get(part) if isinstance(node, dict) else None


def _covering(key: str, overridden: dict[str, str]) -> list[str]:
    """The overrides that set `key`, something above it, or something inside it."""
    return [
        text for other, text in overridden.items() if f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.")
    ]


def _blame(key: str, overridden: dict[str, str]) -> str:
    covering = _covering(key, overridden)
    return f" [override {', '.join(covering)}]" if covering else ""
