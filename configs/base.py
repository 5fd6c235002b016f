"""Base class of all settings, one walk over them, and readable validation errors."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from configs.environment import VALUES, from_environment, has_variable


class Settings(BaseModel):
    """Base of every configuration model.

    Settings are frozen, strict (no string becomes a number), and refuse unknown keys with the nearest known one. The
    string below a field is its documentation in docs/configs.md.

    Example:
        class LengthConfig(Settings):
            max_tokens: int = Field(ge=1)
            '''Longest answer without a penalty.'''
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    _written: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict[str, tuple[Any, Any]])
    """Fields with environment variables: the value, and as it is written."""

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Raise ValueError for unknown keys, before pydantic does, with the nearest known key of each, and take the
        values of environment variables."""
        if isinstance(data, dict):
            keys = [str(key) for key in cast(dict[Any, Any], data)]
            unknown = [unknown_key(key, list(cls.model_fields)) for key in keys if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(unknown))
            written = {
                key: value
                for key, value in cast(dict[str, Any], data).items()
                if has_variable(value) and not _holds_settings(cls.model_fields[key].annotation)
            }
            if written:
                settings = handler(data | {key: from_environment(value) for key, value in written.items()})
                settings._written = {key: (getattr(settings, key), value) for key, value in written.items()}
                return settings
        return handler(data)

    @model_serializer(mode="wrap")
    def _record(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Dump environment variables by their names, unless the context is VALUES."""
        data: dict[str, Any] = handler(self)
        for key, (value, written) in self._written.items():
            if key in data and getattr(self, key) == value and info.context != VALUES:
                data[key] = written
        return data


def _holds_settings(annotation: Any) -> bool:
    """Return whether a field holds settings, which read their environment variables themselves."""
    item = item_of(annotation)
    return bool(models_in(annotation)) or (item is not None and _holds_settings(item))


def walk(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `node` with its dotted key, then every value below it: fields of settings, entries of dicts and lists."""
    yield key, node
    if isinstance(node, Settings):
        items: Any = ((name, getattr(node, name)) for name in type(node).model_fields)
    elif isinstance(node, dict):
        items = cast(dict[Any, Any], node).items()
    elif isinstance(node, list | tuple):
        items = enumerate(cast(list[Any], node))
    else:
        return
    for name, value in items:
        yield from walk(value, f"{key}.{name}" if key else str(name))


UNKNOWN_KEY = "unknown key"
"""Beginning of the message for a key that a model doesn't have."""


def unknown_key(key: str, keys: list[str]) -> str:
    """Return the message for a `key` that is not among the valid `keys`."""
    return f"{UNKNOWN_KEY} '{key}': {neighbour(key, keys)}"


def neighbour(name: str, names: list[str]) -> str:
    """Return the remedy for a misspelt name: the nearest of the valid `names`, or all of them."""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(names)) or '(none)'}"


def problems(error: ValidationError, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List every problem that pydantic found in `data` as (dotted key, message with the value)."""
    return [(_dotted_key(problem, data), _message(problem)) for problem in error.errors()]


def _dotted_key(problem: ErrorDetails, data: Mapping[str, Any]) -> str:
    """Return the problem's key as in the file: pydantic's location without the tags of unions (`schedule.cosine.
    final_share`), which are values of `type` and no keys."""
    keys: list[str] = []
    node: Any = data
    for part in problem["loc"]:
        if isinstance(node, dict) and part not in node and cast(dict[Any, Any], node).get("type") == part:
            continue
        keys.append(str(part))
        if isinstance(node, dict):
            node = cast(dict[Any, Any], node).get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = cast(list[Any], node)[part]
    return ".".join(keys) or "(root)"


def _message(problem: ErrorDetails) -> str:
    """Describe the problem, with the value where a single one is wrong."""
    value = problem["input"]
    match problem["type"]:
        case "missing":
            return "missing, and it has no default"
        case "union_tag_not_found":
            return "its 'type' is missing"
        case "union_tag_invalid":
            context = problem.get("ctx", {})
            types = [tag.strip("'") for tag in str(context["expected_tags"]).split(", ")]
            return f"unknown type '{context['tag']}': {neighbour(str(context['tag']), types)}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            return message if isinstance(value, dict | list) else f"{message} (given: {value!r})"


def fit_default(settings: Settings, key: str, most: int) -> None:
    """Lower a bound that nobody set to `most`. One that was set stays, to be refused by its name."""
    if key not in settings.model_fields_set and 1 < most < getattr(settings, key):
        object.__setattr__(settings, key, most)  # frozen for everybody else


def members(annotation: Any) -> list[Any]:
    """List the members of a union, without None and without `Annotated`'s extras."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [] if annotation is NoneType else [annotation]


def models_in(annotation: Any) -> list[type[Settings]]:
    """List the models that a field of this annotation may hold; several where `type` selects one."""
    return [member for member in members(annotation) if isinstance(member, type) and issubclass(member, Settings)]


def item_of(annotation: Any) -> Any | None:
    """Return the annotation of an entry of a list or dict; None for anything else."""
    for member in members(annotation):
        if get_origin(member) in (list, dict):
            return get_args(member)[-1]
    return None
