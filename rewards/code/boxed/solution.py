"""The solution's process: run the solution and answer the calls of its tests. No other process trusts this one."""

from __future__ import annotations

import os
import sys

from .channel import Channel, Disconnected
from .kinds import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


class _Kept:
    """A value that stays in this process even if it is plain data."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Callback:
    """A function that the tests passed as an argument."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel = channel
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.channel.request("call", (self, *args), kwargs)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    return _Kept(result) if isinstance(function, type) else result


_VERBS = {
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": lambda value, key: value[key],
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}


class Solution:
    """The solution's objects, by the numbers that its tests use for them."""

    def __init__(self, fd: int, source: str) -> None:
        self._source = source
        self._module = type(sys)("solution")
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.channel = Channel(fd, self._perform, self._export, self._resolve, strict=False)

    def _perform(self, verb: str, args: Any, kwargs: Any) -> Any:
        if verb == "setup":
            return self._prepare(args[0])
        if verb == "load":
            return self._load()
        if verb == "name":
            name, _, method = args[0].partition("().")
            value = vars(self._module)[name]
            return _Kept(getattr(value(), method) if method else value)
        return _VERBS[verb](*args, **kwargs)

    def _prepare(self, setup: str) -> list[str]:
        """Run the shared setup and return the names of its classes."""
        sys.modules["solution"] = self._module
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), vars(self._module))
        self.channel.classes = {
            name: value
            for name, value in vars(self._module).items()
            if isinstance(value, type) and value.__module__ == "solution" and value.__name__ == name
        }
        return [*self.channel.classes]

    def _load(self) -> str | None:
        """Run the solution; return the syntax error of one that is no Python. Raises its exceptions."""
        try:
            code = compile(self._source, "solution.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        exec(code, vars(self._module))
        for name in self.channel.classes:  # a solution may define them again
            value = vars(self._module).get(name)
            if isinstance(value, type):
                self.channel.classes[name] = value
        return None

    def _export(self, value: Any) -> tuple[bytes, int]:
        if isinstance(value, _Callback):
            return b"c", value.number
        value = value.value if isinstance(value, _Kept) else value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return b"h", self._numbers[id(value)]

    def _resolve(self, kind: bytes, number: int) -> Any:
        return self._objects[number] if kind == b"h" else _Callback(self.channel, number)


def serve_solution(fd: int) -> None:
    """Serve the solution in stdin until the tests hang up."""
    solution = Solution(fd, sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    silence = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):
        os.dup2(silence, standard)
    try:
        solution.channel.serve()
    except Disconnected:
        os._exit(0)  # even if it has threads that still run
