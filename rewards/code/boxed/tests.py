"""The tests' process: run the tests against a solution in another process, and report the outcome.

The tests see the solution's function as a `Handle`. A call crosses the channel and returns plain data built here, or
another handle. So none of the solution's code ever runs in this process.

Operators are not forwarded: `h - 2.5` or `5 in h` would hand an expected value to the solution, and `h < 5` would let
it answer for the test. Nor are attributes, unless the task names classes that the tests use: if a test expects a
string, `h.startswith("x")` would do both.
"""

from __future__ import annotations

import os
import sys
import time

from .channel import Channel, Disconnected, Oversized
from .kinds import TYPE_CHECKING
from .wire import Malformed, Reader, TooMuch, Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_CLIP = 200
_DETAIL_CHARS = 1000
_PAUSE_SECONDS = 0.05
"""Time for the solution's box to end for its own reason, before the end of the tests ends it."""


def _forwarded(verb: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self._tests.request(verb, self, *args, **kwargs)


class Handle:
    """An object of the solution: to be called, iterated, indexed and measured. Equal to itself only."""

    __slots__ = ("_number", "_tests")

    def __init__(self, tests: Tests, number: int) -> None:
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_number", number)

    __call__ = _forwarded("call")
    __getitem__ = _forwarded("item")
    __iter__ = _forwarded("iter")
    __next__ = _forwarded("next")
    __len__ = _forwarded("len")
    __bool__ = _forwarded("bool")
    __str__ = _forwarded("str")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self._tests.attributes:
            raise AttributeError(f"an object of the solution has no attribute '{name}' here")
        return self._tests.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._tests.attributes:
            raise AttributeError(f"an object of the solution has no attribute '{name}' here")
        self._tests.request("set", self, name, value)

    def __repr__(self) -> str:
        return "<an object of the solution>"


class _Over(BaseException):
    """Ends the tests early. No `except Exception` of a test stops it, and `Tests.ending` remembers why."""


class Tests:
    """The tests of one solution.

    ending: outcome and detail that ended them early, or None. attributes: handles have attributes. Outcomes are those
    of `CodeOutcome`, and "lost": the solution's process is gone, "broken": the tests test nothing.
    """

    def __init__(self, fd: int) -> None:
        self.ending: tuple[str, str] | None = None
        self.attributes = False
        self._calls = 0
        self._last: Any = None
        self._sources: dict[str, list[str]] = {}
        self._callbacks: list[Any] = []
        self._handles: dict[int, Handle] = {}
        self._channel = Channel(fd, self._perform, self._export, self._resolve, strict=True)

    def request(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Return the solution's reply. Raises its exception, and _Over if it is gone or breaks the protocol."""
        if self.ending:
            raise _Over
        self._calls += verb not in ("setup", "load", "name")
        try:
            self._last = self._channel.request(verb, args, kwargs)
        except Disconnected:
            self._end("lost", "")
        except Malformed as error:
            self._end("crash", f"the solution broke into the channel: {error}")
        except Oversized as error:
            self._end("output limit", str(error))
        except TooMuch as error:  # only a first call is free of what the solution returned
            self._end("broken" if self._calls == 1 else "output limit", f"the tests pass {error}")
        return self._last

    def run(
        self, functions: list[str], classes: list[str], setup: str, shared: str, tests: list[str], stop: bool
    ) -> tuple[str, int, int, str]:
        """Return the outcome, the number of tests that passed, the number that count, and the detail.

        functions, classes: names that the tests take from the solution. shared: the part of the setup that the solution
        sees. stop: at the first failure. A test that does not call the solution tests nothing, and does not count.
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
        outcome, detail = self.ending or fault or ("passed", "")
        return outcome, passed, len(tests) - idle, detail[:_DETAIL_CHARS]

    def _prepare(self, names: list[str], setup: str, shared: str) -> dict[str, Any]:
        """Return the tests' namespace: the solution's names, and all others that the setup defines."""
        try:
            common = self.request("setup", shared) if shared else []
        except Exception as error:  # noqa: BLE001  no code of the solution has run yet
            self._end("broken", f"the setup fails in the solution's process: {self._fault(error)[1]}")
        try:
            problem = self.request("load")
        except Exception as error:  # noqa: BLE001  the solution may raise anything
            self._end(*self._fault(error))
        if problem is not None:
            is_text = isinstance(problem, str) and problem.isprintable()
            self._end("compile error", problem if is_text else _clip(problem))
        namespace = _new_namespace()
        for name in names:
            try:
                namespace[name] = self.request("name", name)
            except Exception as error:  # noqa: BLE001
                self._end("compile error", f"the solution defines no '{name}': {self._fault(error)[1]}")
            if type(namespace[name]) is not Handle:
                self._end("crash", f"the solution broke into the channel: {name} is plain data")
        solution = {name: namespace[name] for name in names}
        if problem := self._test(setup, namespace, ""):
            self._end(*problem)
        namespace.update(solution)  # the setup may define a stub of the function, as a prompt does
        self._channel.classes = _classes(namespace, common)
        return namespace

    def _test(self, source: str, namespace: dict[str, Any], candidate: str) -> tuple[str, str] | None:
        """Run one test, and the `check` it defines on the candidate, if any; return outcome and detail of a failure."""
        calls = self._calls
        try:
            name = f"<test {len(self._sources)}>"
            self._sources[name] = source.splitlines()
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
            check = namespace.get("check")
            if candidate and callable(check) and type(check) is not Handle:
                del namespace["check"]
                check(namespace[candidate])
            if self.ending:
                raise _Over  # a test caught it
        except Exception as error:  # noqa: BLE001  a test fails by any exception
            outcome, detail = self._fault(error)
            if self._calls == calls:
                self._end("broken", f"it fails before it calls the solution: {detail}")
            return outcome, detail
        return None

    def _fault(self, error: Exception) -> tuple[str, str]:
        """Return the outcome of an exception, and a detail with the last line of the tests that it passed through."""
        line, trace = "", error.__traceback__
        while trace:
            if source := self._sources.get(trace.tb_frame.f_code.co_filename):
                line = f"{source[trace.tb_lineno - 1].strip()}: "
            trace = trace.tb_next
        message = f"{type(error).__name__}: {', '.join(map(_clip, error.args[:3]))}".removesuffix(": ")
        if isinstance(error, MemoryError):
            return "memory limit", f"{line}{message}"
        if hasattr(error, "remote"):
            return "crash", f"{line}{message}"
        got = f", got {_clip(self._last)}" if self._calls else ""
        return "wrong answer", f"{line}{message}{got}"

    def _end(self, outcome: str, detail: str) -> NoReturn:
        self.ending = self.ending or (outcome, detail)
        raise _Over

    def _perform(self, verb: str, args: Any, kwargs: Any) -> Any:
        """Call a function that the tests passed; the solution may request nothing else."""
        if verb != "call" or not any(args[0] is callback for callback in self._callbacks):
            self._end("crash", "the solution broke into the channel: it requests more than a call of a test's function")
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
    """Return the classes that the setup defines under these names."""
    values = {name: namespace.get(name) for name in names}
    return {name: kind for name, kind in values.items() if isinstance(kind, type) and kind.__name__ == name}


class Probe:
    """A stand-in for the solution and all its values; hands `carry` each value that tests pass or expect."""

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


def first_untransferable(names: list[str], classes: list[str], shared: list[str], setup: str, tests: list[str]) -> str:
    """Return a sentence on the first value that the tests pass or expect and that cannot cross, or "".

    shared: names of the classes whose objects can cross. The tests run with a `Probe` for the solution, so values that
    need a real one are not found.
    """
    problem = ""
    common: dict[str, type] = {}

    def refer(value: Any) -> tuple[bytes, int]:
        if isinstance(value, Probe) or callable(value):
            return b"h", 0
        raise TypeError(type(value).__name__)

    def carry(how: str, value: Any) -> None:
        nonlocal problem
        try:
            Writer(refer, [], common).put(value)
        except TypeError as error:
            problem = problem or f"the tests {how} a {error}, which is neither plain data nor of a class in setup"
            raise _Over from error
        except TooMuch:
            return

    namespace = _new_namespace()
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
            break
        except Exception:  # noqa: BLE001  with a stand-in, tests may fail in any way
            continue
    return problem


def report_tests(fd: int) -> None:
    """Run the tests in stdin, the arguments of `Tests.run`, and write its result to stdout."""

    def run(*request: Any) -> tuple[str, int, int, str]:
        result = Tests(fd).run(*request)
        if result[0] == "lost":
            time.sleep(_PAUSE_SECONDS)
        return result

    _report(run)


def report_probe(_: int) -> None:
    """Call `first_untransferable` with the arguments in stdin and write its result to stdout."""
    _report(first_untransferable)


def _report(function: Callable[..., Any]) -> None:
    request = Reader(sys.stdin.buffer.read(), _refuse, []).get()
    stdout = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the tests may print
    writer = Writer(_refuse, [])
    writer.put(function(*request))
    os.write(stdout, writer.data)


def _new_namespace() -> dict[str, Any]:
    sys.modules["tests"] = type(sys)("tests")  # dataclasses look their module up
    return vars(sys.modules["tests"])


def _refuse(*value: Any) -> NoReturn:
    raise TypeError(f"not plain data: {value!r}")
