"""Types of the standard library that cross between a solution and its tests, and objects of shared classes."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would take longer than the rest of the process's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _offset(value: Any) -> Any:
    """Return a time's zone as its offset from UTC; comparisons use nothing else."""
    offset = value.utcoffset()
    return None if offset is None else fetch("datetime.timezone")(offset)


CARRIED: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "datetime.datetime": lambda value: (
        *(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond),
        _offset(value),
    ),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond, _offset(value)),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.timezone": lambda value: value.__getinitargs__(),
    "uuid.UUID": lambda value: (str(value),),
    "array.array": lambda value: (value.typecode, value.tolist()),
}
"""Function by type that returns the constructor's arguments for an equal value."""
CARRIED_DICTS = {"collections.Counter": b"C", "collections.OrderedDict": b"O", "collections.defaultdict": b"D"}


def attributes(value: Any) -> list[tuple[str, Any]]:
    """Return names and values of an object's attributes, including those in slots."""
    slots = [slot for kind in type(value).__mro__ for slot in _slots(kind) if hasattr(value, slot)]
    return [*getattr(value, "__dict__", {}).items(), *((slot, getattr(value, slot)) for slot in slots)]


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def dotted_name(kind: type, names: Any) -> str | None:
    """Return the dotted name in `names` of the type that `kind` is or derives from, or None.

    Imports nothing: if an object of a type exists, the type's module is imported already.
    """
    for parent in kind.__mro__:
        name = f"{parent.__module__}.{parent.__qualname__}"
        if name in names and getattr(sys.modules.get(parent.__module__), parent.__qualname__, None) is parent:
            return name
    return None


def fetch(name: str) -> Any:
    """Import the type with this dotted name: one of CARRIED, or of `collections`."""
    module, _, attribute = name.rpartition(".")
    return getattr(__import__(module), attribute)


def refuse_hiding(kind: type, name: Any, value: Any, classes: dict[str, type]) -> None:
    """Raises ValueError for an attribute that hides a method, is named like `__eq__`, or can be called."""
    if not isinstance(name, str) or name.startswith("__"):
        raise ValueError(f"no attribute {name!r:.60}")
    own = next((vars(parent)[name] for parent in kind.__mro__ if name in vars(parent)), None)
    hides = hasattr(own, "__get__") and name not in [slot for parent in kind.__mro__ for slot in _slots(parent)]
    if hides or (callable(value) and type(value) not in classes.values()):
        raise ValueError(f"{kind.__name__}.{name} can't be replaced")
