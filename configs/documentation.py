"""Write docs/configs.md, the reference of every key, from the models: `python -m configs.documentation FILE`."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from configs.base import Settings, item_of, members, models_in
from configs.stages import STAGES, Recipe

PAGE_HEAD = """\
# Configuration reference

<!-- Made by `make docs` from the models in configs/: change those, not this file. -->

A recipe holds stages by name; a single stage can also stand in a file of its own, its keys at the root. Any key can be
set on the command line, dotted, with a value in YAML: `stages.reason.steps=3`, `rewards.0.weight=0.5`. In a file,
`${key}` takes the value of another key, counted from the root. `alignyard config FILE` shows what would run and where
each value comes from.

`NAME` stands for a name of your choice and `N` for a place in a list, from 0. Bold keys are blocks. Where a block's
`type` chooses among several, the keys of each type are listed in turn, and only those of the chosen one are allowed.
"""

TYPE_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the reference; a block has a row before those of its keys."""

    name: str
    type: str
    default: str
    doc: str
    block: bool


def reference() -> str:
    """Return the page in Markdown."""
    tables = [_table("A recipe", Recipe, _recipe_keys())]
    tables += [_table(f"Stage `{name}`", model, keys(model)) for name, model in STAGES.items()]
    return "\n".join([PAGE_HEAD, *tables])


def reference_pages() -> dict[str, str]:
    """Return the same as a page for the recipe, one for each stage, and an `index` that lists them, by name."""
    pages = {"recipe": _table("A recipe", Recipe, _recipe_keys())}
    pages |= {name: _table(f"Stage `{name}`", model, keys(model)) for name, model in STAGES.items()}
    headed = {name: text.removeprefix("#") for name, text in pages.items()}
    abouts = {name: " ".join(text.split("\n\n")[1].split()) for name, text in headed.items()}
    listed = "".join(f"* [`{name}`]({name}.md): {about}\n" for name, about in abouts.items())
    return {"index": f"{PAGE_HEAD}\n## Pages\n\n{listed}"} | headed


def keys(model: type[Settings], prefix: str = "") -> Iterator[Key]:
    """Yield every key that `model` may have, in the order of the fields."""
    for name, field in model.model_fields.items():
        nested = _nested(field)
        yield Key(f"{prefix}{name}", _type(field), _default(field), field.description or "", block=bool(nested))
        inner = f"{prefix}{name}.{_entry(field)}"
        for part in nested:
            if len(nested) > 1:
                yield Key(f"{inner}type: {_tag(part)}", "", "", part.__doc__ or "", block=True)
            yield from (key for key in keys(part, inner) if len(nested) == 1 or key.name != f"{inner}type")


def leaf_count(model: type[Settings]) -> int:
    """Count the values that one `model` can set, with the largest type of a block and one entry of a list or dict."""
    return sum(max(map(leaf_count, _nested(field)), default=1) for field in model.model_fields.values())


def _recipe_keys() -> Iterator[Key]:
    """Yield the keys of a recipe without those of its stages."""
    return (key for key in keys(Recipe) if not key.name.startswith("stages."))


def _nested(field: FieldInfo) -> list[type[Settings]]:
    """List the models of the field, or of its entries."""
    return models_in(field.annotation) or models_in(item_of(field.annotation))


def _entry(field: FieldInfo) -> str:
    """Return the placeholder for an entry of a list or dict, between the field's key and the entry's."""
    if item_of(field.annotation) is None:
        return ""
    return "N." if any(get_origin(member) is list for member in members(field.annotation)) else "NAME."


def _tag(model: type[Settings]) -> str:
    return str(get_args(model.model_fields["type"].annotation)[0])


def _type(field: FieldInfo) -> str:
    """Name the field's type as YAML calls it, with its bounds."""
    return ", ".join([_type_name(field.annotation), *_bounds(field)])


def _type_name(annotation: Any) -> str:
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if models_in(annotation):
        names = ["block"]
    elif item_of(annotation) is not None:
        containers = [get_origin(member) for member in members(annotation) if item_of(member) is not None]
        names = [f"{container.__name__} of {_type_name(item_of(annotation))}" for container in containers]
    else:
        names = [_type_name(member) for member in members(annotation)]
    return " or ".join(names + ["null"] * (type(None) in get_args(annotation)))


def _bounds(field: FieldInfo) -> Iterator[str]:
    for limit in field.metadata:
        match limit:
            case Gt(gt=bound):
                yield f"> {bound}"
            case Ge(ge=bound):
                yield f">= {bound}"
            case Lt(lt=bound):
                yield f"< {bound}"
            case Le(le=bound):
                yield f"<= {bound}"
            case _:
                pass  # lengths and patterns appear in the error message only


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Settings):
        return f"`type: {_tag(type(value))}`" if len(_nested(field)) > 1 else ""
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`"


def _table(title: str, model: type[Settings], rows: Iterable[Key]) -> str:
    lines = [f"## {title}", "", model.__doc__ or "", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        name = f"**`{row.name}`**" if row.block else f"`{row.name}`"
        cells = (re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in (name, row.type, row.default, row.doc))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
