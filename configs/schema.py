"""How the models nest: what a field's annotation says of the keys that may stand below it."""

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from configs.base import Settings


def members(annotation: Any) -> list[Any]:
    """What `annotation` is made of: the members of a union, without None and without `Annotated`'s extras."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [] if annotation is NoneType else [annotation]


def models_in(annotation: Any) -> list[type[Settings]]:
    """The models whose keys may stand below a field so annotated; more than one where `type` chooses among them."""
    return [member for member in members(annotation) if isinstance(member, type) and issubclass(member, Settings)]


def item_of(annotation: Any) -> Any | None:
    """The annotation of one entry, where `annotation` is a list or a dict; else None."""
    for member in members(annotation):
        if get_origin(member) in (list, dict):
            return get_args(member)[-1]
    return None
