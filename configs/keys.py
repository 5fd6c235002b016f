"""Unknown keys of a configuration, each with the key that was probably meant, sought in the whole tree of settings."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, cast, get_args

from configs.base import UNKNOWN_KEY, Settings, item_of, models_in, neighbour
from configs.foreign import counterpart

_TYPO, _MISPLACED_TYPO = 0.8, 0.75
"""Likeness of a misspelt key to a known one beside it, and elsewhere in the tree."""
_PLACES = 3
"""Most places that a message names for a key that stands elsewhere."""


def unknown_keys(data: Any, model: type[Settings]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, message) for every key of `data` that `model` doesn't have.

    A block that only another library has is answered key by key.
    """
    yield from _unknown(data, [model], "", None)


def _unknown(node: Any, annotations: list[Any], prefix: str, home: tuple[str, list[str]] | None) -> Iterator[Any]:
    """Yield the unknown keys below `node`, which stands at `prefix`. home: the place of its stage, and the stage's
    keys, None above the stages."""
    if isinstance(node, list):
        for index, entry in enumerate(cast(list[Any], node)):
            items = [item_of(annotation) for annotation in annotations]
            yield from _unknown(entry, [item for item in items if item is not None], f"{prefix}{index}.", home)
        return
    if not isinstance(node, dict):
        return
    models = chosen_models(annotations, cast(dict[str, Any], node))
    home = home or home_of(models, prefix)
    fields = [(name, field.annotation) for model in models for name, field in model.model_fields.items()]
    items = [item for annotation in annotations if (item := item_of(annotation)) is not None]
    for key, value in cast(dict[str, Any], node).items():
        below = [annotation for name, annotation in fields if name == str(key)] if models else items
        if below or not models:
            yield from _unknown(value, below, f"{prefix}{key}.", home)
            continue
        siblings = [name for name, _ in fields]
        is_foreign_block = isinstance(value, dict) and counterpart(str(key)) is None and not misspells(key, siblings)
        for leaf in _leaf_keys(value, str(key)) if is_foreign_block else [str(key)]:
            yield f"{prefix}{leaf}", unknown_in_tree(leaf, siblings, f"{prefix}{leaf}", home)


def unknown_in_tree(key: str, siblings: list[str], place: str, home: tuple[str, list[str]] | None) -> str:
    """Return the message for a `key` at `place` that is not among its `siblings`: a misspelt sibling, a key that stands
    elsewhere in its stage, the name of another library, or the nearest one.

    Example: `unknown key 'num_generations': TRL's num_generations is group_size here`
    """
    start, tree = home or ("", siblings)
    last = key.rpartition(".")[2]
    places = sorted((name for name in tree if name.rpartition(".")[2] == last), key=lambda name: name.count("."))
    foreign = counterpart(place.removeprefix(start))
    if near := misspells(key, siblings):
        advice = f"did you mean '{near}'?"
    elif places:
        advice = f"it is {' or '.join(places[:_PLACES])} here"
    elif foreign is not None:
        advice = foreign.advice(tree)
    elif near := get_close_matches(last, [name.rpartition(".")[2] for name in tree], n=1, cutoff=_MISPLACED_TYPO):
        advice = f"did you mean '{next(name for name in tree if name.rpartition('.')[2] == near[0])}'?"
    else:
        advice = neighbour(key, siblings)
    return f"{UNKNOWN_KEY} '{key}': {advice}"


def misspells(key: str, siblings: list[str]) -> str:
    """Return the sibling that `key` misspells, "" for none."""
    return next(iter(get_close_matches(key, siblings, n=1, cutoff=_TYPO)), "")


def chosen_models(annotations: list[Any], node: dict[str, Any]) -> list[type[Settings]]:
    """List the models that `node` may be: the one that its `type` selects, else all."""
    models = [model for annotation in annotations for model in models_in(annotation)]
    selected = [
        model
        for model in models
        if "type" in model.model_fields and node.get("type") in get_args(model.model_fields["type"].annotation)
    ]
    return selected or models


def home_of(models: list[type[Settings]], prefix: str) -> tuple[str, list[str]] | None:
    """Return the place and the keys of a stage, which is the outermost of the models with a `type`; None above it."""
    if not models or not all("type" in model.model_fields for model in models):
        return None
    return prefix, list(dict.fromkeys(key for model in models for key in tree_keys(model)))


def tree_keys(model: type[Settings], prefix: str = "", above: tuple[type[Settings], ...] = ()) -> Iterator[str]:
    """Yield every dotted key of a model, blocks before their keys; entries of lists and dicts without their place."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for below in models_in(field.annotation) or models_in(item_of(field.annotation)):
            if below not in above:
                yield from tree_keys(below, f"{prefix}{name}.", (*above, model))


def _leaf_keys(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, dict) and node:
        for key, value in cast(dict[str, Any], node).items():
            yield from _leaf_keys(value, f"{prefix}.{key}")
    else:
        yield prefix
