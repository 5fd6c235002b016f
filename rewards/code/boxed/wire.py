"""Plain data between two processes, of which one is not trusted.

`Reader` builds only the values below, each of exactly that type: an object of a subclass is written as the type it
derives from, so neither its methods nor its `__eq__` cross. Objects of the classes that both sides have (`classes`)
cross as their attributes. Any other object stays in its process, and a number stands for it.

    N T F   None, True, False            l d S     list, dict, set
    i f j   int, float, complex          C O D q   Counter, OrderedDict, defaultdict, deque
    s b     str, bytes                   n m e     shared named tuple, any named tuple, member of a shared enum
    t z r   tuple, frozenset, range      p P       shared object: its attributes (a) follow at once, or later
    y       a plain type itself          #         container by its number
    x       a type of `kinds.CARRIED`    other     object that stays in its process, by its number

Containers (l to q, and shared objects) are numbered as they occur, and one that occurs again is written as its number.
So aliases and cycles survive, and `refill` gives them the contents that the other side made.

JSON would need the same tags, and importing it takes 6 ms in each box, where a whole run takes some 10 ms.
"""

from __future__ import annotations

import struct
from struct import pack, unpack

from .kinds import CARRIED, CARRIED_DICTS, TYPE_CHECKING, attributes, dotted_name, fetch, refuse_hiding

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_BYTES = 16 << 20
"""Longest message."""
MAX_DEPTH = 100
"""Deepest nesting of one value. A level takes four calls, and Python allows a thousand."""

_PLAIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (object, bool, int, float, complex, str, bytes, range, list, tuple, dict, set, frozenset, type(None))
}
_SINGLE = {None: b"N", True: b"T", False: b"F"}
_BUILTIN_CONTAINERS: dict[bytes, type] = {b"l": list, b"d": dict, b"S": set}
_DEEP = 40
"""Objects nested deeper follow behind the value, or a long linked list would pass MAX_DEPTH."""


class TooMuch(Exception):
    """A value is nested too deep or a message is too long."""


class Malformed(Exception):
    """Data that no `Writer` wrote, or a reply to no request."""


class Writer:
    """Writes values into `data`, one after the other.

    refer: returns the letter and the number of an object that is no plain data; may raise. containers: those that both
    sides know already; new ones are appended. classes: the shared classes by name.
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
        """Write one value. Raises TooMuch past MAX_BYTES or MAX_DEPTH, and the exceptions of `refer`."""
        self._put(value, 0)
        self._finish()

    def put_contents(self) -> None:
        """Write the present contents of every known container, for the other side's `refill`."""
        for container in self._containers[:]:
            self._contents(container, 1)
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
        fields = getattr(kind, "_fields", None)
        if self._classes.get(kind.__name__) is kind:
            self._bytes(b"n", kind.__name__.encode())
        elif isinstance(fields, tuple):
            self._bytes(b"m", kind.__name__.encode())
            self._items(b"t", fields, depth)
        self._items(b"t", value, depth)

    def _rare(self, value: Any, depth: int) -> None:
        kind = type(value)
        is_shared = self._classes.get(kind.__name__) is kind
        if is_shared and hasattr(kind, "__members__"):  # an enumeration
            self._bytes(b"e", kind.__name__.encode())
            self._put(value.name, depth)
        elif not is_shared and (name := dotted_name(kind, CARRIED)) is not None:
            self._bytes(b"x", name.encode())
            self._items(b"t", CARRIED[name](value), depth)
        elif is_shared or _is_deque(value):
            self._container(value, depth)
        else:
            self._number(*self._refer(value))

    def _container(self, value: Any, depth: int) -> None:
        number = self._numbers.get(id(value))
        if number is not None:
            self._number(b"#", number)
            return
        self._numbers[id(value)] = len(self._containers)
        self._containers.append(value)
        if isinstance(value, dict | list | set) or _is_deque(value):
            self._contents(value, depth)
        elif depth > _DEEP:
            self._bytes(b"P", type(value).__name__.encode())
            self._waiting.append(value)
        else:
            self._bytes(b"p", type(value).__name__.encode())
            self._contents(value, depth)

    def _contents(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            kind = CARRIED_DICTS.get(dotted_name(type(value), CARRIED_DICTS) or "", b"d")
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
        self.data += b"%b%x;" % (kind, number)  # hexadecimal takes linear time at any length


class Reader:
    """Reads the values in `data`, one after the other; the counterpart of `Writer`.

    refer: returns the object of a letter and a number; raises LookupError for an unknown one. classes: the writer's, by
    the same names. strict: refuse a shared object with an attribute that can be called or hides a method.
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
        """The unread part of the data."""
        return self._data[self._at :]

    def get(self) -> Any:
        """Read the next value. Raises Malformed."""
        return self._checked(lambda: self._get(0))

    def refill(self) -> None:
        """Give every known container the contents that the other side wrote. Raises Malformed."""
        self._checked(lambda: [self._refill(container, 1) for container in self._containers[:]])

    def _checked(self, read: Callable[[], Any]) -> Any:
        try:
            value = read()
            while self._waiting:
                self._refill(self._waiting.pop(0), 1)
            return value
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    def _get(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested past {MAX_DEPTH} levels")
        kind = self._take(1)
        read = _READERS.get(kind)
        return self._refer(kind, self._count()) if read is None else read(self, kind, depth)

    def _items(self, depth: int) -> list[Any]:
        return [self._get(depth + 1) for _ in range(self._count())]

    def _carried(self, _: bytes, depth: int) -> Any:
        name = self._text()
        if name not in CARRIED:
            raise ValueError(f"no type {name!r:.60}")
        return fetch(name)(*self._get(depth + 1))

    def _named_tuple(self, _: bytes, depth: int) -> Any:
        name, fields, values = self._text(), self._get(depth + 1), self._get(depth + 1)
        hides_method = set(fields) & set(dir(tuple))
        return values if hides_method else fetch("collections.namedtuple")(name, fields)._make(values)

    def _class(self, attribute: str) -> Any:
        kind = self._classes[self._text()]
        if not hasattr(kind, attribute):
            raise ValueError(f"{kind.__name__} has no {attribute}")
        return kind

    def _object(self, kind: bytes, depth: int) -> Any:
        value = object.__new__(self._class("__dict__"))
        self._containers.append(value)
        if kind == b"P":
            self._waiting.append(value)
        else:
            self._refill(value, depth)
        return value

    def _container(self, kind: bytes, depth: int) -> Any:
        if kind in _BUILTIN_CONTAINERS:
            container = _BUILTIN_CONTAINERS[kind]()
        elif kind == b"q":
            longest = self._take_word()
            container = fetch("collections.deque")([], int(longest, 16) if longest else None)
        elif kind == b"D":
            factory = self._take_word().decode()
            container = fetch("collections.defaultdict")(_PLAIN_TYPES[factory] if factory else None)
        else:
            container = fetch("collections.Counter" if kind == b"C" else "collections.OrderedDict")()
        self._containers.append(container)
        self._fill(container, kind, self._items(depth))
        return container

    def _refill(self, container: Any, depth: int) -> None:
        kind = self._take(1)
        if kind in b"qD":
            self._take_word()
        items = self._items(depth)
        if kind == b"a":
            self._fill_object(container, dict(zip(items[::2], items[1::2], strict=True)))
        else:
            self._fill(container, kind, items)

    def _fill(self, container: Any, kind: bytes, items: list[Any]) -> None:
        if not (_is_deque(container) if kind == b"q" else isinstance(container, _BUILTIN_CONTAINERS.get(kind, dict))):
            raise ValueError(f"the contents {kind!r} for a {type(container).__name__}")
        container.clear()
        if isinstance(container, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                container[key] = value  # a Counter's update would add
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)

    def _fill_object(self, value: Any, new: dict[Any, Any]) -> None:
        """Give an object the attributes `new`, and delete all others."""
        kind = type(value)
        if self._classes.get(kind.__name__) is not kind:
            raise ValueError(f"attributes for a {kind.__name__}")
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

    def _text(self) -> str:
        return self._take(self._count()).decode("utf-8", "surrogatepass")

    def _number(self) -> int:
        return int(self._take_word(), 16)

    def _count(self) -> int:
        number = self._number()
        if number < 0:
            raise ValueError(f"the count {number}")
        return number


_READERS: dict[bytes, Callable[[Reader, bytes, int], Any]] = {
    b"N": lambda reader, kind, depth: None,
    b"T": lambda reader, kind, depth: True,
    b"F": lambda reader, kind, depth: False,
    b"i": lambda reader, kind, depth: reader._number(),
    b"f": lambda reader, kind, depth: unpack("<d", reader._take(8))[0],
    b"j": lambda reader, kind, depth: complex(*unpack("<dd", reader._take(16))),
    b"s": lambda reader, kind, depth: reader._text(),
    b"b": lambda reader, kind, depth: reader._take(reader._count()),
    b"t": lambda reader, kind, depth: tuple(reader._items(depth)),
    b"z": lambda reader, kind, depth: frozenset(reader._items(depth)),
    b"r": lambda reader, kind, depth: range(*reader._items(depth)),
    b"y": lambda reader, kind, depth: _PLAIN_TYPES[reader._take(reader._count()).decode()],
    b"n": lambda reader, kind, depth: reader._class("_fields")._make(reader._get(depth + 1)),
    b"e": lambda reader, kind, depth: reader._class("__members__")[reader._get(depth + 1)],
    b"#": lambda reader, kind, depth: reader._containers[reader._count()],
    b"x": Reader._carried,
    b"m": Reader._named_tuple,
    **dict.fromkeys((b"p", b"P"), Reader._object),
    **dict.fromkeys((b"l", b"d", b"S", b"C", b"O", b"D", b"q"), Reader._container),
}


def _is_deque(value: Any) -> bool:
    return dotted_name(type(value), ("collections.deque",)) is not None
