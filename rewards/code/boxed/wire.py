"""Plain data between two processes of which one is not to be trusted.

Reading builds nothing but None, booleans, numbers, text, bytes, ranges, lists, tuples, dicts, sets and the plain types
themselves, each exactly: an object of a subclass is written as what it derives from, so neither its methods nor its
`__eq__` cross. Any other object stays in its own process, and a number stands for it.

A list, dict or set met again is written as its number, so aliases and cycles survive, and what one side changed in
place the other can `refill`. Imported inside the boxes, where every import is paid for with each sample.
"""

from __future__ import annotations

import struct
from struct import pack, unpack

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


class TooMuch(Exception):
    """A value nested too deep or a message too long."""


class Malformed(Exception):
    """What no `Writer` wrote, or what nobody asked for."""


class Writer:
    """Values, written one after the other into `data`.

    refer: the letter and the number that stand for an object that is no plain data; may raise. containers: the lists,
    dicts and sets both sides know by their place in it already; what is written is appended.
    """

    def __init__(self, refer: Callable[[Any], tuple[bytes, int]], containers: list[Any]) -> None:
        self.data = bytearray()
        self._refer = refer
        self._containers = containers
        self._numbers = {id(container): number for number, container in enumerate(containers)}

    def put(self, value: Any, depth: int = 0) -> None:
        """Write one value. Raises TooMuch past MAX_BYTES or MAX_DEPTH, and whatever `refer` does."""
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
            self._items(b"t", value, depth)
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
            self._number(*self._refer(value))

    def put_contents(self) -> None:
        """Write what every container known so far holds now, for the other side's `refill`."""
        for container in self._containers[:]:
            self._contents(container, 0)

    def _container(self, value: Any, depth: int) -> None:
        number = self._numbers.get(id(value))
        if number is None:
            self._numbers[id(value)] = len(self._containers)
            self._containers.append(value)
            self._contents(value, depth)
        else:
            self._number(b"#", number)

    def _contents(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._items(b"d", [part for item in value.items() for part in item], depth)
        else:
            self._items(b"l" if isinstance(value, list) else b"S", value, depth)

    def _items(self, kind: bytes, items: Any, depth: int) -> None:
        self._number(kind, len(items))
        for item in items:
            self.put(item, depth + 1)

    def _bytes(self, kind: bytes, data: bytes) -> None:
        self._number(kind, len(data))
        self.data += data

    def _number(self, kind: bytes, number: int) -> None:
        self.data += b"%b%x;" % (kind, number)  # hexadecimal takes linear time, whatever the length


class Reader:
    """The values in `data`, one after the other; the counterpart of `Writer`.

    refer: the object that a letter and a number stand for; raises LookupError for one that never was.
    """

    def __init__(self, data: bytes, refer: Callable[[bytes, int], Any], containers: list[Any]) -> None:
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
            return self._get(0)
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    def refill(self) -> None:
        """Give every container known so far the contents that the other side wrote. Raises Malformed."""
        try:
            for container in self._containers[:]:
                self._fill(container, self._take(1), self._count(), 0)
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

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
            case _:
                return self._refer(kind, self._count())

    def _fill(self, container: Any, kind: bytes, count: int, depth: int) -> None:
        if not isinstance(container, _CONTAINERS[kind]):
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

    def _take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) != count:
            raise ValueError("it ends early")
        self._at += count
        return data

    def _number(self) -> int:
        end = self._data.index(b";", self._at)
        number = int(self._data[self._at : end], 16)
        self._at = end + 1
        return number

    def _count(self) -> int:
        number = self._number()
        if number < 0:
            raise ValueError(f"the count {number}")
        return number
