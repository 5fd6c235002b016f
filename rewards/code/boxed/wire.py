"""Plain data between two processes of which one is not to be trusted.

Reading builds nothing but None, booleans, numbers, text, bytes, ranges, lists, tuples, dicts, sets, the plain types
themselves, and the standard library's decimals, fractions, dates, times, deques, counters, ordered and default dicts,
named tuples, UUIDs and arrays, each exactly: an object of a subclass is written as what it derives from, so neither its
methods nor its `__eq__` cross. Objects of the classes that both sides were given (`classes`) cross as their
attributes. Any other object stays in its own process, and a number stands for it.

Such an object, a list, dict, set or deque met again is written as its number, so aliases and cycles survive, and what
one side changed in place the other can `refill`. Imported inside the boxes, where every import is paid for with each
sample.
"""

from __future__ import annotations

import struct
from struct import pack, unpack

from .kinds import CARRIED, CARRIED_DICTS, attributes, fetch, known, refuse_hiding

TYPE_CHECKING = False
if TYPE_CHECKING:  # to import these takes longer than the rest of the process's start
    from collections.abc import Callable
    from typing import Any

MAX_BYTES = 16 << 20
"""Longest message."""
MAX_DEPTH = 100
"""Deepest nesting of one value. Four calls a level, where Python allows a thousand."""

_PLAIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (object, bool, int, float, complex, str, bytes, range, list, tuple, dict, set, frozenset, type(None))
}
_SINGLE = {None: b"N", True: b"T", False: b"F"}
_SEQUENCES: dict[bytes, Callable[[list[Any]], Any]] = {b"t": tuple, b"z": frozenset}
_CONTAINERS: dict[bytes, type] = {b"l": list, b"d": dict, b"S": set}
_DEEP = 40
"""Deepest nesting at which an object's attributes stand inside the value. Deeper ones are written behind it, or a long
linked list would pass MAX_DEPTH."""


class TooMuch(Exception):
    """A value nested too deep or a message too long."""


class Malformed(Exception):
    """What no `Writer` wrote, or what nobody asked for."""


class Writer:
    """Values, written one after the other into `data`.

    refer: the letter and the number that stand for an object that is no plain data; may raise. containers: the lists,
    dicts, sets, deques and objects both sides know by their place in it already; what is written is appended. classes:
    the shared classes by name.
    """

    def __init__(
        self,
        refer: Callable[[Any], tuple[bytes, int]],
        containers: list[Any],
        classes: dict[str, type] | None = None,
    ) -> None:
        self.data = bytearray()
        self._refer = refer
        self._classes = classes or {}
        self._waiting: list[Any] = []
        self._containers = containers
        self._numbers = {id(container): number for number, container in enumerate(containers)}

    def put(self, value: Any) -> None:
        """Write one value. Raises TooMuch past MAX_BYTES or MAX_DEPTH, and whatever `refer` does."""
        self._put(value, 0)
        self._finish()

    def _finish(self) -> None:
        while self._waiting:
            self._contents(self._waiting.pop(0), 1)

    def _put(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH or len(self.data) > MAX_BYTES:
            raise TooMuch(f"a value nested past {MAX_DEPTH} levels or longer than {MAX_BYTES >> 20} MiB")
        if value is None or value is True or value is False:
            self.data += _SINGLE[value]
        elif isinstance(value, int):
            self._number(b"i", value)
        elif isinstance(value, str):
            self._bytes(b"s", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, float):
            self.data += b"f" + pack("<d", value)
        elif isinstance(value, list | dict | set):
            self._container(value, depth)
        elif isinstance(value, tuple):
            self._tuple(value, depth)
        elif isinstance(value, frozenset):
            self._items(b"z", value, depth)
        elif isinstance(value, complex):
            self.data += b"j" + pack("<dd", value.real, value.imag)
        elif isinstance(value, bytes | bytearray):
            self._bytes(b"b", bytes(value))
        elif isinstance(value, range):
            self._items(b"r", (value.start, value.stop, value.step), depth)
        elif isinstance(value, type) and _PLAIN_TYPES.get(value.__name__) is value:
            self._bytes(b"y", value.__name__.encode())
        else:
            self._rare(value, depth)

    def _tuple(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind is tuple:
            self._items(b"t", value, depth)
        elif self._classes.get(kind.__name__) is kind:
            self._bytes(b"n", kind.__name__.encode())
            self._items(b"t", value, depth)
        elif isinstance(fields := getattr(kind, "_fields", None), tuple):
            self._bytes(b"m", kind.__name__.encode())
            self._items(b"t", fields, depth)
            self._items(b"t", value, depth)
        else:
            self._items(b"t", value, depth)

    def _rare(self, value: Any, depth: int) -> None:
        kind = type(value)
        name = kind.__name__
        if self._classes.get(name) is kind:
            if hasattr(kind, "__members__"):  # an enumeration's
                self._bytes(b"e", name.encode())
                self._put(value.name, depth)
            else:
                self._container(value, depth)
        elif (carried := known(kind, CARRIED)) is not None:
            self._bytes(b"x", carried.encode())
            self._items(b"t", CARRIED[carried](value), depth)
        elif _is_deque(value):
            self._container(value, depth)
        else:
            self._number(*self._refer(value))

    def put_contents(self) -> None:
        """Write what every container known so far holds now, for the other side's `refill`."""
        for container in self._containers[:]:
            self._contents(container, 1)
        self._finish()

    def _container(self, value: Any, depth: int) -> None:
        number = self._numbers.get(id(value))
        if number is None:
            self._numbers[id(value)] = len(self._containers)
            self._containers.append(value)
            if isinstance(value, dict | list | set) or _is_deque(value):
                self._contents(value, depth)
            else:
                later = depth > _DEEP
                self._bytes(b"P" if later else b"p", type(value).__name__.encode())
                if later:
                    self._waiting.append(value)
                else:
                    self._contents(value, depth)
        else:
            self._number(b"#", number)

    def _contents(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            kind = CARRIED_DICTS.get(known(type(value), CARRIED_DICTS) or "", b"d")
            if kind == b"D":
                factory = value.default_factory  # type: ignore[attr-defined]
                is_plain = isinstance(factory, type) and _PLAIN_TYPES.get(factory.__name__) is factory
                kind += (factory.__name__ if is_plain else "").encode() + b";"
            self._items(kind, [part for item in value.items() for part in item], depth)
        elif isinstance(value, list | set):
            self._items(b"l" if isinstance(value, list) else b"S", value, depth)
        elif _is_deque(value):
            longest = value.maxlen
            self._items(b"q%b;" % (b"" if longest is None else b"%x" % longest), value, depth)
        else:
            self._items(b"a", [part for item in attributes(value) for part in item], depth)

    def _items(self, kind: bytes, items: Any, depth: int) -> None:
        self._number(kind, len(items))
        for item in items:
            self._put(item, depth + 1)

    def _bytes(self, kind: bytes, data: bytes) -> None:
        self._number(kind, len(data))
        self.data += data

    def _number(self, kind: bytes, number: int) -> None:
        self.data += b"%b%x;" % (kind, number)  # hexadecimal takes linear time, whatever the length


class Reader:
    """The values in `data`, one after the other; the counterpart of `Writer`.

    refer: the object that a letter and a number stand for; raises LookupError for one that never was. classes: as the
    writer's, by the same names. strict: refuse an object of theirs with an attribute that can be called or hides a
    method.
    """

    def __init__(
        self,
        data: bytes,
        refer: Callable[[bytes, int], Any],
        containers: list[Any],
        classes: dict[str, type] | None = None,
        *,
        strict: bool = True,
    ) -> None:
        self._classes = classes or {}
        self._strict = strict
        self._waiting: list[Any] = []
        self._data = data
        self._at = 0
        self._refer = refer
        self._containers = containers

    @property
    def rest(self) -> bytes:
        """What is not yet read."""
        return self._data[self._at :]

    def get(self) -> Any:
        """The next value. Raises Malformed."""
        try:
            value = self._get(0)
            self._finish()
            return value
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    def refill(self) -> None:
        """Give every container known so far the contents that the other side wrote. Raises Malformed."""
        try:
            for container in self._containers[:]:
                self._refill(container, 1)
            self._finish()
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    def _finish(self) -> None:
        while self._waiting:
            self._refill(self._waiting.pop(0), 1)

    def _refill(self, container: Any, depth: int) -> None:
        kind = self._take(1)
        if kind in b"qD":
            self._take_word()
        self._fill(container, kind, self._count(), depth)

    def _get(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested past {MAX_DEPTH} levels")
        kind = self._take(1)
        if kind == b"i":
            return self._number()
        if kind == b"s":
            return self._take(self._count()).decode("utf-8", "surrogatepass")
        if kind == b"f":
            return unpack("<d", self._take(8))[0]
        if kind in _CONTAINERS:
            container = _CONTAINERS[kind]()
            self._containers.append(container)
            self._fill(container, kind, self._count(), depth)
            return container
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([self._get(depth + 1) for _ in range(self._count())])
        return self._rare(kind, depth)

    def _rare(self, kind: bytes, depth: int) -> Any:
        match kind:
            case b"N":
                return None
            case b"T" | b"F":
                return kind == b"T"
            case b"#":
                return self._containers[self._count()]
            case b"b":
                return self._take(self._count())
            case b"j":
                return complex(*unpack("<dd", self._take(16)))
            case b"r":
                return range(*[self._get(depth + 1) for _ in range(self._count())])
            case b"y":
                return _PLAIN_TYPES[self._take(self._count()).decode()]
            case b"x":
                name = self._text()
                if name not in CARRIED:
                    raise ValueError(f"no type {name!r:.60}")
                return fetch(name)(*self._get(depth + 1))
            case b"C" | b"O" | b"D" | b"q":
                return self._collection(kind, depth)
            case b"n":
                return self._class("_fields")._make(self._get(depth + 1))
            case b"m":
                name, fields, values = self._text(), self._get(depth + 1), self._get(depth + 1)
                hidden = set(fields) & set(dir(tuple))
                return values if hidden else fetch("collections.namedtuple")(name, fields)._make(values)
            case b"e":
                return self._class("__members__")[self._get(depth + 1)]
            case b"p" | b"P":
                kind_of = self._class()
                value = object.__new__(kind_of)
                self._containers.append(value)
                if kind == b"P":
                    self._waiting.append(value)
                else:
                    self._refill(value, depth)
                return value
            case _:
                return self._refer(kind, self._count())

    def _class(self, attribute: str = "__dict__") -> Any:
        kind = self._classes[self._text()]
        if not hasattr(kind, attribute):
            raise ValueError(f"{kind.__name__} has no {attribute}")
        return kind

    def _text(self) -> str:
        return self._take(self._count()).decode("utf-8", "surrogatepass")

    def _collection(self, kind: bytes, depth: int) -> Any:
        if kind == b"q":
            longest = self._take_word()
            container = fetch("collections.deque")([], int(longest, 16) if longest else None)
        elif kind == b"D":
            factory = self._take_word().decode()
            container = fetch("collections.defaultdict")(_PLAIN_TYPES[factory] if factory else None)
        else:
            container = fetch("collections.Counter" if kind == b"C" else "collections.OrderedDict")()
        self._containers.append(container)
        self._fill(container, kind, self._count(), depth)
        return container

    def _fill(self, container: Any, kind: bytes, count: int, depth: int) -> None:
        if kind == b"a":
            self._fill_object(container, count, depth)
            return
        if not (_is_deque(container) if kind == b"q" else isinstance(container, _CONTAINERS.get(kind, dict))):
            raise ValueError(f"the contents {kind!r} for a {type(container).__name__}")
        items = [self._get(depth + 1) for _ in range(count)]
        container.clear()
        if isinstance(container, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                container[key] = value  # a Counter's update would add
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)

    def _fill_object(self, value: Any, count: int, depth: int) -> None:
        """Give an object the attributes that follow, and delete all others."""
        kind = type(value)
        if self._classes.get(kind.__name__) is not kind:
            raise ValueError(f"attributes for a {kind.__name__}")
        items = [self._get(depth + 1) for _ in range(count)]
        new = dict(zip(items[::2], items[1::2], strict=True))
        if self._strict:
            for name, part in new.items():
                refuse_hiding(kind, name, part, self._classes)
        for name, _ in attributes(value):
            if name not in new:
                object.__delattr__(value, name)
        for name, part in new.items():
            object.__setattr__(value, name, part)

    def _take_word(self) -> bytes:
        end = self._data.index(b";", self._at)
        word = self._data[self._at : end]
        self._at = end + 1
        return word

    def _take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) != count:
            raise ValueError("it ends early")
        self._at += count
        return data

    def _number(self) -> int:
        return int(self._take_word(), 16)

    def _count(self) -> int:
        number = self._number()
        if number < 0:
            raise ValueError(f"the count {number}")
        return number


def _is_deque(value: Any) -> bool:
    return known(type(value), ("collections.deque",)) is not None
