"""Calls in both directions over one socket, one at a time, nested as they come.

A request is "?", its number, a verb and the arguments. The answer is "=", that number, the arguments' contents where
the call changed them in place, the exception's name or None, and its arguments or the value; or it is "!" and why a
value cannot cross.
"""

from __future__ import annotations

import builtins
import os
from struct import pack, unpack

from .wire import MAX_BYTES, Malformed, Reader, TooMuch, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Gone(Exception):
    """The other side has hung up."""


class Withheld(Exception):
    """The other side has a value that is too large to cross."""


class Channel:
    """One end. perform: does what a verb and its arguments ask for. export, resolve, strict: see `Writer` and `Reader`.

    classes: the shared classes by name, whose objects cross as their attributes.
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
        self._asked = 0

    def ask(self, verb: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the other side answers; meanwhile its own requests are served.

        Raises what the other side raised, as the nearest exception of Python's own with `remote` set; Gone, Malformed
        or Withheld where that is all it has to say; TooMuch where the arguments are too large to cross; and what
        `export` raises.
        """
        self._asked += 1
        number = self._asked
        containers: list[Any] = []
        self._send(b"?", [number, verb, args, kwargs], containers)
        while (data := self._receive())[:1] == b"?":
            self._serve(data)
        if data[:1] == b"!":
            raise Withheld(data[1:].decode(errors="replace"))
        reader = self._reader(data, containers)
        if data[:1] != b"=" or reader.get() != number:
            raise Malformed("an answer to what nobody asked")
        if reader.get():
            reader.refill()
        name, value = reader.get(), reader.get()
        if name is None:
            return value
        raise _exception(name, value)

    def serve(self) -> None:
        """Answer requests until the other side hangs up; then raises Gone."""
        while True:
            self._serve(self._receive())

    def _serve(self, data: bytes) -> None:
        containers: list[Any] = []
        reader = self._reader(data, containers)
        number, verb, sent = reader.get(), reader.get(), reader.rest
        args, kwargs = reader.get(), reader.get()
        try:
            answer = [None, self._perform(verb, args, kwargs)]
        except Exception as error:  # noqa: BLE001  the caller's to handle
            answer = [_nearest(error), error.args]
        try:
            now = Writer(self._export, [], self.classes)
            now.put(args)
            now.put(kwargs)
            changed = bool(containers) and now.data != sent
            self._send(b"=", [number, changed, *answer], containers, with_contents=changed)
        except TooMuch as error:
            self._write(b"!" + str(error).encode())

    def _send(self, kind: bytes, values: list[Any], containers: list[Any], *, with_contents: bool = False) -> None:
        """Write a message; with contents, those of the containers stand behind the first two values."""
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
        left = memoryview(pack("<I", len(message)) + message)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise Gone from error

    def _receive(self) -> bytes:
        (length,) = unpack("<I", self._read(4))
        if length > MAX_BYTES:
            raise Withheld(f"a message longer than {MAX_BYTES >> 20} MiB")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = os.read(self._fd, min(count - len(data), 1 << 20))
            except OSError as error:
                raise Gone from error
            if not part:
                raise Gone
            data += part
        return bytes(data)


def _nearest(error: Exception) -> str:
    """The name of the exception of Python's own that `error` is or derives from."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)


def _exception(name: Any, args: Any) -> Exception:
    """An exception of Python's own, with `remote` set."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, Exception) and isinstance(args, tuple)):
        raise Malformed(f"not an exception: {name!r:.100}")
    try:
        error = kind(*args)
    except (TypeError, ValueError) as wrong:  # some want arguments of a certain kind
        raise Malformed(f"no arguments of {name}: {wrong}") from wrong
    error.remote = True  # type: ignore[attr-defined]
    return error
