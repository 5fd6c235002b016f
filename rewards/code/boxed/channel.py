"""Calls in both directions over one socket, one at a time; they may nest.

A request is "?", its number, a verb and the arguments. A reply is "=", that number, the arguments' contents if the call
changed them in place, then None and the value, or an exception's name and its arguments. If a value cannot cross, the
reply is "!" and the reason.
"""

from __future__ import annotations

import builtins
import os
from struct import pack, unpack

from .kinds import TYPE_CHECKING
from .wire import MAX_BYTES, Malformed, Reader, TooMuch, Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Disconnected(Exception):
    """The other side has hung up."""


class Oversized(Exception):
    """The other side has a value that is too large to cross."""


class Channel:
    """One end of the socket.

    perform: carries out a verb with its arguments. export, resolve, strict: see `Writer` and `Reader`. classes: the
    shared classes by name, whose objects cross as their attributes.
    """

    def __init__(
        self,
        fd: int,
        perform: Callable[[str, Any, Any], Any],
        export: Callable[[Any], tuple[bytes, int]],
        resolve: Callable[[bytes, int], Any],
        *,
        strict: bool,
    ) -> None:
        self.classes: dict[str, type] = {}
        self._strict = strict
        self._fd = fd
        self._perform = perform
        self._export = export
        self._resolve = resolve
        self._requests = 0

    def request(self, verb: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send a request and return the reply's value; meanwhile serve the other side's requests.

        Raises the other side's exception as the nearest builtin one, with `remote` set; Disconnected, Malformed or
        Oversized if there is no proper reply; TooMuch if the arguments are too large to cross; and the exceptions of
        `export`.
        """
        self._requests += 1
        number = self._requests
        containers: list[Any] = []
        self._send(b"?", [number, verb, args, kwargs], containers)
        while (data := self._receive())[:1] == b"?":
            self._serve(data)
        if data[:1] == b"!":
            raise Oversized(data[1:].decode(errors="replace"))
        reader = self._reader(data, containers)
        if data[:1] != b"=" or reader.get() != number:
            raise Malformed("a reply without a request")
        if reader.get():
            reader.refill()
        name, value = reader.get(), reader.get()
        if name is None:
            return value
        raise _exception(name, value)

    def serve(self) -> None:
        """Serve requests until the other side hangs up, then raise Disconnected."""
        while True:
            self._serve(self._receive())

    def _serve(self, data: bytes) -> None:
        containers: list[Any] = []
        reader = self._reader(data, containers)
        number, verb, before = reader.get(), reader.get(), reader.rest
        args, kwargs = reader.get(), reader.get()
        try:
            reply = [None, self._perform(verb, args, kwargs)]
        except Exception as error:  # noqa: BLE001  the caller handles it
            reply = [_nearest(error), error.args]
        try:
            after = Writer(self._export, [], self.classes)
            after.put(args)
            after.put(kwargs)
            changed = bool(containers) and after.data != before
            self._send(b"=", [number, changed, *reply], containers, with_contents=changed)
        except TooMuch as error:
            self._write(b"!" + str(error).encode())

    def _send(self, kind: bytes, values: list[Any], containers: list[Any], *, with_contents: bool = False) -> None:
        """Write a message; with contents, those of the containers follow its first two values."""
        writer = Writer(self._export, containers, self.classes)
        for place, value in enumerate(values):
            if place == 2 and with_contents:
                writer.put_contents()
            writer.put(value)
        self._write(kind + writer.data)

    def _reader(self, data: bytes, containers: list[Any]) -> Reader:
        return Reader(data[1:], self._resolve, containers, self.classes, strict=self._strict)

    def _write(self, message: bytes | bytearray) -> None:
        if len(message) > MAX_BYTES:
            raise TooMuch(f"a message longer than {MAX_BYTES >> 20} MiB")
        rest = memoryview(pack("<I", len(message)) + message)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise Disconnected from error

    def _receive(self) -> bytes:
        (length,) = unpack("<I", self._read(4))
        if length > MAX_BYTES:
            raise Oversized(f"a message longer than {MAX_BYTES >> 20} MiB")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = os.read(self._fd, min(count - len(data), 1 << 20))
            except OSError as error:
                raise Disconnected from error
            if not part:
                raise Disconnected
            data += part
        return bytes(data)


def _nearest(error: Exception) -> str:
    """Return the name of the builtin exception that `error` is or derives from."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)


def _exception(name: Any, args: Any) -> Exception:
    """Make a builtin exception, with `remote` set."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, Exception) and isinstance(args, tuple)):
        raise Malformed(f"not an exception: {name!r:.100}")
    try:
        error = kind(*args)
    except (TypeError, ValueError) as wrong:  # some need arguments of a certain kind
        raise Malformed(f"no arguments of {name}: {wrong}") from wrong
    error.remote = True  # type: ignore[attr-defined]
    return error
