"""The process of the tests: runs them against a solution that lives in another process, and says how they came out.

What the tests know as the solution's function is a `Handle`: calling it crosses the channel, and what comes back is
plain data built here, or another handle. So nothing of the solution's ever runs in this process.

Operators are not forwarded: `h - 2.5` or `5 in h` would hand an expected value to the solution, and `h < 5` would let
it answer for the test. Nor are attributes, unless the task names classes the tests use: where a string is expected,
`h.startswith("x")` would do both.
"""

from __future__ import annotations

import os
import sys
import time

from .channel import Channel, Gone, Withheld
from .wire import Malformed, Reader, TooMuch, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_CLIP = 200
_DETAIL_CHARS = 1000
_PAUSE_SECONDS = 0.05
"""For the solution's box to end by what ended the solution, before the end of the tests ends it."""


class Handle:
    """An object of the solution's: to be called, iterated, indexed and measured. Equal to itself and nothing else."""

    __slots__ = ("_number", "_tests")

    def __init__(self, tests: Tests, number: int) -> None:
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tests.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self._tests.attributes:
            raise AttributeError(f"an object of the solution's has no attribute '{name}' here")
        return self._tests.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._tests.attributes:
            raise AttributeError(f"an object of the solution's has no attribute '{name}' here")
        self._tests.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._tests.ask("item", self, key)

    def __iter__(self) -> Any:
        return self._tests.ask("iter", self)

    def __next__(self) -> Any:
        return self._tests.ask("next", self)

    def __len__(self) -> Any:
        return self._tests.ask("len", self)

    def __bool__(self) -> Any:
        return self._tests.ask("bool", self)

    def __str__(self) -> Any:
        return self._tests.ask("str", self)

    def __repr__(self) -> str:
        return "<an object of the solution's>"


class _Over(BaseException):
    """There is nothing more to learn. No `except Exception` of a test's stops it, and `Tests.over` remembers."""


class Tests:
    """The tests of one solution. over: the outcome that ended them early and its detail; None while they go on.
    attributes: whether handles have any.

    Outcomes are CodeReward's, and two more: "lost", the solution's process is gone; "broken", the tests are no tests.
    """

    def __init__(self, fd: int) -> None:
        self.over: tuple[str, str] | None = None
        self.attributes = False
        self._calls = 0
        self._last: Any = None
        self._sources: dict[str, list[str]] = {}
        self._callbacks: list[Any] = []
        self._handles: dict[int, Handle] = {}
        self._channel = Channel(fd, self._perform, self._export, self._resolve, strict=True)

    def ask(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """What the solution answers. Raises what it raised, and _Over where it is gone or breaks the rules."""
        if self.over:
            raise _Over
        self._calls += verb not in ("setup", "load", "name")
        try:
            self._last = self._channel.ask(verb, args, kwargs)
        except Gone:
            self._end("lost", "")
        except Malformed as error:
            self._end("crash", f"the solution broke into the channel: {error}")
        except Withheld as error:
            self._end("output limit", str(error))
        except TooMuch as error:  # later it may have grown from what the solution gave
            self._end("broken" if self._calls == 1 else "output limit", f"the tests pass {error}")
        return self._last

    def run(
        self, functions: list[str], classes: list[str], setup: str, shared: str, tests: list[str], stop: bool
    ) -> tuple[str, int, int, str]:
        """The outcome, how many tests passed, of how many, and the detail; stop: at the first that fails.

        functions, classes: what the tests take from the solution; its attributes too where there are classes. shared:
        what the solution sees of the setup. A test that does not call the solution tests nothing, and is not counted.
        """
        self.attributes = bool(classes)
        names = [*functions, *classes]
        passed, idle = 0, 0
        fault: tuple[str, str] | None = None
        try:
            namespace = self._prepare(names, setup, shared)
            for test in tests:
                calls = self._calls
                problem = self._test(test, namespace, names[0])
                if problem is None:
                    passed += self._calls > calls
                    idle += self._calls == calls
                fault = fault or problem
                if fault and stop:
                    break
            if idle == len(tests):
                self._end("broken", f"the tests never call '{names[0]}'")
        except _Over:
            pass
        outcome, detail = self.over or fault or ("passed", "")
        return outcome, passed, len(tests) - idle, detail[:_DETAIL_CHARS]

    def _prepare(self, names: list[str], setup: str, shared: str) -> dict[str, Any]:
        """The namespace of the tests: the solution's names, and all that the setup defines besides."""
        try:
            common = self.ask("setup", shared) if shared else []
        except Exception as error:  # noqa: BLE001  nothing of the solution's has run yet
            self._end("broken", f"the setup fails in the solution's process: {self._fault(error)[1]}")
        try:
            problem = self.ask("load")
        except Exception as error:  # noqa: BLE001  whatever the solution raises
            self._end(*self._fault(error))
        if problem is not None:
            is_text = isinstance(problem, str) and problem.isprintable()
            self._end("compile error", problem if is_text else _clip(problem))
        sys.modules["tests"] = type(sys)("tests")  # dataclasses look for it
        namespace = vars(sys.modules["tests"])
        for name in names:
            try:
                namespace[name] = self.ask("name", name)
            except Exception as error:  # noqa: BLE001
                self._end("compile error", f"the solution defines no '{name}': {self._fault(error)[1]}")
            if type(namespace[name]) is not Handle:
                self._end("crash", f"the solution broke into the channel: {name} is plain data")
        solution = {name: namespace[name] for name in names}
        if problem := self._test(setup, namespace, ""):
            self._end(*problem)
        namespace.update(solution)  # a prompt's stub of the function is in the setup too
        self._channel.classes = _classes(namespace, common)
        return namespace

    def _test(self, source: str, namespace: dict[str, Any], candidate: str) -> tuple[str, str] | None:
        """Run one test, and the `check` it defines where there is a candidate to check; the outcome if it fails."""
        calls = self._calls
        try:
            name = f"<test {len(self._sources)}>"
            self._sources[name] = source.splitlines()
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
            check = namespace.get("check")
            if candidate and callable(check) and type(check) is not Handle:
                del namespace["check"]
                check(namespace[candidate])
            if self.over:
                raise _Over  # a test caught it
        except Exception as error:  # noqa: BLE001  whatever a test raises is how it fails
            outcome, detail = self._fault(error)
            if self._calls == calls:
                self._end("broken", f"it fails before it calls the solution: {detail}")
            return outcome, detail
        return None

    def _fault(self, error: Exception) -> tuple[str, str]:
        """The outcome that an exception means, and the line of the tests it came through last."""
        line, trace = "", error.__traceback__
        while trace:
            if source := self._sources.get(trace.tb_frame.f_code.co_filename):
                line = f"{source[trace.tb_lineno - 1].strip()}: "
            trace = trace.tb_next
        said = f"{type(error).__name__}: {', '.join(map(_clip, error.args[:3]))}".removesuffix(": ")
        if isinstance(error, MemoryError):
            return "memory limit", f"{line}{said}"
        if hasattr(error, "remote"):
            return "crash", f"{line}{said}"
        got = f", got {_clip(self._last)}" if self._calls else ""
        return "wrong answer", f"{line}{said}{got}"

    def _end(self, outcome: str, detail: str) -> NoReturn:
        self.over = self.over or (outcome, detail)
        raise _Over

    def _perform(self, verb: str, args: Any, kwargs: Any) -> Any:
        """Call the function the tests passed; nothing else of this process can be asked for."""
        if verb != "call" or not any(args[0] is callback for callback in self._callbacks):
            self._end("crash", "the solution broke into the channel: it asks for what is not its to have")
        return args[0](*args[1:], **kwargs)

    def _export(self, value: Any) -> tuple[bytes, int]:
        if type(value) is Handle:
            return b"h", object.__getattribute__(value, "_number")
        if not callable(value):
            self._end("broken", f"the tests pass a {type(value).__name__}, which is neither plain data nor a function")
        self._callbacks.append(value)
        return b"c", len(self._callbacks) - 1

    def _resolve(self, kind: bytes, number: int) -> Any:
        if kind == b"c":
            return self._callbacks[number]
        if kind != b"h":
            raise LookupError(f"no kind {kind!r}")
        return self._handles.setdefault(number, Handle(self, number))


def _clip(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  an integer too long to print, a list nested in itself by force
        text = f"a {type(value).__name__}"
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}..."


def _classes(namespace: dict[str, Any], names: list[str]) -> dict[str, type]:
    """The classes that the setup defines under these names."""
    found = {name: namespace.get(name) for name in names}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and kind.__name__ == name}


class Probe:
    """Stands in for the solution and all that comes from it, and hands `carry` each value that tests pass or expect."""

    def __init__(self, carry: Any) -> None:
        self._carry = carry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._carry("pass", (args, kwargs))
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _with(self, *_: Any) -> Any:
        return self

    def _true(self, *_: Any) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        self._carry("expect", other)
        return True

    def __ne__(self, other: object) -> bool:
        self._carry("expect", other)
        return True

    __hash__ = object.__hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __truediv__ = __abs__ = __round__ = __neg__ = _with
    __getitem__ = _with
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _true

    def __len__(self) -> int:
        return 1


def uncarried(names: list[str], classes: list[str], shared: list[str], setup: str, tests: list[str]) -> str:
    """The first value that the tests pass to a solution or expect of it and that can't cross, as a sentence, or "".

    shared: names of the classes whose objects can cross. The tests run with a stand-in for the solution, so values that
    they reach only with a real one are not found.
    """
    found: list[str] = []
    common: dict[str, type] = {}

    def refer(value: Any) -> tuple[bytes, int]:
        if isinstance(value, Probe) or callable(value):
            return b"h", 0
        raise TypeError(type(value).__name__)

    def carry(how: str, value: Any) -> None:
        try:
            Writer(refer, [], common).put(value)
        except TypeError as error:
            found.append(f"the tests {how} a {error}, which is neither plain data nor of a class in setup")
            raise _Over from error
        except TooMuch:
            return

    sys.modules["tests"] = type(sys)("tests")
    namespace = vars(sys.modules["tests"])
    probes = {name.partition("(")[0]: Probe(carry) for name in [*names, *classes]}
    candidate = Probe(carry)
    namespace.update(probes)
    for number, source in enumerate([setup, *tests]):
        try:
            exec(compile(source, f"<test {number}>", "exec", dont_inherit=True), namespace)
            if number == 0:
                namespace.update(probes)
                common.update(_classes(namespace, shared))
            elif callable(check := namespace.pop("check", None)) and "check" not in names:
                check(candidate)
        except _Over:
            return found[0]
        except Exception:  # noqa: BLE001  with a stand-in, tests may fail as they like
            continue
    return found[0] if found else ""


def main(fd: int) -> None:
    """Run the tests that stdin describes, as `Tests.run` takes them, and write what that returns to stdout."""
    reader = Reader(sys.stdin.buffer.read(), _nothing, [])
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the tests may print
    writer = Writer(_nothing, [])
    result = Tests(fd).run(*reader.get())
    if result[0] == "lost":
        time.sleep(_PAUSE_SECONDS)
    writer.put(result)
    os.write(verdict, writer.data)


def probe(_: int) -> None:
    """Call `uncarried` for the tests that stdin describes, and write its result to stdout."""
    reader, writer = Reader(sys.stdin.buffer.read(), _nothing, []), Writer(_nothing, [])
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    writer.put(uncarried(*reader.get()))
    os.write(verdict, writer.data)


def _nothing(*what: Any) -> NoReturn:
    raise TypeError(f"not plain data: {what!r}")
